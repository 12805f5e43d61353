"""Routing, grouping and combine in torch, for peers that are a grouped GEMM.

The host does not read from the device here, so that all of it can be captured in a graph.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F


@dataclass
class Grouping:
    """Slots (token, k) sorted by expert. A slot in that order is a row."""

    slot_of_row: torch.Tensor  # [R]
    expert_of_row: torch.Tensor  # [R]
    token_of_row: torch.Tensor  # [R]
    ends: torch.Tensor  # [E], int32: one past the last row of each expert

    def row_of_slot(self):
        rows = torch.empty_like(self.slot_of_row)
        rows[self.slot_of_row] = torch.arange(rows.numel(), device=rows.device)
        return rows


def route(logits, top_k, renormalize):
    """Softmax over all experts, then the K largest, renormalised if `renormalize`."""
    weights, ids = torch.topk(torch.softmax(logits.float(), dim=1), top_k, dim=1)
    return ids, weights / weights.sum(1, keepdim=True) if renormalize else weights


def group(expert_ids, experts):
    expert_of_row, slot_of_row = torch.sort(expert_ids.flatten(), stable=True)
    every = torch.arange(experts, device=expert_ids.device)
    ends = torch.searchsorted(expert_of_row, every, right=True, out_int32=True)
    token_of_row = slot_of_row // expert_ids.shape[1]
    return Grouping(slot_of_row, expert_of_row, token_of_row, ends)


def swiglu(gate_up):
    gate, up = gate_up.chunk(2, dim=1)
    return F.silu(gate) * up


def combine(rows, row_of_slot, weights):
    """The weighted sum of each token's rows, as a batched product with f32 sums."""
    tokens, top_k = weights.shape
    rows = rows[row_of_slot].view(tokens, top_k, -1)
    return torch.bmm(weights.to(rows.dtype)[:, None, :], rows)[:, 0, :]
