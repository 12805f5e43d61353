"""Tests of the peers on the CPU, with torch and triton: `python -m unittest test_peers`.

Triton's kernels are interpreted.
"""

import dataclasses
import itertools
import math
import os
import subprocess
import sys
import tempfile
import types
import unittest
from pathlib import Path
from unittest import mock

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))

from peer_cases import (
    BOUNDARIES,
    CASES,
    ON_CPU,
    TOLERANCE,
    assert_right,
    layer_of,
    program,
    tensors_of,
)

import torch

import adapters
import cublas_grouped
import truth
from errors import Wrong


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
        for name, alter, message in [
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
                if message:
                    self.assertIn(message, reply["error"])
                else:
                    self.assertGreater(reply["relative_error"], 1e-2)

    def test_nan_in_weights_is_an_error(self):
        tensors = tensors_of((9, 64, 32, 4, 4), "f32", "x")
        tensors["down"][1] = float("nan")
        with program(tensors, "f32") as started:
            for peer in ["moe-kernels", *ON_CPU]:
                self.assertIn("error", started.ask({"check": peer}), peer)

    def test_a_wrong_result_fails_at_each_boundary(self):
        import torch_peers

        layer = layer_of((33, 64, 96, 8, 2), "f32")
        expected = truth.Truth(layer)
        peer = torch_peers.TorchGroupedMm(layer)
        rows = peer.rows
        for boundary in BOUNDARIES:
            right = expected.error(boundary, peer.call(boundary, layer.weights))
            self.assertLess(right, TOLERANCE["f32"])
            with mock.patch.object(peer, "rows", lambda *all: rows(*all).roll(1, 0)):
                wrong = expected.error(boundary, peer.call(boundary, layer.weights))
            self.assertGreater(wrong, 0.1)
            with mock.patch.object(peer, "rows", lambda *all: rows(*all) * float("nan")):
                with self.assertRaises(Wrong):
                    expected.error(boundary, peer.call(boundary, layer.weights))

    def test_ignoring_renormalize_is_wrong(self):
        import torch_peers

        sizes = (33, 64, 96, 8, 2)
        for stated, other in itertools.permutations(("true", "false")):
            tensors = tensors_of(sizes, "f32", "x", other)
            with program(tensors, "f32", renormalize=stated) as started:
                self.assertGreater(started.ask({"check": "moe-kernels"})["relative_error"], 0.1)
            layer = layer_of(sizes, "f32", renormalize=stated)
            expected = truth.Truth(layer)
            peer = torch_peers.TorchLoop(dataclasses.replace(layer, renormalize=other == "true"))
            for boundary in BOUNDARIES[1:]:
                error = expected.error(boundary, peer.call(boundary, layer.weights))
                self.assertGreater(error, 0.1, (boundary, stated))

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
    """The call of cuBLAS, with a stand-in that follows cuBLAS' manual on the CPU."""

    def test_arguments_follow_the_manual(self):
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
    """Adapters with stand-ins for their packages."""

    def test_deepgemm_gets_padded_groups(self):
        def product(a, b, c, expert_of_row):
            c.fill_(float("nan"))
            self.assertEqual(len(a) % 128, 0)
            for start in range(0, len(a), 128):
                block = expert_of_row[start : start + 128]
                used = block[block >= 0]
                self.assertTrue((used == block[0]).all(), "a block has two experts")
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
            # As in the package: the softmax over the selected, or over all without renormalising.
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

    def test_only_loads_the_listed_peers(self):
        command = (sys.executable, HERE / "peers.py", "--only", "torch-loop,deepgemm")
        tensors = tensors_of((4, 64, 32, 4, 2), "f32", "x")
        with program(tensors, "f32", command=command) as started:
            self.assertEqual([each["name"] for each in started.first["peers"]], ["torch-loop"])
            absent = [each["name"] for each in started.first["unavailable"]]
            self.assertEqual(absent, ["deepgemm"])
            self.assertIn("--only", started.ask({"check": "torch-bmm"})["error"])

if __name__ == "__main__":
    unittest.main()
