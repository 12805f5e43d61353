// wgmma: a matrix product by the four warps of a warp group together, with operands in shared
// memory, performed between its issue and the wait for its group. It completes for all warps at
// once.
#include "multiply.h"
#include "state.h"

namespace simt {

static constexpr uint32_t ALL_WARPS = 0xf;

// ---- Matrix descriptors ----

// Bits 62 and 63 of a descriptor encode its swizzle in their own order.
static Swizzle swizzle_of(uint64_t descriptor) {
  switch (descriptor >> 62) {
    case 1:
      return Swizzle::Bytes128;
    case 2:
      return Swizzle::Bytes64;
    case 3:
      return Swizzle::Bytes32;
  }
  return Swizzle::None;
}

// The shared address of element (mn, k) of an operand. The layouts are the canonical ones of wgmma:
// core matrices of 8 rows by 16 bytes, or swizzle atoms of 8 rows by 32, 64 or 128 bytes, at the
// leading and stride byte offsets of the descriptor.
static uint32_t element_at(uint64_t descriptor, int mn, int k, bool mn_major) {
  const uint32_t start = (descriptor & 0x3fff) << 4;
  const uint32_t leading = (descriptor >> 16 & 0x3fff) << 4;
  const uint32_t stride = (descriptor >> 32 & 0x3fff) << 4;
  const Swizzle swizzle = swizzle_of(descriptor);
  // 16-byte chunks per row of an atom.
  const int chunks = 1 << static_cast<int>(swizzle);
  const uint32_t row_bytes = 16 * chunks;
  uint32_t offset;
  if (!mn_major) {
    offset = mn % 8 * row_bytes + mn / 8 * stride;
    offset += swizzle == Swizzle::None ? k / 8 * leading + k % 8 * 2 : k * 2;
  } else {
    const int chunk = mn / 8;
    offset = k % 8 * row_bytes + mn % 8 * 2;
    if (swizzle == Swizzle::None) {
      offset += chunk * stride + k / 8 * leading;
    } else {
      offset += chunk % chunks * 16 + chunk / chunks * leading + k / 8 * stride;
    }
  }
  return swizzled(start + offset, swizzle);
}

// Copies an operand into `out`: out[mn][16] if `rows`, else out[16][n].
static void gather(Block* block, uint64_t descriptor, int n, bool mn_major, bool rows,
                   uint16_t* out) {
  // The eight elements from (mn, k) on along the major dimension lie in one 16-byte chunk.
  const auto chunk = [&](int mn, int k, uint16_t* to) {
    const uint32_t at = element_at(descriptor, mn, k, mn_major);
    if (at % 16 != 0 || at + 16 > block->static_end) {
      fail("wgmma: shared address 0x%x of an operand lies outside of the block's shared memory",
           at);
    }
    tsan_read(block->shared + at, 16);
    TsanQuiet quiet;
    std::memcpy(to, block->shared + at, 16);
    return block->shared + at;
  };
  uint16_t eight[8];
  std::vector<const unsigned char*> chunks;
  for (int major = 0; major < (mn_major ? n : 16); major += 8) {
    for (int minor = 0; minor < (mn_major ? 16 : n); minor++) {
      const unsigned char* const at =
          chunk(mn_major ? major : minor, mn_major ? minor : major, eight);
      if (counter != nullptr) chunks.push_back(at);
      for (int i = 0; i < 8; i++) {
        const int mn = mn_major ? major + i : minor, k = mn_major ? minor : major + i;
        out[rows ? mn * 16 + k : k * n + mn] = eight[i];
      }
    }
  }
  if (counter != nullptr) counter->operand(chunks);
}

// ---- Execution ----

// Element i of a lane's fragment belongs to column 8(i/4) + 2(lane%4) + i%2 and, in the warp's 16
// rows, to row lane/4 + 8(i/2 % 2).
template <class F>
static void for_each_accumulator(GroupWgmma& op, float* c, F f) {
  const int n = op.operation.n;
  for (int warp = 0; warp < 4; warp++) {
    for (int lane = 0; lane < 32; lane++) {
      for (int i = 0; i < n / 2; i++) {
        const int row = 16 * warp + lane / 4 + 8 * (i / 2 % 2);
        f(op.d[warp][lane][i], c[row * n + 8 * (i / 4) + 2 * (lane % 4) + i % 2]);
      }
    }
  }
}

static void run(Block* block, WarpGroup& group, GroupWgmma& op) {
  if (op.done) return;
  op.done = true;
  AsUnit unit(group.unit);
  const Wgmma& w = op.operation;
  struct Scratch {
    uint16_t a16[64 * 16], b16[16 * 256];
    alignas(32) float a[64 * 16], b[16 * 256], c[64 * 256];
  };
  static thread_local std::vector<Scratch> scratch(1);
  Scratch& s = scratch[0];
  gather(block, w.a, 64, w.trans_a, true, s.a16);
  gather(block, w.b, w.n, w.trans_b, false, s.b16);
  tsan_release(&group.unit.done);
  TsanQuiet quiet;
  widen(s.a16, s.a, 64 * 16, w.half);
  widen(s.b16, s.b, 16 * w.n, w.half);
  if (w.scale_d) {
    for_each_accumulator(op, s.c, [](float& d, float& c) { c = d; });
  } else {
    std::memset(s.c, 0, sizeof(float) * 64 * w.n);
  }
  multiply_add(s.a, s.b, s.c, 64, w.n);
  for_each_accumulator(op, s.c, [](float& d, float& c) { d = c; });
}

static WarpGroup& group_of(const Warp* warp) { return current_block()->groups[warp->index / 4]; }

// Returns whether all four warps of the group have issued the wgmmas below `end`.
static bool issued_by_all(const WarpGroup& group, uint64_t end) {
  if (end <= group.retired) return true;
  return end - group.retired <= group.ops.size() &&
         group.ops[end - group.retired - 1].warps == ALL_WARPS;
}

static void run_up_to(WarpGroup& group, uint64_t end) {
  for (uint64_t i = group.retired; i < end; i++) {
    run(current_block(), group, group.ops[i - group.retired]);
  }
}

// ---- Issue ----

static bool same(const Wgmma& x, const Wgmma& y) {
  return x.a == y.a && x.b == y.b && x.n == y.n && x.scale_d == y.scale_d &&
         x.trans_a == y.trans_a && x.trans_b == y.trans_b && x.half == y.half;
}

struct WgmmaOp {
  Wgmma lane;
  Site site;

  static void apply(WgmmaOp** ops, uint32_t) {
    const Site site = ops[0]->site;
    Warp* const warp = current_fiber()->warp;
    for (int lane = 1; lane < 32; lane++) {
      if (!same(ops[lane]->lane, ops[0]->lane)) {
        fail("wgmma at %s:%d: lanes 0 and %d differ in a descriptor or flag", site.file, site.line,
             lane);
      }
    }
    WarpGroup& group = group_of(warp);
    const uint64_t number = warp->wgmmas++;
    if (number - group.retired == group.ops.size()) {
      const TsanQuiet quiet;
      group.ops.push_back({ops[0]->lane, {}, 0, false});
    }
    GroupWgmma& op = group.ops[number - group.retired];
    if (!same(op.operation, ops[0]->lane)) {
      fail("wgmma at %s:%d: the warps of a warp group differ in a descriptor or flag", site.file,
           site.line);
    }
    for (int lane = 0; lane < 32; lane++) op.d[warp->index % 4][lane] = ops[lane]->lane.d;
    op.warps |= 1u << warp->index % 4;
    tsan_release(&group.unit.issue);
    if (op.warps != ALL_WARPS) return;
    for (Warp* other : current_block()->warps) {
      if (other->index / 4 != warp->index / 4) continue;
      other->runnable |= other->at_wgmma;
      other->at_wgmma = 0;
    }
    if (act_now(Unit::Wgmma)) run_up_to(group, number + 1);
  }
};

void wgmma(const Wgmma& operation, Site site) {
  need(Feature::Wgmma, "wgmma", site);
  for (uint64_t descriptor : {operation.a, operation.b}) {
    if (descriptor >> 49 & 7) {
      fail(
          "wgmma at %s:%d: a descriptor with a base offset is not emulated; align tiles to their "
          "swizzle's pattern",
          site.file, site.line);
    }
  }
  if (current_block()->warps.size() / 4 <= current_fiber()->warp->index / 4) {
    fail("wgmma at %s:%d: the warp group has fewer than four warps", site.file, site.line);
  }
  WgmmaOp op{operation, site};
  warp_op(
      WHOLE_WARP, &op,
      [](void** ops, uint32_t mask) { WgmmaOp::apply(reinterpret_cast<WgmmaOp**>(ops), mask); },
      OrderMemory::No, "wgmma.mma_async", site);
}

void wgmma_fence(Site site) {
  need(Feature::Wgmma, "wgmma.fence", site);
  rendezvous_whole_warp("wgmma.fence", site);
}

void wgmma_commit(Site site) {
  need(Feature::Wgmma, "wgmma.commit_group", site);
  Nothing nothing;
  warp_op(
      WHOLE_WARP, &nothing,
      [](void**, uint32_t) {
        TsanQuiet quiet;
        Warp* const warp = current_fiber()->warp;
        warp->wgmma_groups.push_back(warp->wgmmas);
      },
      OrderMemory::No, "wgmma.commit_group", site);
}

void wgmma_wait(uint32_t groups_left, Site site) {
  need(Feature::Wgmma, "wgmma.wait_group", site);
  rendezvous_whole_warp("wgmma.wait_group", site);
  Fiber* const fiber = current_fiber();
  Warp* const warp = fiber->warp;
  WarpGroup& group = group_of(warp);
  if (warp->wgmma_groups.size() > groups_left) {
    const uint64_t end = warp->wgmma_groups[warp->wgmma_groups.size() - groups_left - 1];
    while (!issued_by_all(group, end)) {
      warp->at_wgmma |= 1u << fiber->lane;
      wait_here(State::Wgmma, "wgmma.wait_group (for the other warps of its group)", site);
    }
    run_up_to(group, end);
  }
  tsan_acquire(&group.unit.done);
  // All lanes must read their group number before any of them releases the groups.
  rendezvous_whole_warp("wgmma.wait_group", site);
  if (warp->wgmma_groups.size() > groups_left) {
    TsanQuiet quiet;
    warp->wgmma_groups.erase(warp->wgmma_groups.begin(), warp->wgmma_groups.end() - groups_left);
    // Drops the wgmmas that all four warps have issued and that have completed.
    while (!group.ops.empty() && group.ops.front().done) {
      group.ops.pop_front();
      group.retired++;
    }
  }
}

}  // namespace simt
