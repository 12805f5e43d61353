"""Kernels of a fused MoE layer in Triton, with the plan of vLLM's Triton path.

Slots (token, k) are sorted by expert, and each expert's list is padded to a multiple of BLOCK_M. A
block of rows then has one expert. One kernel computes both products: it gathers rows of A by the
list and writes rows of C back to their slots.
"""

import triton
import triton.language as tl


@triton.jit
def route_kernel(
    ids,  # [T, K] int32
    weights,  # [T, K] f32
    logits,  # [T, E]
    experts,
    TOP_K: tl.constexpr,
    SLOTS: tl.constexpr,  # TOP_K, rounded up to a power of two
    BLOCK: tl.constexpr,  # E, rounded up to a power of two
    RENORMALIZE: tl.constexpr,  # divides by the sum over the chosen experts, else over all experts
):
    """A program per token: softmax, then TOP_K searches for the largest score."""
    token = tl.program_id(0).to(tl.int64)
    expert = tl.arange(0, BLOCK)
    inside = expert < experts
    scores = tl.load(logits + token * experts + expert, inside, other=float("-inf"))
    scores = scores.to(tl.float32)
    scores = tl.exp(scores - tl.max(scores, 0))
    total = tl.sum(scores, 0)
    # Scores that were chosen, and those past the last expert, are below all others.
    scores = tl.where(inside, scores, -1.0)
    slot = tl.arange(0, SLOTS)
    chosen = tl.zeros([SLOTS], tl.int32)
    taken = tl.zeros([SLOTS], tl.float32)
    for rank in tl.static_range(TOP_K):
        best = tl.max(scores, 0)
        # Ties go to the lower expert.
        winner = tl.min(tl.where(scores == best, expert, BLOCK), 0)
        chosen = tl.where(slot == rank, winner, chosen)
        taken = tl.where(slot == rank, best, taken)
        scores = tl.where(expert == winner, -1.0, scores)
    if RENORMALIZE:
        total = tl.sum(taken, 0)
    tl.store(ids + token * TOP_K + slot, chosen, slot < TOP_K)
    tl.store(weights + token * TOP_K + slot, taken / total, slot < TOP_K)


@triton.jit
def count_kernel(counts, ids, slots, BLOCK: tl.constexpr):  # counts [E], ids [T*K]
    """A program per expert counts its slots."""
    expert = tl.program_id(0)
    found = tl.zeros([BLOCK], tl.int32)
    for start in range(0, slots, BLOCK):
        slot = start + tl.arange(0, BLOCK)
        found += (tl.load(ids + slot, slot < slots, other=-1) == expert).to(tl.int32)
    tl.store(counts + expert, tl.sum(found, 0))


@triton.jit
def align_kernel(
    slot_of_row,  # [blocks * BLOCK_M]: `slots` in padding
    expert_of_block,  # [blocks]: -1 for blocks without rows
    counts,  # [E]
    ids,  # [T*K]
    slots,
    experts,
    blocks,
    BLOCK_M: tl.constexpr,
    BLOCK_E: tl.constexpr,  # E, rounded up to a power of two
    BLOCK: tl.constexpr,
):
    """A program per expert lists its slots in order and sets the expert of their blocks."""
    expert = tl.program_id(0)
    every = tl.arange(0, BLOCK_E)
    count = tl.load(counts + every, every < experts, other=0)
    filled = (count + BLOCK_M - 1) // BLOCK_M
    first = tl.sum(tl.where(every < expert, filled, 0), 0)
    last = first + tl.sum(tl.where(every == expert, filled, 0), 0)
    row = first * BLOCK_M
    for start in range(0, slots, BLOCK):
        slot = start + tl.arange(0, BLOCK)
        mine = tl.load(ids + slot, slot < slots, other=-1) == expert
        place = row + tl.cumsum(mine.to(tl.int32), 0) - 1
        tl.store(slot_of_row + place, slot, mine)
        row += tl.sum(mine.to(tl.int32), 0)
    lane = tl.arange(0, BLOCK_M)
    tl.store(slot_of_row + row + lane, slots, row + lane < last * BLOCK_M)
    for block in range(first, last):
        tl.store(expert_of_block + block, expert)
    if expert == experts - 1:
        for block in range(last, blocks):
            tl.store(expert_of_block + block, -1)


@triton.jit
def product_kernel(
    c,  # [slots, out_features]
    a,  # [slots // SLOTS_PER_ROW, in_features]
    b,  # [E, out_features, in_features]
    slot_of_row,
    expert_of_block,
    weights,  # [slots], read where WEIGHTED
    slots,
    out_features,
    in_features,
    blocks,
    SLOTS_PER_ROW: tl.constexpr,
    WEIGHTED: tl.constexpr,
    EVEN_K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    """A program per tile of C: rows of one block times columns of its expert."""
    # Programs take the tiles of GROUP_M blocks together, so that their columns of B stay in L2.
    program = tl.program_id(0)
    columns = tl.cdiv(out_features, BLOCK_N)
    band = program // (GROUP_M * columns)
    height = tl.minimum(blocks - band * GROUP_M, GROUP_M)
    block = band * GROUP_M + program % (GROUP_M * columns) % height
    column = program % (GROUP_M * columns) // height
    expert = tl.load(expert_of_block + block).to(tl.int64)
    if expert < 0:
        return
    slot = tl.load(slot_of_row + block * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)
    row_inside = slot < slots
    col = column * BLOCK_N + tl.arange(0, BLOCK_N).to(tl.int64)
    col_inside = col < out_features
    inner = tl.arange(0, BLOCK_K)
    a_at = a + (slot // SLOTS_PER_ROW)[:, None] * in_features + inner[None, :]
    # Columns past the end wrap around; their results are not stored.
    row_of_b = expert * out_features + col % out_features
    b_at = b + row_of_b[None, :] * in_features + inner[:, None]
    sums = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for start in range(0, in_features, BLOCK_K):
        if EVEN_K:
            a_part = tl.load(a_at, row_inside[:, None], other=0.0)
            b_part = tl.load(b_at)
        else:
            left = inner < in_features - start
            a_part = tl.load(a_at, row_inside[:, None] & left[None, :], other=0.0)
            b_part = tl.load(b_at, left[:, None], other=0.0)
        # f32 is multiplied as f32, never as TF32. The other dtypes ignore the option.
        sums = tl.dot(a_part, b_part, sums, input_precision="ieee")
        a_at += BLOCK_K
        b_at += BLOCK_K
    if WEIGHTED:
        sums *= tl.load(weights + slot, row_inside, other=0.0)[:, None]
    c_at = c + slot[:, None] * out_features + col[None, :]
    tl.store(c_at, sums.to(c.dtype.element_ty), row_inside[:, None] & col_inside[None, :])


@triton.jit
def swiglu_kernel(act, gate_up, width, BLOCK: tl.constexpr):  # act [R, I], gate_up [R, 2I]
    row = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = at < width
    gate = tl.load(gate_up + row * 2 * width + at, inside, other=0.0).to(tl.float32)
    up = tl.load(gate_up + row * 2 * width + width + at, inside, other=0.0).to(tl.float32)
    result = gate / (1 + tl.exp(-gate)) * up
    tl.store(act + row * width + at, result.to(act.dtype.element_ty), inside)


@triton.jit
def sum_kernel(
    y, rows, hidden, TOP_K: tl.constexpr, BLOCK: tl.constexpr
):  # y [T, H], rows [T*K, H]
    token = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = at < hidden
    total = tl.zeros([BLOCK], tl.float32)
    for rank in tl.static_range(TOP_K):
        row = rows + (token * TOP_K + rank) * hidden
        total += tl.load(row + at, inside, other=0.0).to(tl.float32)
    tl.store(y + token * hidden + at, total.to(y.dtype.element_ty), inside)
