"""Tests without torch and without a GPU: `python -m unittest test_without_torch`.

They check the program's protocol without torch and, with stand-ins, the tests of test_timing.py.
"""

import contextlib
import json
import os
import subprocess
import sys
import tempfile
import unittest
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))

import stand_ins

stand_ins.install()

from errors import InputError, RequestError, Unavailable, Wrong, brief
from peers import PEERS
# unittest runs the imported test cases too.
from test_timing import Clocks, Search  # noqa: F401


class Errors(unittest.TestCase):
    def test_an_error_is_one_line(self):
        for kind in (InputError, RequestError, Unavailable, Wrong, ImportError):
            self.assertEqual(brief(kind("said\nmore")), "said")
        self.assertEqual(brief(ValueError("said\nmore")), "ValueError: said")
        self.assertEqual(brief(ValueError()), "ValueError: ")
        self.assertEqual(len(brief(RuntimeError("x" * 1000))), len("RuntimeError: ") + 300)


class WithoutTorch(unittest.TestCase):
    """The program with a torch that cannot be imported."""

    def setUp(self):
        scratch = tempfile.TemporaryDirectory()
        self.addCleanup(scratch.cleanup)
        self.folder = Path(scratch.name)
        (self.folder / "torch.py").write_text("raise ImportError('No module named torch')")

    def run_it(self, *words, requests=""):
        environment = os.environ | {"PYTHONPATH": str(self.folder)}
        command = [sys.executable, HERE / "peers.py", *words]
        return subprocess.run(
            command, input=requests, env=environment, capture_output=True, text=True
        )

    def test_every_peer_is_unavailable(self):
        inputs = str(self.folder / "layer.safetensors")
        requests = ['{"check": "torch-loop"}', "", "not JSON", '{"time": "candle"}']
        done = self.run_it("--device", "cpu", "--inputs", inputs, requests="\n".join(requests))
        self.assertEqual((done.returncode, done.stderr), (0, ""))
        first, *replies = map(json.loads, done.stdout.splitlines())
        why = "No module named torch"
        self.assertEqual(first["peers"], [])
        self.assertEqual(first["unavailable"], [{"name": name, "why": why} for name in PEERS])
        # Empty lines are ignored.
        self.assertEqual(replies, [{"error": why}] * 3)

    def test_rejects_invalid_arguments(self):
        for words, message in [
            ([], "--device"),
            (["--device", "tpu", "--inputs", "x"], "invalid choice: 'tpu'"),
            (["--device", "cpu"], "--inputs"),
            (["--device", "cpu", "--inputs", "x", "--tuning-seconds", "y"], "--tuning-seconds"),
        ]:
            done = self.run_it(*words)
            self.assertEqual((done.returncode, done.stdout), (2, ""), words)
            self.assertIn(message, done.stderr)


class StandIns(unittest.TestCase):
    def test_missing_functions_fail(self):
        import torch

        with self.assertRaises(AssertionError):
            torch.empty(3)
        with contextlib.suppress(AttributeError):
            torch.matmul
            self.fail("the stand-in for torch has a product")


if __name__ == "__main__":
    unittest.main()
