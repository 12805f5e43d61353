"""Peers in torch alone."""

import torch
import torch.nn.functional as F

import glue
from errors import Unavailable, brief
from layer import GEMM, Call
from peer import GroupedPeer, Peer


class TorchLoop(Peer):
    """A loop over the experts with rows that adds each expert's rows to y by index.

    Eager transformers does the same.
    """

    graph = False
    note = "the host waits for the device to read which experts have rows"

    def expert(self, weights, expert, x):
        return F.linear(glue.swiglu(F.linear(x, weights.gate_up[expert])), weights.down[expert])

    def experts(self, weights, expert_ids, expert_weights):
        x = self.layer.x
        y = torch.zeros_like(x)
        mask = F.one_hot(expert_ids, self.layer.experts).permute(2, 1, 0)
        for expert in mask.sum(dim=(1, 2)).nonzero().flatten().tolist():
            rank, token = torch.where(mask[expert])
            rows = self.expert(weights, expert, x[token])
            y.index_add_(0, token, (rows * expert_weights[token, rank, None]).to(x.dtype))
        return y

    def products(self, weights):
        grouping = glue.group(self.layer.expert_ids, self.layer.experts)
        ends = grouping.ends.tolist()
        starts = [0] + ends[:-1]
        tokens = [grouping.token_of_row[start:end] for start, end in zip(starts, ends)]
        groups = [(expert, token) for expert, token in enumerate(tokens) if token.numel()]

        def run():
            rows = [self.expert(weights, expert, self.layer.x[token]) for expert, token in groups]
            return torch.cat(rows)

        return Call(run, grouping.token_of_row, grouping.expert_of_row)


class TorchBmm(Peer):
    """The two products as batched products, in equal groups over as many experts as have rows.

    This is the speed of cuBLAS on groups of equal size: a ceiling for the products, not a layer.
    """

    boundaries = (GEMM,)
    note = "two batched products in equal groups, without gather and SwiGLU: a ceiling, not a layer"

    def products(self, weights):
        layer = self.layer
        active = layer.expert_ids.unique()
        grouping = glue.group(layer.expert_ids, layer.experts)
        # If rows do not divide evenly, the first tokens are repeated, so that no zeros are timed.
        each = -(-grouping.token_of_row.numel() // active.numel())
        wanted = torch.arange(each * active.numel(), device=layer.device)
        token = grouping.token_of_row[wanted % grouping.token_of_row.numel()]
        gate_up, down = weights.gate_up, weights.down
        if active.numel() < layer.experts:
            gate_up, down = gate_up[active], down[active]
        x = layer.x[token].view(active.numel(), each, -1)
        hidden = torch.bmm(x, gate_up.mT)
        act = glue.swiglu(hidden.flatten(0, 1)).view(active.numel(), each, -1)
        rows = torch.empty_like(x)

        def run():
            torch.bmm(x, gate_up.mT, out=hidden)
            return torch.bmm(act, down.mT, out=rows).flatten(0, 1)

        return Call(run, token, active.repeat_interleave(each))


class TorchGroupedMm(GroupedPeer):
    """torch's grouped product, between a sort and a weighted sum."""

    def __init__(self, layer):
        super().__init__(layer)
        self.grouped_mm = getattr(F, "grouped_mm", None) or getattr(torch, "_grouped_mm", None)
        if self.grouped_mm is None:
            raise Unavailable(f"torch {torch.__version__} has no grouped_mm")
        # A product of one row shows whether it supports the device, the dtype and the strides.
        one = torch.ones(1, dtype=torch.int32, device=layer.device)
        act = layer.weights.down.new_ones(1, layer.intermediate)
        try:
            self.grouped_mm(layer.x[:1], layer.weights.gate_up[:1].mT, offs=one)
            self.grouped_mm(act, layer.weights.down[:1].mT, offs=one)
        except RuntimeError as error:
            raise Unavailable(f"grouped_mm: {brief(error)}") from error

    def grouped(self, a, weight, grouping):
        return self.grouped_mm(a, weight.mT, offs=grouping.ends)
