// The scheduler: which thread runs next, and when asynchronous operations happen. The launch's seed
// decides everything that CUDA leaves unspecified.
#include "state.h"

#include <thread>

namespace simt {

// xorshift64.
uint64_t next_random() {
  uint64_t x = cluster->random;
  x ^= x << 13;
  x ^= x >> 7;
  x ^= x << 17;
  return cluster->random = x;
}

// The high bits are of better quality.
static bool one_in_power(int bits) { return next_random() >> (64 - bits) == 0; }
static uint32_t random_below(size_t n) { return static_cast<uint32_t>((next_random() >> 32) % n); }

bool act_now(Unit unit) {
  switch (cluster->async_time[static_cast<int>(unit)]) {
    case AsyncTime::Eager:
      return true;
    case AsyncTime::Late:
      return false;
    case AsyncTime::Mixed:
      break;
  }
  return one_in_power(1);
}

void run_one_async() {
  const bool shuffled = cluster->order == Order::Random || cluster->order == Order::Priority;
  const uint32_t i = shuffled ? random_below(cluster->async.size()) : 0;
  Async operation;
  {
    TsanQuiet quiet;
    operation = cluster->async[i];
    cluster->async.erase(cluster->async.begin() + i);
  }
  if (operation.kind == Async::Load) {
    run_load(operation);
  } else {
    const AsThread as(operation.fiber->tsan);
    run_copies(operation.fiber, operation.copies);
    mbar_arrive_on(operation.block, operation.bar, "cp.async.mbarrier.arrive");
  }
}

static Fiber* pick_lane(const Warp* warp) {
  const uint32_t runnable = warp->runnable;
  switch (cluster->order) {
    case Order::InOrder:
      return warp->fiber[__builtin_ctz(runnable)];
    case Order::Reversed:
      return warp->fiber[31 - __builtin_clz(runnable)];
    case Order::Random:
    case Order::Priority:
      break;
  }
  const int first = static_cast<int>(next_random() >> 59);
  const uint32_t rotated = first == 0 ? runnable : runnable >> first | runnable << (32 - first);
  return warp->fiber[(__builtin_ctz(rotated) + first) & 31];
}

static Fiber* pick_runnable() {
  std::vector<Warp*>& warps = cluster->warps;
  const uint32_t n = static_cast<uint32_t>(warps.size());
  const bool random = cluster->order == Order::Random || cluster->order == Order::Priority;
  if (random && !cluster->async.empty() && one_in_power(3)) run_one_async();

  if (cluster->order == Order::Priority) {  // Strict priorities, redrawn occasionally.
    if (one_in_power(9)) {
      for (uint32_t i = n - 1; i > 0; i--) std::swap(warps[i], warps[random_below(i + 1)]);
    }
    for (Warp* warp : warps) {
      if (warp->runnable != 0) return pick_lane(warp);
    }
    return nullptr;
  }

  if (cluster->order == Order::Random && one_in_power(4)) cluster->position = random_below(n);
  for (uint32_t i = 0; i < n; i++) {
    uint32_t at = cluster->position + i;
    if (at >= n) at -= n;
    if (warps[at]->runnable != 0) {
      cluster->position = at;
      return pick_lane(warps[at]);
    }
  }
  return nullptr;
}

Fiber* pick_next() {
  for (;;) {
    if (Fiber* fiber = pick_runnable()) return fiber;
    if (cluster->async.empty()) return nullptr;
    run_one_async();
  }
}

void wait_here(State state, const char* kind, Site site) {
  Fiber* const fiber = current_fiber();
  fiber->state = state;
  fiber->kind = kind;
  fiber->site = site;
  fiber->warp->runnable &= ~(1u << fiber->lane);
  Fiber* const next = pick_next();
  if (next == nullptr) fail_with(deadlock_report());
  if (next != fiber) switch_to(fiber, next);
  fiber->state = State::Running;
}

void maybe_preempt() {
  if (cluster->order == Order::InOrder || cluster->order == Order::Reversed) return;
  // Priorities have an effect only if a thread with a higher one runs soon.
  if (!one_in_power(cluster->order == Order::Priority ? 1 : 3)) return;
  Fiber* const fiber = current_fiber();
  Fiber* const next = pick_next();
  if (next != fiber) switch_to(fiber, next);
}

// The thread that has waited longest for a phase acts first on its completion: this schedule shows
// whether the phase completed too early.
void maybe_hand_over(Fiber* to) {
  if (to == nullptr || cluster->config->seed == 0 || !one_in_power(1)) {
    maybe_preempt();
  } else if (to != current_fiber()) {
    switch_to(current_fiber(), to);
  }
}

void yield_thread() {
  // With one operating system thread no other thread can change the polled memory.
  const uint64_t limit = cluster->config->os_threads > 1 ? 20000000 : 1000000;
  if (++cluster->polls > limit) {
    fail_with("livelock: " + std::to_string(limit) + " polls without progress\n" +
              deadlock_report());
  }
  Fiber* const fiber = current_fiber();
  const uint32_t bit = 1u << fiber->lane;
  fiber->warp->runnable &= ~bit;
  Fiber* const next = pick_next();
  fiber->warp->runnable |= bit;
  if (next == nullptr) {
    std::this_thread::yield();
  } else if (next != fiber) {
    switch_to(fiber, next);
  }
}

void memory_fence() {
  __atomic_thread_fence(__ATOMIC_SEQ_CST);
  maybe_preempt();
}

}  // namespace simt
