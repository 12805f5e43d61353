"""The peer of cuBLAS' grouped product, called through ctypes."""

import ctypes
import os
from dataclasses import dataclass

import torch

import glue
from errors import Unavailable
from peer import GroupedPeer

# Constants of cublas_api.h and library_types.h.
OP_N, OP_T = 0, 1
COMPUTE_32F = 68
CUDA_TYPES = {torch.float32: 0, torch.float16: 2, torch.bfloat16: 14}


class Cublas:
    """The library with a handle."""

    def __init__(self):
        # torch has loaded its own libcublas, which the loader finds by name.
        major = (torch.version.cuda or "13").split(".")[0]
        name = os.environ.get("MOE_PEERS_CUBLAS", f"libcublas.so.{major}")
        try:
            self.library = ctypes.CDLL(name)
        except OSError as error:
            raise Unavailable(f"libcublas: {error}") from error
        if not hasattr(self.library, "cublasGemmGroupedBatchedEx"):
            raise Unavailable(
                f"{name} has no cublasGemmGroupedBatchedEx, which needs CUDA 12.5"
            )
        self.handle = ctypes.c_void_p()
        self.call("cublasCreate_v2", ctypes.byref(self.handle))

    def call(self, name, *arguments):
        status = getattr(self.library, name)(*arguments)
        if status != 0:
            raise RuntimeError(f"{name} returned status {status}")

    def version(self):
        number = ctypes.c_int()
        self.call("cublasGetVersion_v2", self.handle, ctypes.byref(number))
        return f"cublas {number.value // 10000}.{number.value // 100 % 100}.{number.value % 100}"

    def grouped(self, c, a, b, groups, stream):
        """Computes `c[rows] = a[rows] b[expert]^T` for each group, with all three row-major.

        cuBLAS is column-major and computes `c^T = b a^T`, with b transposed.
        """
        _, out_features, in_features = b.shape
        count = len(groups.sizes)
        ints, floats = ctypes.c_int * count, ctypes.c_float * count
        same = lambda value: ints(*[value] * count)
        kind = CUDA_TYPES[c.dtype]

        def pointers(tensor, index, elements):
            return tensor.data_ptr() + index * (elements * tensor.element_size())

        # cuBLAS reads the addresses of the matrices from device memory, so they are computed there.
        b_at = pointers(b, groups.experts, out_features * in_features)
        a_at = pointers(a, groups.starts, in_features)
        c_at = pointers(c, groups.starts, out_features)
        self.call("cublasSetStream_v2", self.handle, ctypes.c_void_p(stream))
        self.call(
            "cublasGemmGroupedBatchedEx",
            self.handle,
            same(OP_T),
            same(OP_N),
            same(out_features),
            ints(*groups.sizes),
            same(in_features),
            floats(*[1.0] * count),
            *(ctypes.c_void_p(b_at.data_ptr()), kind, same(in_features)),
            *(ctypes.c_void_p(a_at.data_ptr()), kind, same(in_features)),
            floats(),
            *(ctypes.c_void_p(c_at.data_ptr()), kind, same(out_features)),
            count,
            same(1),
            COMPUTE_32F,
        )


@dataclass
class Groups(glue.Grouping):
    """A grouping whose sizes are on the host. Experts without rows are left out."""

    experts: torch.Tensor
    starts: torch.Tensor
    sizes: list


class CublasGrouped(GroupedPeer):
    """cublasGemmGroupedBatchedEx; permutation, activation and combine are torch's."""

    # Its arrays of sizes are in host memory, which is freed before a graph would be replayed.
    graph = False
    note = "the host waits for the device to read the sizes of the groups"

    def __init__(self, layer):
        # The tests' stand-in for the library computes on the CPU.
        if layer.device.type != "cuda" and "MOE_PEERS_CUBLAS" not in os.environ:
            raise Unavailable("it needs CUDA")
        self.cublas = Cublas()
        super().__init__(layer)
        self.version = self.cublas.version()

    def group(self, expert_ids):
        grouping = super().group(expert_ids)
        ends = grouping.ends.long()
        sizes = ends.diff(prepend=ends.new_zeros(1))
        experts = sizes.nonzero().flatten()
        starts = (ends - sizes)[experts]
        return Groups(
            **vars(grouping), experts=experts, starts=starts, sizes=sizes[experts].tolist()
        )

    def grouped(self, a, weight, grouping):
        c = a.new_empty(a.shape[0], weight.shape[1])
        cuda = a.device.type == "cuda"
        stream = torch.cuda.current_stream().cuda_stream if cuda else None
        self.cublas.grouped(c, a, weight, grouping, stream)
        return c
