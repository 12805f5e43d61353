"""The layer and the input of an input file, and the boundaries of the measurements."""

import math
from dataclasses import dataclass
from functools import cached_property
from typing import Callable, NamedTuple

import torch
from safetensors import safe_open

from errors import InputError

GEMM = "GEMM alone"
FROM_LOGITS = "layer from logits"
FROM_X = "layer from x with the router"

# Reads of as many other bytes evict a weight from L2, which has 50 to 126 MB today.
COLD_BYTES = 256 << 20

RENORMALIZE = {"true": True, "false": False}
DTYPES = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}


class Weights(NamedTuple):
    """The weights of a layer on the device. A benchmark may have several copies."""

    router_gate: torch.Tensor  # [E, H]
    gate_up: torch.Tensor  # [E, 2I, H], the rows of the gate first
    down: torch.Tensor  # [E, H, I]


@dataclass
class Layer:
    """The tensors of the input file, on one device."""

    x: torch.Tensor  # [T, H]
    logits: torch.Tensor  # [T, E]
    weights: Weights
    expert_ids: torch.Tensor  # [T, K], int64
    expert_weights: torch.Tensor  # [T, K], f32
    y: torch.Tensor  # [T, H], by moe-kernels
    renormalize: bool  # whether the routing weights of a token are divided by their sum

    @property
    def tokens(self):
        return self.x.shape[0]

    @property
    def hidden(self):
        return self.x.shape[1]

    @property
    def intermediate(self):
        return self.weights.down.shape[2]

    @property
    def experts(self):
        return self.logits.shape[1]

    @property
    def top_k(self):
        return self.expert_ids.shape[1]

    @property
    def dtype(self):
        return self.x.dtype

    @property
    def device(self):
        return self.x.device

    def active_bytes(self):
        """Bytes of the weights that one call reads: those of experts with a row."""
        active = self.expert_ids.unique().numel()
        return active * 3 * self.hidden * self.intermediate * self.dtype.itemsize

    @cached_property
    def cold_weights(self):
        """Copies of the weights that calls use in turn, so that no call finds them in a cache.

        On a CPU there is one copy, and the caches are warm.
        """
        wanted = 1
        if self.device.type == "cuda":
            free, _ = torch.cuda.mem_get_info(self.device)
            each = sum(tensor.nbytes for tensor in self.weights)
            # Half of the free memory is left for the calls' own allocations.
            wanted = min(math.ceil(COLD_BYTES / self.active_bytes()), 1 + int(free / 2 / each))
        copy = lambda: Weights(*(tensor.clone() for tensor in self.weights))
        return [self.weights] + [copy() for _ in range(wanted - 1)]

    def to(self, device):
        return Layer(
            self.x.to(device),
            self.logits.to(device),
            Weights(*(tensor.to(device) for tensor in self.weights)),
            self.expert_ids.to(device),
            self.expert_weights.to(device),
            self.y.to(device),
            self.renormalize,
        )


@dataclass
class Call:
    """A computation that is ready to run, and the token and expert of each row of its result.

    `token` and `expert` are set at "GEMM alone", where each peer has its own order of rows. A row
    with a negative token is padding.
    """

    run: Callable[[], torch.Tensor]
    token: torch.Tensor | None = None
    expert: torch.Tensor | None = None


def read(path):
    """Reads a layer to the CPU and checks every name, shape and dtype."""
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}
    except Exception as error:
        raise InputError(f"{path}: {error}") from error
    renormalize = RENORMALIZE.get(metadata.get("renormalize"))
    if renormalize is None:
        value = metadata.get("renormalize")
        raise InputError(f"metadata 'renormalize' is {value!r}, not true or false")
    dtype = DTYPES.get(metadata.get("dtype"))
    if dtype is None:
        raise InputError(f"metadata 'dtype' is {metadata.get('dtype')!r}, not f32, f16 or bf16")

    def take(name, dtype, shape):
        tensor = tensors.get(name)
        if tensor is None:
            raise InputError(f"tensor '{name}' is missing")
        if tensor.dtype != dtype:
            raise InputError(f"tensor '{name}' is {tensor.dtype}, not {dtype}")
        sizes = list(tensor.shape)
        matches = len(sizes) == len(shape) and all(w in (None, g) for w, g in zip(shape, sizes))
        if not matches or 0 in sizes:
            wanted = ["any" if size is None else size for size in shape]
            raise InputError(f"tensor '{name}' has shape {sizes}, not {wanted}")
        return tensor

    x = take("x", dtype, [None, None])
    tokens, hidden = x.shape
    down = take("down", dtype, [None, hidden, None])
    experts, _, intermediate = down.shape
    expert_ids = take("expert_ids", torch.int32, [tokens, None]).long()
    top_k = expert_ids.shape[1]
    layer = Layer(
        x=x,
        logits=take("logits", dtype, [tokens, experts]),
        weights=Weights(
            router_gate=take("router_gate", dtype, [experts, hidden]),
            gate_up=take("gate_up", dtype, [experts, 2 * intermediate, hidden]),
            down=down,
        ),
        expert_ids=expert_ids,
        expert_weights=take("weights", torch.float32, [tokens, top_k]),
        y=take("y", dtype, [tokens, hidden]),
        renormalize=renormalize,
    )
    if expert_ids.min() < 0 or expert_ids.max() >= experts:
        raise InputError(f"tensor 'expert_ids' names an expert outside 0..{experts}")
    if (expert_ids.sort(dim=1).values.diff(dim=1) == 0).any():
        raise InputError("tensor 'expert_ids' names an expert twice for one token")
    return layer
