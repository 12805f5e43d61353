"""Tests of the peer programs' protocol on the CPU, with torch: `python -m unittest test_protocol`.

If MOE_PEER_CANDLE is the path of candle's program, it is tested too.
"""

import os
import re
import sys
import tempfile
import unittest
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

from peer_cases import BOUNDARIES, CASES, ON_CPU, TOLERANCE, Program, program, tensors_of, write

import torch

import layer as layers
from errors import InputError


def first_in_path(folder):
    """PYTHONPATH with another folder in front. The rest is kept, since torch may be in it."""
    return os.pathsep.join([folder, *filter(None, [os.environ.get("PYTHONPATH")])])


class Protocol(unittest.TestCase):
    def setUp(self):
        self.tensors = tensors_of((12, 64, 32, 4, 2), "f32", "x")

    def test_the_first_line_lists_the_peers(self):
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

    def test_invalid_requests_are_errors_and_do_not_end_the_program(self):
        time = {"time": "torch-loop", "boundary": layers.GEMM, "samples": 1}
        wrong = [
            ("{", "not JSON"),
            ("[]", "a request has"),
            ("null", "a request has"),
            ({}, "a request has"),
            ({"check": "torch-loop", "more": 1}, "a request has"),
            ({"check": "other"}, "unknown peer 'other'"),
            ({"check": None}, "unknown peer None"),
            ({"check": ["torch-loop"]}, "unknown peer"),
            (time | {"time": "moe-kernels"}, "unknown peer"),
            (time | {"boundary": "combine"}, "no boundary 'combine'"),
            (time | {"time": "torch-bmm", "boundary": layers.FROM_X}, "no boundary"),
            (time | {"samples": 0}, "samples are from 1"),
            (time | {"samples": 1.5}, "samples are from 1"),
            (time | {"samples": True}, "samples are from 1"),
            (time | {"samples": 10**6}, "samples are from 1"),
        ]
        with program(self.tensors, "f32") as started:
            for request, message in wrong:
                with self.subTest(request):
                    reply = started.ask(request)
                    self.assertEqual(list(reply), ["error"])
                    self.assertIn(message, reply["error"])
            self.assertIn("relative_error", started.ask({"check": "torch-loop"}))
        self.assertEqual((started.code, started.errors), (0, ""))

    def test_rejects_a_file_without_a_valid_layer(self):
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
            (with_(router_gate=torch.zeros(4, 64).half()), {}, "'router_gate' is torch.float16"),
            (with_(expert_ids=ids + 4), {}, "an expert outside 0..4"),
            (with_(expert_ids=ids * 0), {}, "an expert twice"),
            (self.tensors, {"dtype": "f64"}, "metadata 'dtype' is 'f64'"),
            (self.tensors, {"renormalize": "no"}, "metadata 'renormalize' is 'no', not true or"),
            (self.tensors, {"renormalize": None}, "metadata 'renormalize' is None, not true or"),
        ]
        for tensors, metadata, message in wrong:
            with self.subTest(message), tempfile.TemporaryDirectory() as folder:
                path = Path(folder) / "layer.safetensors"
                write(path, tensors, **({"dtype": "f32"} | metadata))
                with self.assertRaisesRegex(InputError, re.escape(message)):
                    layers.read(path)
        with program(without("down"), "f32") as started:
            error = "tensor 'down' is missing"
            self.assertEqual(started.first, {"peers": [], "unavailable": [], "error": error})
        self.assertEqual((started.code, started.errors), (2, ""))

    def test_rejects_a_file_that_is_not_safetensors(self):
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "layer.safetensors"
            for content in (None, b"", b"not safetensors"):
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

    def test_output_of_libraries_goes_to_stderr(self):
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


@unittest.skipUnless("MOE_PEER_CANDLE" in os.environ, "MOE_PEER_CANDLE is not set")
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

    def test_nan_is_an_error(self):
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
            for request, message in [
                ("{", "not a request"),
                ({"check": "other"}, "unknown peer 'other'"),
                ({"check": "candle-fused"}, "unavailable"),
                (time | {"boundary": "combine"}, "no boundary 'combine'"),
                (time | {"samples": 0}, "samples are from 1"),
            ]:
                self.assertIn(message, started.ask(request)["error"])
        for changed, message in [
            ({"down": torch.zeros(4, 64, 31).bfloat16()}, "'down'"),
            ({"logits": torch.zeros(12, 4)}, "'logits'"),
        ]:
            with self.start(tensors | changed, "bf16") as started:
                self.assertIn(message, started.first["error"])
        for renormalize in (None, "no"):
            with self.start(tensors, "bf16", renormalize=renormalize) as started:
                self.assertIn("'renormalize' is", started.first["error"])


if __name__ == "__main__":
    unittest.main()
