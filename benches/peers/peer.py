"""The base classes of peers."""

import torch
import torch.nn.functional as F

import glue
from layer import FROM_LOGITS, FROM_X, GEMM, Call


class Peer:
    """A MoE layer of another library.

    A constructor raises `Unavailable` or ImportError if the peer cannot run.
    """

    boundaries = (GEMM, FROM_LOGITS, FROM_X)
    # Whether a call can be captured in a CUDA graph: false if the host waits for the device.
    graph = True
    note = None

    def __init__(self, layer):
        self.layer = layer
        self.version = f"torch {torch.__version__}"

    def call(self, boundary, weights):
        """Prepares a call that computes `boundary` with `weights`."""
        if boundary == GEMM:
            return self.products(weights)
        layer = self.layer

        def run():
            logits = layer.logits
            if boundary == FROM_X:
                logits = F.linear(layer.x, weights.router_gate)
            return self.experts(weights, *self.route(logits))

        return Call(run)

    def route(self, logits):
        return glue.route(logits, self.layer.top_k, self.layer.renormalize)

    def products(self, weights):
        """Prepares a call from x to yp, by the ids of the file."""
        raise NotImplementedError

    def experts(self, weights, expert_ids, expert_weights):
        """Computes y from ids and routing weights on the device."""
        raise NotImplementedError


class GroupedPeer(Peer):
    """A peer with a grouped product; permutation, activation and combine are torch's."""

    def __init__(self, layer):
        super().__init__(layer)
        self.grouping = self.group(layer.expert_ids)

    def group(self, expert_ids):
        return glue.group(expert_ids, self.layer.experts)

    def grouped(self, a, weight, grouping):
        """Multiplies each row of `a [R, in]` by its expert's `weight [E, out, in]`."""
        raise NotImplementedError

    def rows(self, weights, grouping):
        act = self.grouped(self.layer.x[grouping.token_of_row], weights.gate_up, grouping)
        return self.grouped(glue.swiglu(act), weights.down, grouping)

    def products(self, weights):
        grouping = self.grouping
        run = lambda: self.rows(weights, grouping)
        return Call(run, grouping.token_of_row, grouping.expert_of_row)

    def experts(self, weights, expert_ids, expert_weights):
        grouping = self.group(expert_ids)
        return glue.combine(self.rows(weights, grouping), grouping.row_of_slot(), expert_weights)
