"""Measures the seconds of a call: CUDA events and graphs with cold weights, or the CPU's clock."""

import itertools
import math
import time

import torch

from errors import brief
from layer import COLD_BYTES

# The most tokens of a call that is replayed from a graph: with so few, launches cost as much as
# kernels.
GRAPH_TOKENS = 512
GRAPH_CALLS = 20
# A sample repeats a short call until it lasts about this long.
SAMPLE_SECONDS = 0.01
MOST_CALLS = 100


def time_calls(runs, layer, graph, samples, warm_up_seconds=0.2):
    """Returns the reply for `samples` timings of `runs`, which have a copy of the weights each."""
    if layer.device.type != "cuda":
        seconds = on_cpu(runs[0], samples)
        return {"seconds": seconds, "launch": "eager", "cache": "warm", "note": None}
    note = None
    cold = len(runs) * layer.active_bytes() >= COLD_BYTES
    if graph and layer.tokens <= GRAPH_TOKENS:
        try:
            seconds = captured(runs, samples, warm_up_seconds)
            cache = "cold" if cold else "warm"
            return {"seconds": seconds, "launch": "graph", "cache": cache, "note": None}
        except Exception as error:
            torch.cuda.synchronize()
            note = f"no graph: {brief(error)}"
    seconds = eager(runs, samples, warm_up_seconds)
    return {"seconds": seconds, "launch": "eager", "cache": "cold", "note": note}


def on_cpu(run, samples):
    run()
    start = time.perf_counter()
    run()
    calls = calls_per_sample(time.perf_counter() - start)

    def sample():
        start = time.perf_counter()
        for _ in range(calls):
            run()
        return (time.perf_counter() - start) / calls

    return [sample() for _ in range(samples)]


def captured(runs, samples, warm_up_seconds):
    """Times replays of a graph that has the call of every copy equally often."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for run in runs:
            run()
    torch.cuda.synchronize()
    rounds = math.ceil(GRAPH_CALLS / len(runs))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        for run in list(runs) * rounds:
            run()
    warm_up(graph.replay, warm_up_seconds)
    calls = len(runs) * rounds
    return [elapsed(graph.replay) / calls for _ in range(samples)]


def eager(runs, samples, warm_up_seconds):
    """Times each call between two events, after overwriting L2 with other bytes."""
    filler = torch.empty(COLD_BYTES, dtype=torch.uint8, device="cuda")
    turn = itertools.cycle(runs)

    def once():
        filler.random_(0, 255)
        return elapsed(next(turn))

    warm_up(once, warm_up_seconds)
    calls = calls_per_sample(once())
    return [sum(once() for _ in range(calls)) / calls for _ in range(samples)]


def elapsed(run):
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    run()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3


def warm_up(run, seconds):
    start = time.perf_counter()
    while time.perf_counter() - start < seconds:
        run()
        torch.cuda.synchronize()


def calls_per_sample(seconds):
    return max(1, min(MOST_CALLS, math.ceil(SAMPLE_SECONDS / max(seconds, 1e-9))))
