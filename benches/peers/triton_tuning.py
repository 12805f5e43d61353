"""The search for the configuration of the Triton peer's products, and its cache."""

import itertools
import json
import random
import sys
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
import triton
import triton.errors

import timing
from errors import brief


@dataclass(frozen=True)
class Config:
    """The constants of one compilation of the product kernel, by default the search's start."""

    block_m: int = 16
    block_n: int = 64
    block_k: int = 64
    group_m: int = 1
    warps: int = 4
    stages: int = 3

    def stage_bytes(self, dtype):
        """The least shared memory of the tiles of A and B: one stage may be in registers."""
        tiles = (self.block_m + self.block_n) * self.block_k
        return (self.stages - 1) * tiles * dtype.itemsize


SPACE = {
    "block_m": (16, 32, 64, 128),
    "block_n": (64, 128, 256),
    "block_k": (64, 128),
    "group_m": (1, 8, 32),
    "warps": (4, 8),
    "stages": (3, 4, 5),
}


def tuned(peer, folder, seconds):
    """Returns the best configuration for the peer's layer, and a note on the search."""
    path = Path(folder) / "triton-fused-moe.json"
    known = json.loads(path.read_text()) if path.exists() else {}
    key = name(peer.layer)
    if key not in known:
        known[key] = search(peer, seconds)
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_suffix(".part")
        part.write_text(json.dumps(known, indent=1))
        part.replace(path)
    found = known[key]
    note = f"best of {found['tried']} configurations"
    return Config(**found["config"]), note if found["complete"] else f"{note}, out of time"


def name(layer):
    """Returns the cache key: all that the best configuration depends on."""
    device = torch.cuda.get_device_name(layer.device)
    shape = f"T{layer.tokens}H{layer.hidden}I{layer.intermediate}E{layer.experts}K{layer.top_k}"
    active = layer.expert_ids.unique().numel()
    return f"{device}, triton {triton.__version__}, {shape}, {active} active, {layer.dtype}"


def shared_memory(device):
    """Returns the most bytes of shared memory of a block."""
    return torch.cuda.get_device_properties(device).shared_memory_per_block_optin


def search(peer, seconds):
    """Descends along one parameter after the other, then tries the rest until time is up."""
    end = time.monotonic() + seconds
    every = (Config(**dict(zip(SPACE, values))) for values in itertools.product(*SPACE.values()))
    # Configurations that cannot fit are not compiled, which takes a minute for large tiles.
    limit = shared_memory(peer.layer.device)
    rest = [config for config in every if config.stage_bytes(peer.layer.dtype) <= limit]
    random.Random(0).shuffle(rest)
    measured = {}

    def measure(config):
        if config not in rest:
            return float("inf")
        if config not in measured:
            measured[config] = median(peer, config)
        return measured[config]

    # The search starts at the block size that the mean expert fills.
    mean = peer.layer.expert_ids.numel() / peer.layer.expert_ids.unique().numel()
    best = replace(Config(), block_m=next((m for m in SPACE["block_m"] if m >= mean), 128))
    measure(best)
    left = True
    while left:
        before = best
        for field, values in SPACE.items():
            for config in (replace(best, **{field: value}) for value in values):
                if time.monotonic() < end and measure(config) < measure(best):
                    best = config
        left = best != before
    for config in rest:
        if time.monotonic() < end:
            measure(config)
    best = min(measured, key=measured.get)
    if measured[best] == float("inf"):
        raise RuntimeError("no configuration of the Triton product runs here")
    return {
        "config": asdict(best),
        "seconds": measured[best],
        "tried": len(measured),
        "complete": len(measured) == len(rest),
    }


def median(peer, config):
    """Returns the seconds of both products; infinity if `config` does not compile or fit."""
    peer.config = config
    try:
        runs = [peer.products(weights).run for weights in peer.layer.cold_weights]
        runs[0]()
        torch.cuda.synchronize()
        reply = timing.time_calls(runs, peer.layer, True, samples=3, warm_up_seconds=0.02)
        return sorted(reply["seconds"])[1]
    except (triton.errors.TritonError, RuntimeError) as error:
        print(f"{config}: {brief(error)}", file=sys.stderr)
        return float("inf")
