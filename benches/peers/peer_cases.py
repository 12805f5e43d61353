"""Shared by the tests: cases, random layers, input files, and a started peer program."""

import contextlib
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))
os.environ["TRITON_INTERPRET"] = "1"

import torch
from safetensors.torch import save_file

import layer as layers
import truth

BOUNDARIES = [layers.GEMM, layers.FROM_LOGITS, layers.FROM_X]
# The largest errors seen are 3.1e-7, 7.1e-4 and 6.3e-3. A wrong row makes an error above 0.1.
TOLERANCE = {"f32": 5e-7, "f16": 1e-3, "bf16": 8e-3}
ON_CPU = ["torch-loop", "torch-bmm", "torch-grouped-mm", "triton-fused-moe"]

# Name, sizes T H I E K, dtype, source of the logits, and whether weights are renormalised.
CASES = [
    ("plain", (33, 64, 96, 8, 2), "f32", "x"),
    ("plain", (33, 64, 96, 8, 2), "f16", "x"),
    ("plain", (33, 64, 96, 8, 2), "bf16", "x"),
    ("one token", (1, 64, 32, 8, 2), "bf16", "x"),
    ("odd sizes", (19, 72, 40, 5, 3), "bf16", "x"),
    ("odd sizes", (7, 33, 27, 5, 3), "f32", "x"),
    ("an expert without rows", (24, 64, 32, 6, 2), "f32", "no rows"),
    ("all to one expert", (24, 64, 32, 6, 1), "bf16", "hot"),
    ("one expert per token", (21, 64, 32, 8, 1), "f32", "x"),
    ("every expert", (9, 64, 32, 4, 4), "f32", "x"),
]
CASES = [(*case, renormalize) for case in CASES for renormalize in ("true", "false")]


def tensors_of(sizes, dtype, logits_by, renormalize="true"):
    """Returns a layer's tensors. y is computed in f64, token by token."""
    tokens, hidden, intermediate, experts, top_k = sizes
    generator = torch.Generator().manual_seed(0)
    dtype = layers.DTYPES[dtype]
    normal = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)
    x = normal(tokens, hidden).to(dtype)
    router_gate = (normal(experts, hidden) / hidden**0.5).to(dtype)
    gate_up = (normal(experts, 2 * intermediate, hidden) / hidden**0.5).to(dtype)
    down = (normal(experts, hidden, intermediate) / intermediate**0.5).to(dtype)
    logits = x.double() @ router_gate.double().T
    if logits_by == "hot":
        logits[:, 2] += 50
    if logits_by == "no rows":
        logits[:, 2] -= 50
    logits = logits.to(dtype)
    ids = torch.zeros(tokens, top_k, dtype=torch.int32)
    weights = torch.zeros(tokens, top_k)
    y = torch.zeros(tokens, hidden, dtype=torch.float64)
    for token in range(tokens):
        scores = logits[token].double().exp().tolist()
        chosen = sorted(range(experts), key=lambda expert: -scores[expert])[:top_k]
        total = sum(scores[expert] for expert in chosen) if renormalize == "true" else sum(scores)
        for rank, expert in enumerate(chosen):
            share = scores[expert] / total
            ids[token, rank], weights[token, rank] = expert, share
            inner = gate_up[expert].double() @ x[token].double()
            act = torch.nn.functional.silu(inner[:intermediate]) * inner[intermediate:]
            y[token] += share * (down[expert].double() @ act)
    found = dict(x=x, router_gate=router_gate, logits=logits, gate_up=gate_up, down=down)
    return found | dict(expert_ids=ids, weights=weights, y=y.to(dtype))


def write(path, tensors, **metadata):
    """Writes a layer's file. Metadata that is None is left out."""
    metadata = {"model": "test", "routing": "uniform", "renormalize": "true"} | metadata
    metadata = {name: value for name, value in metadata.items() if value is not None}
    save_file(tensors, path, metadata=metadata)


class Program:
    """A started peer program."""

    def __init__(self, path, command=(sys.executable, HERE / "peers.py"), env=None):
        command = [*map(str, command), "--device", "cpu", "--inputs", str(path)]
        pipe = subprocess.PIPE
        self.process = subprocess.Popen(
            command, stdin=pipe, stdout=pipe, stderr=pipe, text=True, env=os.environ | (env or {})
        )
        self.first = json.loads(self.process.stdout.readline())

    def ask(self, request):
        line = request if isinstance(request, str) else json.dumps(request)
        self.process.stdin.write(line + "\n")
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline())

    def end(self):
        _, errors = self.process.communicate()
        return self.process.returncode, errors


@contextlib.contextmanager
def program(tensors, dtype, renormalize="true", **options):
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "layer.safetensors"
        write(path, tensors, dtype=dtype, renormalize=renormalize)
        started = Program(path, **options)
        try:
            yield started
        finally:
            started.code, started.errors = started.end()


def layer_of(sizes, dtype, logits_by="x", renormalize="true"):
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "layer.safetensors"
        tensors = tensors_of(sizes, dtype, logits_by, renormalize)
        write(path, tensors, dtype=dtype, renormalize=renormalize)
        return layers.read(path)


def assert_right(test, layer, peer, dtype):
    expected = truth.Truth(layer)
    for boundary in peer.boundaries:
        error = expected.error(boundary, peer.call(boundary, layer.weights))
        test.assertLessEqual(error, TOLERANCE[dtype], (boundary, layer.x.shape))
