"""The layer in f64 on the CPU for a few tokens, and the relative error of a result."""

import torch

from errors import Wrong
from layer import FROM_LOGITS, GEMM

# The most tokens, or rows at "GEMM alone", that are compared with the truth.
CHECKED = 16


class Truth:
    """Computes each expert's output for a token once, for all peers."""

    def __init__(self, layer):
        self.layer = layer
        self.outputs = {}

    def error(self, boundary, call):
        """Returns the relative error of the result of `call` at `boundary`."""
        got = call.run()
        if boundary == GEMM:
            return relative_error(got, *self.product_rows(call.token.cpu(), call.expert.cpu()))
        return relative_error(got, *self.layer_rows(self.clear_tokens(boundary), boundary))

    def error_of_file(self):
        """Returns the largest relative error of the file's `y` and of its ids and weights."""
        layer = self.layer
        logits = self.logits(FROM_LOGITS)
        ids, weights = route(logits, layer.top_k, layer.renormalize)
        dense = torch.zeros_like(logits).scatter_(1, ids, weights)
        got = torch.zeros_like(logits)
        got.scatter_(1, layer.expert_ids, layer.expert_weights.double())
        if not torch.equal(dense > 0, got > 0):
            token = ((dense > 0) != (got > 0)).any(1).nonzero()[0].item()
            raise Wrong(f"the experts of token {token} are not the largest of its logits")
        routing = relative_error(got, torch.arange(layer.tokens), dense)
        rows = self.layer_rows(spread(torch.arange(layer.tokens)), FROM_LOGITS)
        return max(routing, relative_error(layer.y, *rows))

    def product_rows(self, token, expert):
        """Returns some rows of a result whose row r has token[r] and expert[r], and their truth."""
        rows = spread((token >= 0).nonzero().flatten())
        pairs = list(zip(token[rows].tolist(), expert[rows].tolist()))
        outputs = self.expert_outputs(pairs)
        return rows, torch.stack([outputs[pair] for pair in pairs])

    def layer_rows(self, tokens, boundary):
        """Returns `tokens` and the truth of their rows of y."""
        logits = self.logits(boundary)[tokens]
        ids, weights = route(logits, self.layer.top_k, self.layer.renormalize)
        pairs = [(t, e) for t, row in zip(tokens.tolist(), ids.tolist()) for e in row]
        outputs = self.expert_outputs(pairs)
        outputs = torch.stack([outputs[pair] for pair in pairs]).view(*ids.shape, -1)
        return tokens, (weights[..., None] * outputs).sum(1)

    def expert_outputs(self, pairs):
        """Returns the output of an expert for a token, for each pair (token, expert)."""
        missing = {}
        for token, expert in pairs:
            if (token, expert) not in self.outputs:
                missing.setdefault(expert, set()).add(token)
        for expert, tokens in missing.items():
            tokens = sorted(tokens)
            x = self.layer.x[tokens].double()
            gate, up = (x @ self.layer.weights.gate_up[expert].double().T).chunk(2, dim=1)
            rows = gate * torch.sigmoid(gate) * up @ self.layer.weights.down[expert].double().T
            self.outputs.update({(token, expert): row for token, row in zip(tokens, rows)})
        return self.outputs

    def logits(self, boundary):
        if boundary == FROM_LOGITS:
            return self.layer.logits.double()
        return self.layer.x.double() @ self.layer.weights.router_gate.double().T

    def clear_tokens(self, boundary):
        """Returns tokens whose choice of experts does not change with the rounding of the scores.

        If two scores differ by a rounding, either choice is right.
        """
        logits = self.logits(boundary)
        scores = logits.sort(dim=1, descending=True).values
        if self.layer.top_k == scores.shape[1]:
            return spread(torch.arange(self.layer.tokens))
        margin = scores[:, self.layer.top_k - 1] - scores[:, self.layer.top_k]
        margin = margin / logits.abs().amax(1)
        clear = (margin > 4 * torch.finfo(self.layer.dtype).eps).nonzero().flatten()
        return spread(clear) if clear.numel() else margin.argmax()[None]


def route(logits, top_k, renormalize):
    """Returns the K largest, ties to the lower expert, and their softmax over all or over the K."""
    logits, order = torch.sort(logits, dim=1, descending=True, stable=True)
    among = logits[:, :top_k] if renormalize else logits
    return order[:, :top_k], torch.softmax(among, dim=1)[:, :top_k]


def spread(indices):
    """Returns at most CHECKED of the indices, evenly spread from the first to the last."""
    return indices[torch.linspace(0, len(indices) - 1, min(len(indices), CHECKED)).long()]


def relative_error(got, rows, truth):
    """Returns ||got - truth|| / ||truth|| over the rows. Raises `Wrong` for NaN and infinity."""
    if got.dim() != 2 or got.shape[1] != truth.shape[1] or got.shape[0] <= rows.max():
        raise Wrong(f"the result has shape {list(got.shape)}")
    got = got[rows.to(got.device)].cpu().double()
    if not (torch.isfinite(got).all() and torch.isfinite(truth).all()):
        raise Wrong("the result, or the truth, has NaN or infinity")
    if truth.norm() == 0:
        raise Wrong("the truth is all zeros")
    return ((got - truth).norm() / truth.norm()).item()
