"""Tests of the peers on the CPU, with torch and triton: `python -m unittest test_peers`.

Triton's kernels are interpreted. Where MOE_PEER_CANDLE names candle's program, it is tested too.
"""

import contextlib
import dataclasses
import itertools
import json
import math
import os
import re
import subprocess
import sys
import tempfile
import types
import unittest
from pathlib import Path
from unittest import mock

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))
os.environ["TRITON_INTERPRET"] = "1"

import torch
from safetensors.torch import save_file

import adapters
import cublas_grouped
import layer as layers
import truth
from errors import InputError, Wrong


def first_in_path(folder):
    """PYTHONPATH with a folder before those that it has: torch may be in one of them."""
    return os.pathsep.join([folder, *filter(None, [os.environ.get("PYTHONPATH")])])


BOUNDARIES = [layers.GEMM, layers.FROM_LOGITS, layers.FROM_X]
# The largest errors seen are 3.1e-7, 7.1e-4 and 6.3e-3; a wrong row costs more than a tenth.
TOLERANCE = {"f32": 5e-7, "f16": 1e-3, "bf16": 8e-3}
ON_CPU = ["torch-loop", "torch-bmm", "torch-grouped-mm", "triton-fused-moe"]

# Name, sizes T H I E K, dtype, how logits are made, and whether weights are renormalised.
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
    """A layer's tensors; y is computed here in f64, token by token."""
    tokens, hidden, intermediate, experts, top_k = sizes
    generator = torch.Generator().manual_seed(0)
    dtype = layers.DTYPES[dtype]
    normal = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)
    x = normal(tokens, hidden).to(dtype)
    gate = (normal(experts, hidden) / hidden**0.5).to(dtype)
    gate_up = (normal(experts, 2 * intermediate, hidden) / hidden**0.5).to(dtype)
    down = (normal(experts, hidden, intermediate) / intermediate**0.5).to(dtype)
    logits = x.double() @ gate.double().T
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
    found = dict(x=x, gate=gate, logits=logits, gate_up=gate_up, down=down)
    return found | dict(expert_ids=ids, weights=weights, y=y.to(dtype))


def write(path, tensors, **metadata):
    """Writes a layer's file; metadata that is None is left out."""
    said = {"model": "test", "routing": "uniform", "renormalize": "true"} | metadata
    said = {name: value for name, value in said.items() if value is not None}
    save_file(tensors, path, metadata=said)


class Program:
    """A peer program that has been started."""

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


class Correctness(unittest.TestCase):
    def test_every_peer_is_right_in_every_case(self):
        for name, sizes, dtype, logits_by, renormalize in CASES:
            case = dict(name=name, sizes=sizes, dtype=dtype, renormalize=renormalize)
            tensors = tensors_of(sizes, dtype, logits_by, renormalize)
            with program(tensors, dtype, renormalize) as started:
                unavailable = {each["name"]: each["why"] for each in started.first["unavailable"]}
                for peer in ["moe-kernels", *ON_CPU]:
                    with self.subTest(**case, peer=peer):
                        reply = started.ask({"check": peer})
                        if peer in unavailable:
                            self.assertRegex(unavailable[peer], "of 16 bytes|bits of bf16")
                            self.assertIn("unavailable", reply["error"])
                            continue
                        self.assertLessEqual(reply["relative_error"], TOLERANCE[dtype], reply)
            self.assertEqual((started.code, started.errors), (0, ""))

    def test_a_file_that_was_altered_is_wrong(self):
        sizes = (33, 64, 96, 8, 2)
        for name, alter, said in [
            ("y", lambda tensors: tensors["y"][0].neg_(), None),
            ("down", lambda tensors: tensors["down"].mul_(1.1), None),
            ("weights", lambda tensors: tensors["weights"].mul_(0.5), None),
            ("expert_ids", lambda tensors: tensors["expert_ids"].add_(1).remainder_(8), "token 0"),
            ("y", lambda tensors: tensors["y"][0, 0].fill_(float("nan")), "NaN"),
        ]:
            tensors = tensors_of(sizes, "f32", "x")
            alter(tensors)
            with self.subTest(name), program(tensors, "f32") as started:
                reply = started.ask({"check": "moe-kernels"})
                if said:
                    self.assertIn(said, reply["error"])
                else:
                    self.assertGreater(reply["relative_error"], 1e-2)

    def test_nan_in_weights_never_passes(self):
        tensors = tensors_of((9, 64, 32, 4, 4), "f32", "x")
        tensors["down"][1] = float("nan")
        with program(tensors, "f32") as started:
            for peer in ["moe-kernels", *ON_CPU]:
                self.assertIn("error", started.ask({"check": peer}), peer)

    def test_a_wrong_result_is_seen_at_each_boundary(self):
        import torch_peers

        layer = layer_of((33, 64, 96, 8, 2), "f32")
        judge = truth.Truth(layer)
        peer = torch_peers.TorchGroupedMm(layer)
        rows = peer.rows
        for boundary in BOUNDARIES:
            right = judge.error(boundary, peer.call(boundary, layer.weights))
            self.assertLess(right, TOLERANCE["f32"])
            with mock.patch.object(peer, "rows", lambda *all: rows(*all).roll(1, 0)):
                wrong = judge.error(boundary, peer.call(boundary, layer.weights))
            self.assertGreater(wrong, 0.1)
            with mock.patch.object(peer, "rows", lambda *all: rows(*all) * float("nan")):
                with self.assertRaises(Wrong):
                    judge.error(boundary, peer.call(boundary, layer.weights))

    def test_who_does_not_heed_renormalize_is_wrong(self):
        import torch_peers

        sizes = (33, 64, 96, 8, 2)
        for said, other in itertools.permutations(("true", "false")):
            tensors = tensors_of(sizes, "f32", "x", other)
            with program(tensors, "f32", renormalize=said) as started:
                self.assertGreater(started.ask({"check": "moe-kernels"})["relative_error"], 0.1)
            layer = layer_of(sizes, "f32", renormalize=said)
            judge = truth.Truth(layer)
            peer = torch_peers.TorchLoop(dataclasses.replace(layer, renormalize=other == "true"))
            for boundary in BOUNDARIES[1:]:
                error = judge.error(boundary, peer.call(boundary, layer.weights))
                self.assertGreater(error, 0.1, (boundary, said))

    def test_ties_go_to_the_lower_expert(self):
        for renormalize, total in ((True, 1.0), (False, 1 - 0.5 / (1 + math.e**2))):
            logits = torch.tensor([[1.0, 3.0, 3.0, 1.0]]).double()
            ids, weights = truth.route(logits, 3, renormalize)
            self.assertEqual(ids.tolist(), [[1, 2, 0]])
            self.assertAlmostEqual(weights.sum().item(), total)
        import triton_fused_moe

        layer = layer_of((5, 64, 32, 4, 3), "f32")
        peer = triton_fused_moe.TritonFusedMoe(layer, None, None)
        logits = torch.tensor([[1.0, 3.0, 3.0, 1.0]] * 5)
        self.assertEqual(peer.route(logits)[0].tolist(), [[1, 2, 0]] * 5)


class CublasStandIn(unittest.TestCase):
    """cuBLAS' call with a library that computes what cuBLAS' manual says, on the CPU."""

    def test_the_call_is_laid_out_as_cublas_reads_it(self):
        with tempfile.TemporaryDirectory() as folder:
            library = f"{folder}/libstandin.so"
            source = str(HERE / "cublas_stand_in.cpp")
            subprocess.run(["g++", "-O1", "-shared", "-fPIC", source, "-o", library], check=True)
            with mock.patch.dict(os.environ, MOE_PEERS_CUBLAS=library):
                for _, sizes, dtype, *how in CASES:
                    if dtype == "f16":
                        continue
                    layer = layer_of(sizes, dtype, *how)
                    peer = cublas_grouped.CublasGrouped(layer)
                    self.assertEqual(peer.version, "cublas 13.1.0")
                    assert_right(self, layer, peer, dtype)


class Adapters(unittest.TestCase):
    """Packages of others, played by a few lines that have the same functions."""

    def test_deepgemm_gets_padded_groups(self):
        def product(a, b, c, expert_of_row):
            c.fill_(float("nan"))
            self.assertEqual(len(a) % 128, 0)
            for start in range(0, len(a), 128):
                block = expert_of_row[start : start + 128]
                used = block[block >= 0]
                self.assertTrue((used == block[0]).all(), "a block of two experts")
                if used.numel():
                    c[start : start + 128][block >= 0] = (
                        a[start : start + 128][block >= 0] @ b[block[0]].T
                    )

        package = types.SimpleNamespace(
            __version__="0",
            get_mk_alignment_for_contiguous_layout=lambda: 128,
            m_grouped_bf16_gemm_nt_contiguous=product,
        )
        for sizes, *how in [
            ((300, 64, 32, 6, 2), "no rows", "true"),
            ((300, 64, 32, 6, 2), "no rows", "false"),
            ((1, 64, 32, 8, 2), "x", "true"),
        ]:
            layer = layer_of(sizes, "bf16", *how)
            with mock.patch.dict(sys.modules, deep_gemm=package):
                with mock.patch.object(adapters, "need_cuda"):
                    peer = adapters.DeepGemm(layer)
            assert_right(self, layer, peer, "bf16")

    def test_sonicmoe_gets_its_layout_and_its_softmax(self):
        def moe(x, gate, w1, b1, w2, b2, top_k, stream, activation, inference, **softmax):
            self.assertEqual((b1, b2, stream, inference), (None, None, 7, True))
            self.assertEqual((activation, list(softmax)), ("swiglu", ["is_softmax_over_topk"]))
            # As the package has it: a softmax over the selected, or one over all, left as it is.
            over_selected = softmax["is_softmax_over_topk"]
            scores = x.double() @ gate.double().T
            if not over_selected:
                scores = scores.softmax(1)
            scores, ids = scores.topk(top_k, dim=1)
            if over_selected:
                scores = scores.softmax(1)
            y = torch.zeros_like(x, dtype=torch.float64)
            for token, rank in itertools.product(range(len(x)), range(top_k)):
                expert = ids[token, rank]
                hidden = w1[:, :, expert].double() @ x[token].double()
                act = torch.nn.functional.silu(hidden[0::2]) * hidden[1::2]
                y[token] += scores[token, rank] * (w2[:, :, expert].double() @ act)
            return y.to(x.dtype), None, None

        package = types.SimpleNamespace(__version__="0", moe_TC_softmax_topk_layer=moe)
        stream = types.SimpleNamespace(cuda_stream=7)
        for renormalize in ("true", "false"):
            layer = layer_of((33, 64, 96, 8, 2), "bf16", "x", renormalize)
            with (
                mock.patch.dict(sys.modules, sonicmoe=package),
                mock.patch.object(adapters, "need_cuda"),
                mock.patch.object(torch.cuda, "current_stream", lambda: stream),
            ):
                assert_right(self, layer, adapters.SonicMoe(layer), "bf16")

    def test_absent_packages_are_unavailable(self):
        with program(tensors_of((4, 64, 32, 4, 2), "bf16", "x"), "bf16") as started:
            why = {each["name"]: each["why"] for each in started.first["unavailable"]}
            self.assertLessEqual({"cublas-grouped", "deepgemm", "scattermoe", "sonicmoe"}, set(why))
            self.assertIn("unavailable", started.ask({"check": "deepgemm"})["error"])

    def test_a_part_of_the_peers(self):
        command = (sys.executable, HERE / "peers.py", "--only", "torch-loop,deepgemm")
        tensors = tensors_of((4, 64, 32, 4, 2), "f32", "x")
        with program(tensors, "f32", command=command) as started:
            self.assertEqual([each["name"] for each in started.first["peers"]], ["torch-loop"])
            absent = [each["name"] for each in started.first["unavailable"]]
            self.assertEqual(absent, ["deepgemm"])
            self.assertIn("--only", started.ask({"check": "torch-bmm"})["error"])


def assert_right(test, layer, peer, dtype):
    judge = truth.Truth(layer)
    for boundary in peer.boundaries:
        error = judge.error(boundary, peer.call(boundary, layer.weights))
        test.assertLessEqual(error, TOLERANCE[dtype], (boundary, layer.x.shape))


class Protocol(unittest.TestCase):
    def setUp(self):
        self.tensors = tensors_of((12, 64, 32, 4, 2), "f32", "x")

    def test_peers_present_themselves(self):
        with program(self.tensors, "f32") as started:
            boundaries = {each["name"]: each["boundaries"] for each in started.first["peers"]}
            wanted = {name: BOUNDARIES for name in ON_CPU} | {"torch-bmm": BOUNDARIES[:1]}
            self.assertEqual(boundaries, wanted)
            versions = [each["version"] for each in started.first["peers"]]
            self.assertTrue(all(version.split()[0] in ("torch", "triton") for version in versions))

    def test_times_are_seconds_per_call(self):
        with program(self.tensors, "f32") as started:
            for peer in started.first["peers"]:
                for boundary in peer["boundaries"]:
                    request = {"time": peer["name"], "boundary": boundary, "samples": 3}
                    reply = started.ask(request)
                    self.assertEqual(len(reply["seconds"]), 3, reply)
                    self.assertTrue(all(0 < seconds < 10 for seconds in reply["seconds"]))
                    self.assertEqual((reply["launch"], reply["cache"]), ("eager", "warm"))
            reply = started.ask({"time": "torch-bmm", "boundary": layers.GEMM, "samples": 1})
            self.assertIn("a ceiling, not a layer", reply["note"])
            request = {"time": "triton-fused-moe", "boundary": layers.GEMM, "samples": 1}
            self.assertEqual(started.ask(request)["note"], "interpreted")

    def test_what_cannot_be_served_is_an_error_and_no_end(self):
        time = {"time": "torch-loop", "boundary": layers.GEMM, "samples": 1}
        wrong = [
            ("{", "not JSON"),
            ("[]", "a request has"),
            ("null", "a request has"),
            ({}, "a request has"),
            ({"check": "torch-loop", "more": 1}, "a request has"),
            ({"check": "nobody"}, "there is no peer 'nobody'"),
            ({"check": None}, "there is no peer None"),
            ({"check": ["torch-loop"]}, "there is no peer"),
            (time | {"time": "moe-kernels"}, "there is no peer"),
            (time | {"boundary": "combine"}, "no boundary 'combine'"),
            (time | {"time": "torch-bmm", "boundary": layers.FROM_X}, "no boundary"),
            (time | {"samples": 0}, "samples are from 1"),
            (time | {"samples": 1.5}, "samples are from 1"),
            (time | {"samples": True}, "samples are from 1"),
            (time | {"samples": 10**6}, "samples are from 1"),
        ]
        with program(self.tensors, "f32") as started:
            for request, said in wrong:
                with self.subTest(request):
                    reply = started.ask(request)
                    self.assertEqual(list(reply), ["error"])
                    self.assertIn(said, reply["error"])
            self.assertIn("relative_error", started.ask({"check": "torch-loop"}))
        self.assertEqual((started.code, started.errors), (0, ""))

    def test_a_file_that_is_no_layer_is_refused(self):
        def without(name):
            return {key: tensor for key, tensor in self.tensors.items() if key != name}

        def with_(**changed):
            return self.tensors | changed

        ids = self.tensors["expert_ids"]
        wrong = [
            (without("down"), {}, "tensor 'down' is missing"),
            (with_(gate_up=torch.zeros(4, 64, 65)), {}, "tensor 'gate_up' has shape [4, 64, 65]"),
            (with_(y=torch.zeros(12, 64, 1)), {}, "tensor 'y' has shape"),
            (with_(x=torch.zeros(0, 64)), {}, "tensor 'x' has shape"),
            (with_(gate=torch.zeros(4, 64).half()), {}, "tensor 'gate' is torch.float16"),
            (with_(expert_ids=ids + 4), {}, "an expert outside 0..4"),
            (with_(expert_ids=ids * 0), {}, "an expert twice"),
            (self.tensors, {"dtype": "f64"}, "metadata 'dtype' is 'f64'"),
            (self.tensors, {"renormalize": "no"}, "metadata 'renormalize' is 'no', not true or"),
            (self.tensors, {"renormalize": None}, "metadata 'renormalize' is None, not true or"),
        ]
        for tensors, metadata, said in wrong:
            with self.subTest(said), tempfile.TemporaryDirectory() as folder:
                path = Path(folder) / "layer.safetensors"
                write(path, tensors, **({"dtype": "f32"} | metadata))
                with self.assertRaisesRegex(InputError, re.escape(said)):
                    layers.read(path)
        with program(without("down"), "f32") as started:
            error = "tensor 'down' is missing"
            self.assertEqual(started.first, {"peers": [], "unavailable": [], "error": error})
        self.assertEqual((started.code, started.errors), (2, ""))

    def test_a_file_that_is_no_file_is_refused(self):
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "layer.safetensors"
            for content in (None, b"", b"no safetensors at all"):
                if content is not None:
                    path.write_bytes(content)
                with self.assertRaisesRegex(InputError, str(path)):
                    layers.read(path)
            started = Program(path)
            self.assertIn(str(path), started.first["error"])
            self.assertEqual(started.end(), (2, ""))

    def test_without_torch_every_peer_is_unavailable(self):
        with tempfile.TemporaryDirectory() as folder:
            Path(folder, "torch.py").write_text("raise ImportError('No module named torch')")
            with program(self.tensors, "f32", env={"PYTHONPATH": first_in_path(folder)}) as started:
                self.assertEqual(started.first["peers"], [])
                why = {each["why"] for each in started.first["unavailable"]}
                self.assertEqual(why, {"No module named torch"})
                self.assertIn(
                    "No module named torch", started.ask({"check": "torch-loop"})["error"]
                )
            self.assertEqual((started.code, started.errors), (0, ""))

    def test_what_libraries_print_is_no_reply(self):
        with tempfile.TemporaryDirectory() as folder:
            prints = "import os; print('from python', flush=True); os.write(1, b'from C')"
            Path(folder, "deep_gemm.py").write_text(prints + "; raise ImportError('broken')")
            with program(self.tensors, "f32", env={"PYTHONPATH": first_in_path(folder)}) as started:
                why = {each["name"]: each["why"] for each in started.first["unavailable"]}
                self.assertEqual(why["deepgemm"], "broken")
            self.assertEqual((started.code, started.errors), (0, "from python\nfrom C"))

    def test_without_the_interpreter_triton_needs_cuda(self):
        with program(self.tensors, "f32", env={"TRITON_INTERPRET": "0"}) as started:
            why = {each["name"]: each["why"] for each in started.first["unavailable"]}
            self.assertIn("no CPU backend", why["triton-fused-moe"])


@unittest.skipUnless("MOE_PEER_CANDLE" in os.environ, "MOE_PEER_CANDLE names no program")
class Candle(unittest.TestCase):
    def start(self, tensors, dtype, **options):
        return program(tensors, dtype, command=[os.environ["MOE_PEER_CANDLE"]], **options)

    def test_candle_is_right_in_every_case(self):
        for name, sizes, dtype, logits_by, renormalize in CASES:
            with self.subTest(name=name, sizes=sizes, dtype=dtype, renormalize=renormalize):
                tensors = tensors_of(sizes, dtype, logits_by, renormalize)
                with self.start(tensors, dtype, renormalize=renormalize) as started:
                    self.assertEqual(started.first["peers"][0]["boundaries"], BOUNDARIES)
                    reply = started.ask({"check": "candle"})
                    self.assertLessEqual(reply["relative_error"], TOLERANCE[dtype], reply)
                self.assertEqual((started.code, started.errors), (0, ""))

    def test_nan_never_passes(self):
        tensors = tensors_of((9, 64, 32, 4, 4), "f32", "x")
        tensors["down"][1] = float("nan")
        with self.start(tensors, "f32") as started:
            self.assertIn("NaN", started.ask({"check": "candle"})["error"])

    def test_requests(self):
        tensors = tensors_of((12, 64, 32, 4, 2), "bf16", "x")
        time = {"time": "candle", "boundary": layers.GEMM, "samples": 3}
        with self.start(tensors, "bf16") as started:
            for boundary in BOUNDARIES:
                reply = started.ask(time | {"boundary": boundary})
                self.assertEqual(len(reply["seconds"]), 3)
                self.assertIn("f32", reply["note"])
            for request, said in [
                ("{", "not a request"),
                ({"check": "nobody"}, "there is no peer 'nobody'"),
                ({"check": "candle-fused"}, "unavailable"),
                (time | {"boundary": "combine"}, "no boundary 'combine'"),
                (time | {"samples": 0}, "samples are from 1"),
            ]:
                self.assertIn(said, started.ask(request)["error"])
        for changed, said in [
            ({"down": torch.zeros(4, 64, 31).bfloat16()}, "'down'"),
            ({"logits": torch.zeros(12, 4)}, "'logits'"),
        ]:
            with self.start(tensors | changed, "bf16") as started:
                self.assertIn(said, started.first["error"])
        for renormalize in (None, "no"):
            with self.start(tensors, "bf16", renormalize=renormalize) as started:
                self.assertIn("'renormalize' is", started.first["error"])


if __name__ == "__main__":
    unittest.main()
