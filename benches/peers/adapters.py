"""Peers that call an installed package: DeepGEMM, ScatterMoE, SonicMoE.

Each calls the package's public functions as the package's own tests and layers do. The calls follow
the sources of DeepGEMM 2.6.1, ScatterMoE 0.3.0 and SonicMoE 0.1.2.post1.
"""

from dataclasses import dataclass
from importlib import metadata

import torch

import glue
from errors import Unavailable
from layer import FROM_X, Call
from peer import GroupedPeer, Peer


def need_cuda(layer, major=None, dtypes=(torch.bfloat16,)):
    """Raises `Unavailable` if a package has no kernels for the device or the dtype."""
    if layer.device.type != "cuda":
        raise Unavailable("it needs CUDA")
    capability = torch.cuda.get_device_capability(layer.device)
    if major and capability[0] not in major:
        wanted = ", ".join(f"{number}.x" for number in major)
        raise Unavailable(f"it needs compute capability {wanted}, not {capability}")
    if layer.dtype not in dtypes:
        raise Unavailable(f"it does not support {layer.dtype}")


@dataclass
class Padded(glue.Grouping):
    """A grouping in which each expert begins at a multiple of the package's alignment."""

    slots: torch.Tensor  # [T*K]: the row of each slot, with padding

    def row_of_slot(self):
        return self.slots


class DeepGemm(GroupedPeer):
    """DeepGEMM's bf16 product of contiguous groups; all other steps are torch's."""

    def __init__(self, layer):
        import deep_gemm

        need_cuda(layer, major=(9, 10))
        self.deep_gemm = deep_gemm
        super().__init__(layer)
        self.version = f"deep_gemm {deep_gemm.__version__}"

    def group(self, expert_ids):
        grouping = super().group(expert_ids)
        step = self.deep_gemm.get_mk_alignment_for_contiguous_layout()
        ends = grouping.ends.long()
        sizes = ends.diff(prepend=ends.new_zeros(1))
        padded = (sizes + step - 1) // step * step
        # Padding moves an expert's rows by `shift`. The host allocates for a bound on their number.
        shift = (padded.cumsum(0) - padded) - (ends - sizes)
        place = torch.arange(expert_ids.numel(), device=ends.device)
        place = place + shift[grouping.expert_of_row]
        bound = (place.numel() // step + min(place.numel(), self.layer.experts)) * step
        token, expert = ends.new_zeros(bound), ends.new_full((bound,), -1)
        token[place], expert[place] = grouping.token_of_row, grouping.expert_of_row
        slots = torch.empty_like(place)
        slots[grouping.slot_of_row] = place
        return Padded(grouping.slot_of_row, expert.int(), token, grouping.ends, slots)

    def grouped(self, a, weight, grouping):
        c = a.new_empty(a.shape[0], weight.shape[1])
        product = self.deep_gemm.m_grouped_bf16_gemm_nt_contiguous
        product(a, weight, c, grouping.expert_of_row)
        return c

    def products(self, weights):
        call = super().products(weights)
        call.token = torch.where(call.expert < 0, -1, call.token)
        return call


class ScatterMoe(Peer):
    """ScatterMoE's product, which groups without padding, with its own sort and weighted sum."""

    def __init__(self, layer):
        import scattermoe
        import triton

        if layer.device.type != "cuda":
            raise Unavailable("it needs CUDA")
        super().__init__(layer)
        self.scattermoe = scattermoe
        self.version = f"scattermoe {metadata.version('scattermoe')}, triton {triton.__version__}"

    def rows(self, weights, listing, **last):
        linear = self.scattermoe.parallel_linear
        top_k = self.layer.top_k
        hidden = linear(self.layer.x, weights.gate_up.mT, top_k, *listing, grouped_out=True)
        return linear(glue.swiglu(hidden), weights.down.mT, 1, *listing, grouped_in=True, **last)

    def products(self, weights):
        listing = self.scattermoe.flatten_sort_count(self.layer.expert_ids, self.layer.experts)
        expert, slot, _ = listing
        run = lambda: self.rows(weights, listing, grouped_out=True)
        return Call(run, slot // self.layer.top_k, expert)

    def experts(self, weights, expert_ids, expert_weights):
        listing = self.scattermoe.flatten_sort_count(expert_ids, self.layer.experts)
        return self.rows(weights, listing, gates=expert_weights.to(self.layer.dtype))


class SonicMoe(Peer):
    """SonicMoE's layer, which includes the router."""

    boundaries = (FROM_X,)

    def __init__(self, layer):
        import sonicmoe

        need_cuda(layer, major=(9, 10), dtypes=(torch.bfloat16, torch.float16))
        super().__init__(layer)
        self.layer_function = sonicmoe.moe_TC_softmax_topk_layer
        self.version = f"sonicmoe {sonicmoe.__version__}"

    def call(self, boundary, weights):
        layer = self.layer
        # Its rows of gate and up alternate. The expert is its last dimension, but the outermost one
        # in memory.
        halves = weights.gate_up.view(layer.experts, 2, layer.intermediate, layer.hidden)
        gate_up = halves.transpose(1, 2).reshape(weights.gate_up.shape)
        experts = (gate_up.permute(1, 2, 0), None, weights.down.permute(1, 2, 0), None)

        def run():
            stream = torch.cuda.current_stream().cuda_stream
            rest = (layer.top_k, stream, "swiglu", True)
            # The softmax over the selected is the softmax over all, renormalised.
            softmax = {"is_softmax_over_topk": layer.renormalize}
            return self.layer_function(layer.x, weights.router_gate, *experts, *rest, **softmax)[0]

        return Call(run)
