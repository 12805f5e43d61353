"""The peer of Triton kernels, with a configuration found by a search on the device."""

import os
from dataclasses import dataclass

import torch
import triton

import triton_kernels as kernels
from errors import Unavailable
from layer import Call
from peer import Peer
from triton_tuning import Config, tuned

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
ELEMENTS = 1024  # elements of a program of the elementwise kernels
SLOTS = 2048  # slots that a program of the listing kernels reads at a time


@dataclass
class Listing:
    """Slots sorted by expert and padded to blocks; see triton_kernels."""

    slot_of_row: torch.Tensor
    expert_of_block: torch.Tensor


class TritonFusedMoe(Peer):
    """Six steps in seven launches: route, list, product, SwiGLU, product, sum."""

    def __init__(self, layer, cache, tuning_seconds):
        super().__init__(layer)
        if layer.device.type != "cuda" and not INTERPRETED:
            raise Unavailable(
                "Triton has no CPU backend; TRITON_INTERPRET=1 interprets its kernels"
            )
        if INTERPRETED and layer.dtype == torch.bfloat16:
            raise Unavailable("Triton's interpreter multiplies the bits of bf16 as integers")
        self.version = f"triton {triton.__version__}"
        self.config = Config()
        self.tuning = None if INTERPRETED else (cache, tuning_seconds)
        if INTERPRETED:
            self.note = "interpreted"

    def call(self, boundary, weights):
        if self.tuning:
            self.config, self.note = tuned(self, *self.tuning)
            self.tuning = None
        return super().call(boundary, weights)

    def products(self, weights):
        layer = self.layer
        listing = self.list(layer.expert_ids.to(torch.int32))
        slot = torch.arange(layer.expert_ids.numel(), device=layer.device)
        run = lambda: self.rows(weights, listing)
        return Call(run, slot // layer.top_k, layer.expert_ids.flatten())

    def experts(self, weights, expert_ids, expert_weights):
        rows = self.rows(weights, self.list(expert_ids), expert_weights)
        layer = self.layer
        y = torch.empty_like(layer.x)
        grid = (layer.tokens, triton.cdiv(layer.hidden, ELEMENTS))
        kernels.sum_kernel[grid](y, rows, layer.hidden, TOP_K=layer.top_k, BLOCK=ELEMENTS)
        return y

    def route(self, logits):
        layer = self.layer
        ids = torch.empty(layer.tokens, layer.top_k, dtype=torch.int32, device=layer.device)
        weights = torch.empty_like(ids, dtype=torch.float32)
        kernels.route_kernel[(layer.tokens,)](
            ids,
            weights,
            logits,
            layer.experts,
            TOP_K=layer.top_k,
            SLOTS=triton.next_power_of_2(layer.top_k),
            BLOCK=triton.next_power_of_2(layer.experts),
            RENORMALIZE=layer.renormalize,
        )
        return ids, weights

    def list(self, expert_ids):
        experts, slots = self.layer.experts, expert_ids.numel()
        # Each expert has at most one partial block, and each block has at least one row.
        blocks = min(slots, slots // self.config.block_m + experts)
        new = lambda size: torch.empty(size, dtype=torch.int32, device=expert_ids.device)
        listing = Listing(new(blocks * self.config.block_m), new(blocks))
        counts = new(experts)
        kernels.count_kernel[(experts,)](counts, expert_ids, slots, BLOCK=SLOTS)
        kernels.align_kernel[(experts,)](
            listing.slot_of_row,
            listing.expert_of_block,
            counts,
            expert_ids,
            slots,
            experts,
            blocks,
            BLOCK_M=self.config.block_m,
            BLOCK_E=triton.next_power_of_2(experts),
            BLOCK=SLOTS,
        )
        return listing

    def rows(self, weights, listing, expert_weights=None):
        """Computes both products; row `s` is that of slot `s`, weighted if weights are given."""
        layer = self.layer
        slots = layer.expert_ids.numel()
        gate_up = layer.x.new_empty(slots, 2 * layer.intermediate)
        act = layer.x.new_empty(slots, layer.intermediate)
        rows = layer.x.new_empty(slots, layer.hidden)
        self.product(gate_up, layer.x, weights.gate_up, listing, None)
        grid = (slots, triton.cdiv(layer.intermediate, ELEMENTS))
        kernels.swiglu_kernel[grid](act, gate_up, layer.intermediate, BLOCK=ELEMENTS)
        self.product(rows, act, weights.down, listing, expert_weights)
        return rows

    def product(self, c, a, b, listing, expert_weights):
        config = self.config
        _, out_features, in_features = b.shape
        blocks = listing.expert_of_block.numel()
        kernels.product_kernel[(blocks * triton.cdiv(out_features, config.block_n),)](
            c,
            a,
            b,
            listing.slot_of_row,
            listing.expert_of_block,
            c if expert_weights is None else expert_weights,
            c.shape[0],
            out_features,
            in_features,
            blocks,
            SLOTS_PER_ROW=c.shape[0] // a.shape[0],
            WEIGHTED=expert_weights is not None,
            EVEN_K=in_features % config.block_k == 0,
            BLOCK_M=config.block_m,
            BLOCK_N=config.block_n,
            BLOCK_K=config.block_k,
            GROUP_M=config.group_m,
            num_warps=config.warps,
            num_stages=config.stages,
        )
