// Warp operations: a rendezvous of the lanes in a mask; the last lane to arrive acts for all.
#include "state.h"

namespace simt {

// All lanes of `lanes` have arrived. They must be at the same operation with the same mask.
static void complete(Warp* warp, uint32_t leader, uint32_t lanes) {
  const Arrival& a = warp->arrival[leader];
  SIMT_FOR_EACH_LANE(lane, lanes) {
    const Arrival& b = warp->arrival[lane];
    if (b.mask != a.mask || b.apply != a.apply) {
      fail(
          "divergent warp operation: lane %u is in %s (mask %08x) at %s:%d, "
          "lane %u in %s (mask %08x) at %s:%d",
          leader, a.kind, a.mask, a.site.file, a.site.line, lane, b.kind, b.mask, b.site.file,
          b.site.line);
    }
  }
  a.apply(warp->operands, lanes);
  if (counter != nullptr) counter->warp_operation(warp, a.kind, a.mask);
  warp->sync_phase++;
  warp->pending &= ~lanes;
  warp->runnable |= lanes;
  made_progress();
}

void warp_op(uint32_t mask, void* operands, WarpFn apply, OrderMemory order, const char* kind,
             Site site) {
  Fiber* const fiber = current_fiber();
  Warp* const warp = fiber->warp;
  const uint32_t lane = fiber->lane, bit = 1u << lane;
  if ((mask & bit) == 0) {
    fail("%s at %s:%d: mask %08x does not contain the calling lane %u", kind, site.file, site.line,
         mask, lane);
  }
  warp->arrival[lane] = {operands, apply, mask, kind, site};
  warp->operands[lane] = operands;
  warp->pending |= bit;
  void* const tag = &warp->sync_tag[warp->sync_phase & 1];
  // Shuffles order no memory accesses, so that the race checker finds code that relies on them for
  // it.
  if (order == OrderMemory::Yes) tsan_release(tag);
  const uint32_t needed = mask & warp->live;
  if ((warp->pending & needed) == needed) {
    complete(warp, lane, needed);
    maybe_preempt();
  } else {
    wait_here(State::Warp, kind, site);
  }
  if (order == OrderMemory::Yes) tsan_acquire(tag);
}

// Lanes that have exited are not waited for.
void warp_lane_exited(Warp* warp) {
  if (warp->pending == 0) return;
  const uint32_t leader = __builtin_ctz(warp->pending);
  const uint32_t needed = warp->arrival[leader].mask & warp->live;
  if (needed != 0 && (warp->pending & needed) == needed) complete(warp, leader, needed);
}

void rendezvous_whole_warp(const char* kind, Site site) {
  Nothing op;
  rendezvous(0xffffffffu, op, OrderMemory::No, kind, site);
}

bool elect(Site site) {
  rendezvous_whole_warp("elect.sync", site);
  // Which lane is elected is unspecified, except that it is always the same one.
  const uint64_t seed = cluster->config->seed;
  const uint32_t elected =
      seed == 0 ? 0 : static_cast<uint32_t>(seed * 0x9e3779b97f4a7c15ull >> 59);
  return current_fiber()->lane == elected;
}

}  // namespace simt
