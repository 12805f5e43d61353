"""Tests of the code that needs a GPU, with a stand-in for it: clocks, graphs, and the search."""

import contextlib
import sys
import tempfile
import time
import types
import unittest
from pathlib import Path
from unittest import mock

sys.path.insert(0, str(Path(__file__).resolve().parent))

import torch

import timing
import triton_tuning
from layer import COLD_BYTES
from triton_tuning import SPACE, Config

MILLISECOND = 1e-3


class Gpu:
    """A clock that calls advance, a graph that records them, and events that read the clock."""

    def __init__(self, breaks_capture=False):
        self.now, self.graph, self.turns = 0.0, None, []
        gpu = self

        class Event:
            def __init__(self, enable_timing):
                assert enable_timing

            def record(self):
                self.at = gpu.now

            def synchronize(self):
                pass

            def elapsed_time(self, end):
                return (end.at - self.at) * 1e3

        class Graph(list):
            def replay(self):
                for run in self:
                    run()

        @contextlib.contextmanager
        def capture(graph, stream):
            if breaks_capture:
                raise RuntimeError("operation not permitted when stream is capturing\nmore")
            self.graph = self.captured = graph
            yield
            self.graph = None

        stream = types.SimpleNamespace(wait_stream=lambda other: None)
        self.patch = mock.patch.multiple(
            torch.cuda,
            Event=Event,
            CUDAGraph=Graph,
            graph=capture,
            Stream=lambda: stream,
            current_stream=lambda: stream,
            stream=lambda stream: contextlib.nullcontext(),
            synchronize=lambda: None,
        )

    def runs(self, count, seconds):
        def run(turn):
            if self.graph is not None:
                self.graph.append(lambda: run(turn))
            else:
                self.now += seconds
                self.turns.append(turn)

        return [lambda turn=turn: run(turn) for turn in range(count)]

    def time(self, count, tokens, active_bytes, graph=True, seconds=MILLISECOND):
        device = types.SimpleNamespace(type="cuda")
        layer = types.SimpleNamespace(
            device=device, tokens=tokens, active_bytes=lambda: active_bytes
        )
        filler = types.SimpleNamespace(random_=lambda *range: self.turns.append("flush"))
        with self.patch, mock.patch.object(torch, "empty", lambda *all, **more: filler):
            return timing.time_calls(self.runs(count, seconds), layer, graph, 3, 0.001)


class Clocks(unittest.TestCase):
    def near(self, reply, seconds):
        self.assertEqual(len(reply["seconds"]), 3)
        for each in reply["seconds"]:
            self.assertAlmostEqual(each, seconds, delta=seconds * 1e-6)

    def test_a_cpu_is_timed_per_call(self):
        for seconds in (0.001, 0.02):
            for each in timing.on_cpu(lambda: time.sleep(seconds), 2):
                self.assertGreaterEqual(each, seconds)
                self.assertLess(each, seconds + 0.05)

    def test_few_tokens_replay_a_graph_over_all_copies(self):
        gpu = Gpu()
        reply = gpu.time(3, 512, COLD_BYTES // 3 + 1)
        self.near(reply, MILLISECOND)
        self.assertEqual((reply["launch"], reply["cache"], reply["note"]), ("graph", "cold", None))
        self.assertNotIn("flush", gpu.turns)
        # The least multiple of the number of copies that is at least 20.
        self.assertEqual(len(gpu.captured), 21)
        self.assertEqual(gpu.turns[-21:], [0, 1, 2] * 7)

    def test_copies_that_fit_in_a_cache_are_warm(self):
        self.assertEqual(Gpu().time(1, 8, COLD_BYTES // 2)["cache"], "warm")

    def test_many_tokens_are_eager_after_a_flush(self):
        gpu = Gpu()
        reply = gpu.time(2, 513, 1)
        self.near(reply, MILLISECOND)
        self.assertEqual((reply["launch"], reply["cache"]), ("eager", "cold"))
        self.assertEqual(set(gpu.turns[::2]), {"flush"})
        self.assertEqual(set(gpu.turns[1::2]), {0, 1})

    def test_calls_that_cannot_be_captured_are_eager(self):
        reply = Gpu(breaks_capture=True).time(1, 8, COLD_BYTES)
        self.near(reply, MILLISECOND)
        self.assertEqual(reply["launch"], "eager")
        why = "RuntimeError: operation not permitted when stream is capturing"
        self.assertEqual(reply["note"], f"no graph: {why}")
        self.assertEqual(Gpu().time(1, 8, COLD_BYTES, graph=False)["launch"], "eager")


class Search(unittest.TestCase):
    """The search over an artificial cost whose minimum is not at the start."""

    best = Config(block_m=64, block_n=128, block_k=128, group_m=8, warps=8, stages=4)

    def setUp(self):
        ids = torch.arange(64) % 8
        layer = types.SimpleNamespace(expert_ids=ids, device=None, dtype=torch.bfloat16)
        self.peer = types.SimpleNamespace(layer=layer)
        memory = mock.patch.object(triton_tuning, "shared_memory", lambda device: 227 << 10)
        memory.start()
        self.addCleanup(memory.stop)

    def cost(self, _, config):
        wrong = sum(getattr(config, field) != getattr(self.best, field) for field in SPACE)
        return float("inf") if config.stages == 5 else 1.0 + wrong

    def search(self, seconds):
        with mock.patch.object(triton_tuning, "median", side_effect=self.cost) as asked:
            return triton_tuning.search(self.peer, seconds), asked.call_count

    def test_a_search_with_enough_time_covers_the_space(self):
        found, asked = self.search(60)
        self.assertEqual(Config(**found["config"]), self.best)
        # The tiles of the other 42 of 432 exceed a block's shared memory.
        self.assertEqual((found["tried"], found["complete"], asked), (390, True, 390))

    def test_a_search_out_of_time_returns_its_start(self):
        found, asked = self.search(0)
        self.assertEqual((found["tried"], found["complete"], asked), (1, False, 1))
        self.assertEqual(found["config"]["block_m"], 16)

    def test_no_configuration_that_runs_is_an_error(self):
        with mock.patch.object(triton_tuning, "median", return_value=float("inf")):
            with self.assertRaises(RuntimeError):
                triton_tuning.search(self.peer, 0)

    def test_the_best_configuration_is_cached(self):
        found = {"config": vars(self.best), "seconds": 1.0, "tried": 7, "complete": False}
        with tempfile.TemporaryDirectory() as folder:
            folder = Path(folder) / "cache"
            with mock.patch.object(triton_tuning, "name", lambda layer: "a device and shape"):
                for _ in range(2):
                    with mock.patch.object(triton_tuning, "search", return_value=found) as search:
                        config, note = triton_tuning.tuned(self.peer, folder, 1)
                    self.assertEqual(config, self.best)
                    self.assertEqual(note, "best of 7 configurations, out of time")
            self.assertEqual(search.call_count, 0)
            self.assertEqual([path.name for path in folder.iterdir()], ["triton-fused-moe.json"])


if __name__ == "__main__":
    unittest.main()
