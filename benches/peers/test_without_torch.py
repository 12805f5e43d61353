"""Tests that need neither torch nor a GPU, which CI runs: `python -m unittest test_without_torch`.

The program's protocol where torch is missing; and, with stand-ins, the clocks, graphs and search of test_timing.py.
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
# Test cases of another file run here as well.
from test_timing import Clocks, Search  # noqa: F401


class Errors(unittest.TestCase):
    def test_an_error_is_one_line(self):
        for kind in (InputError, RequestError, Unavailable, Wrong, ImportError):
            self.assertEqual(brief(kind("said\nmore")), "said")
        self.assertEqual(brief(ValueError("said\nmore")), "ValueError: said")
        self.assertEqual(brief(ValueError()), "ValueError: ")
        self.assertEqual(len(brief(RuntimeError("x" * 1000))), len("RuntimeError: ") + 300)


class WithoutTorch(unittest.TestCase):
    """The program beside a torch that cannot be imported."""

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
        # An empty line is no request.
        self.assertEqual(replies, [{"error": why}] * 3)

    def test_arguments_that_do_not_fit(self):
        for words, said in [
            ([], "--device"),
            (["--device", "tpu", "--inputs", "x"], "invalid choice: 'tpu'"),
            (["--device", "cpu"], "--inputs"),
            (["--device", "cpu", "--inputs", "x", "--tuning-seconds", "y"], "--tuning-seconds"),
        ]:
            done = self.run_it(*words)
            self.assertEqual((done.returncode, done.stdout), (2, ""), words)
            self.assertIn(said, done.stderr)


class StandIns(unittest.TestCase):
    def test_what_is_not_played_fails(self):
        import torch

        with self.assertRaises(AssertionError):
            torch.empty(3)
        with contextlib.suppress(AttributeError):
            torch.matmul
            self.fail("a stand-in has a product")


if __name__ == "__main__":
    unittest.main()
