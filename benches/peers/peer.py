"""What a peer is."""

import torch
import torch.nn.functional as F

import glue
from layer import FROM_LOGITS, FROM_X, GEMM, Call


class Peer:
    """A layer by somebody else's kernels.

    A constructor raises `Unavailable`, or ImportError, where the peer cannot run.
    """

    boundaries = (GEMM, FROM_LOGITS, FROM_X)
    # Whether a call may be captured in a CUDA graph: not where the host waits for the device.
    graph = True
    note = None

    def __init__(self, layer):
        self.layer = layer
        self.version = f"torch {torch.__version__}"

    def call(self, boundary, weights):
        """A call that computes `boundary` with `weights`; what comes before it is done."""
        if boundary == GEMM:
            return self.products(weights)
        layer = self.layer

        def run():
            logits = layer.logits if boundary == FROM_LOGITS else F.linear(layer.x, weights.gate)
            return self.experts(weights, *self.route(logits))

        return Call(run)

    def route(self, logits):
        return glue.route(logits, self.layer.top_k, self.layer.renormalize)

    def products(self, weights):
        """A call from x to yp, by the ids of the file."""
        raise NotImplementedError

    def experts(self, weights, expert_ids, expert_weights):
        """y, by ids and weights on the device."""
        raise NotImplementedError


class GroupedPeer(Peer):
    """A peer that is a grouped product; permutation, activation and combine are torch's."""

    def __init__(self, layer):
        super().__init__(layer)
        self.grouping = self.group(layer.expert_ids)

    def group(self, expert_ids):
        return glue.group(expert_ids, self.layer.experts)

    def grouped(self, a, weight, grouping):
        """For each row of `a [R, K]` the product with its expert's `weight [E, N, K]`."""
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
