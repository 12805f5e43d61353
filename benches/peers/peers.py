#!/usr/bin/env python3
"""Runs the peers of moe-kernels' benches: replies to JSON requests on stdin, one a line.

README.md in this folder describes the peers and the protocol.
"""

import argparse
import importlib
import json
import os
import sys
from pathlib import Path

from errors import RequestError, brief

# The module and the class of each peer. A module is imported only for its peer, so that a missing
# package makes only that peer unavailable.
PEERS = {
    "torch-loop": ("torch_peers", "TorchLoop"),
    "torch-bmm": ("torch_peers", "TorchBmm"),
    "torch-grouped-mm": ("torch_peers", "TorchGroupedMm"),
    "triton-fused-moe": ("triton_fused_moe", "TritonFusedMoe"),
    "cublas-grouped": ("cublas_grouped", "CublasGrouped"),
    "deepgemm": ("adapters", "DeepGemm"),
    "scattermoe": ("adapters", "ScatterMoe"),
    "sonicmoe": ("adapters", "SonicMoe"),
}
OURS = "moe-kernels"
MOST_SAMPLES = 1000


class Server:
    """The peers that can run on this machine, with one input file."""

    def __init__(self, device, path, cache, tuning_seconds, only=PEERS):
        import torch

        import layer
        import truth

        if device == "cuda" and not torch.cuda.is_available():
            raise RequestError("torch finds no CUDA device")
        torch.set_grad_enabled(False)
        on_cpu = layer.read(path)
        self.layer = on_cpu.to(device)
        self.truth = truth.Truth(on_cpu)
        self.tuning = cache, tuning_seconds
        self.peers, self.unavailable = {}, {}
        for name in only:
            try:
                self.peers[name] = self.make(name)
            except Exception as error:
                self.unavailable[name] = brief(error)

    def make(self, name):
        module, kind = PEERS[name]
        kind = getattr(importlib.import_module(module), kind)
        return kind(self.layer, *self.tuning) if name == "triton-fused-moe" else kind(self.layer)

    def greeting(self):
        return {
            "peers": [
                {"name": name, "version": peer.version, "boundaries": list(peer.boundaries)}
                for name, peer in self.peers.items()
            ],
            "unavailable": [{"name": name, "why": why} for name, why in self.unavailable.items()],
            "checks": [OURS],
        }

    def answer(self, line):
        """Returns the reply to a request."""
        try:
            request = json.loads(line)
        except ValueError as error:
            raise RequestError(f"not JSON: {error}") from error
        keys = set(request) if isinstance(request, dict) else None
        if keys == {"check"}:
            return {"relative_error": self.check(request["check"])}
        if keys == {"time", "boundary", "samples"}:
            return self.time(request["time"], request["boundary"], request["samples"])
        raise RequestError("a request has 'check' alone, or 'time', 'boundary' and 'samples'")

    def check(self, name):
        """Returns the largest relative error over the peer's boundaries."""
        if name == OURS:
            return self.truth.error_of_file()
        peer = self.peer(name)
        weights = self.layer.weights
        return max(self.truth.error(each, peer.call(each, weights)) for each in peer.boundaries)

    def time(self, name, boundary, samples):
        import timing

        peer = self.peer(name)
        if boundary not in peer.boundaries:
            has = ", ".join(f"'{each}'" for each in peer.boundaries)
            raise RequestError(f"{name} has no boundary {boundary!r}, only {has}")
        if type(samples) is not int or not 1 <= samples <= MOST_SAMPLES:
            raise RequestError(f"samples are from 1 to {MOST_SAMPLES}, not {samples!r}")
        runs = [peer.call(boundary, weights).run for weights in self.layer.cold_weights]
        reply = timing.time_calls(runs, self.layer, peer.graph, samples)
        notes = [note for note in (peer.note, reply["note"]) if note]
        return reply | {"note": "; ".join(notes) or None}

    def peer(self, name):
        if not isinstance(name, str) or name not in PEERS:
            raise RequestError(f"unknown peer {name!r}")
        if name not in self.peers:
            why = self.unavailable.get(name, "not listed in --only")
            raise RequestError(f"{name} is unavailable: {why}")
        return self.peers[name]


class UnavailableServer:
    """Replies if torch or safetensors is missing: every peer is unavailable."""

    def __init__(self, why, only):
        self.why, self.only = why, only

    def greeting(self):
        return {"peers": [], "unavailable": [{"name": name, "why": self.why} for name in self.only]}

    def answer(self, line):
        raise RequestError(self.why)


def serve(server, send):
    send(server.greeting())
    for line in sys.stdin:
        if not line.strip():
            continue
        try:
            send(server.answer(line))
        except Exception as error:
            send({"error": brief(error)})


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), required=True)
    parser.add_argument("--inputs", required=True, metavar="FILE.safetensors")
    parser.add_argument(
        "--cache",
        metavar="DIR",
        help="folder of the Triton peer's best configurations (default: the folder of the inputs)",
    )
    parser.add_argument(
        "--tuning-seconds",
        type=float,
        default=30,
        metavar="S",
        help="time limit of the Triton peer's search for one shape (default: 30)",
    )
    parser.add_argument(
        "--only",
        type=lambda names: names.split(","),
        default=list(PEERS),
        metavar="NAMES",
        help="peers to load, separated by commas (default: all)",
    )
    arguments = parser.parse_args()
    unknown = set(arguments.only) - set(PEERS)
    if unknown:
        parser.error(f"unknown peer {', '.join(sorted(unknown))}")

    # Replies alone go to the program's stdout. The output of libraries, from Python and from C, is
    # redirected to stderr.
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)

    def send(message):
        print(json.dumps(message), file=replies, flush=True)

    cache = Path(arguments.cache or Path(arguments.inputs).parent)
    try:
        seconds, only = arguments.tuning_seconds, arguments.only
        server = Server(arguments.device, arguments.inputs, cache, seconds, only)
    except ImportError as error:
        server = UnavailableServer(str(error), arguments.only)
    except Exception as error:
        send({"peers": [], "unavailable": [], "error": brief(error)})
        return 2
    serve(server, send)
    return 0


if __name__ == "__main__":
    sys.exit(main())
