// The sixteen barriers of a block: __syncthreads, its votes, and named barriers.
#include "state.h"

namespace simt {

static int expected_threads(const Block* block, const Barrier& barrier) {
  return barrier.expected != 0 ? barrier.expected : block->live;
}

// The last thread to arrive does not wait, but it counts.
static void count_barrier(Block* block, int id) {
  const Fiber* const last = current_fiber();
  for (Warp* warp : block->warps) {
    const uint32_t lanes = warp->at_barrier[id] | (warp == last->warp ? 1u << last->lane : 0);
    counter->warp_waits(warp, lanes, block->barrier[id].expected == 0);
  }
}

static void release(Block* block, int id) {
  Barrier& barrier = block->barrier[id];
  if (counter != nullptr) count_barrier(block, id);
  barrier.arrived = 0;
  barrier.expected = 0;
  barrier.phase++;
  for (Warp* warp : block->warps) {
    warp->runnable |= warp->at_barrier[id];
    warp->at_barrier[id] = 0;
  }
  made_progress();
}

// The instructions are `.aligned`: all lanes of a warp must wait at the same one.
static void check_aligned(const Fiber* fiber, int id, const char* kind, Site site) {
  const Warp* warp = fiber->warp;
  if (warp->at_barrier[id] == 0) return;
  const Fiber* other = warp->fiber[__builtin_ctz(warp->at_barrier[id])];
  if (other->site.line != site.line || other->site.file != site.file) {
    fail("divergent barrier: lane %u of warp %u is in %s at %s:%d, lane %u in %s at %s:%d",
         fiber->lane, warp->index, kind, site.file, site.line, other->lane, other->kind,
         other->site.file, other->site.line);
  }
}

// Records the caller's arrival and, if it waits, returns the votes of the phase.
static int arrive(int id, int threads, bool wait, int vote, const char* kind, Site site) {
  Fiber* const fiber = current_fiber();
  Block* const block = fiber->block;
  if (id < 0 || id > 15) {
    fail("%s at %s:%d: barrier %d does not exist (0 to 15)", kind, site.file, site.line, id);
  }
  if (threads < 0 || threads % 32 != 0) {
    fail("%s at %s:%d: a thread count of %d is not a multiple of 32", kind, site.file, site.line,
         threads);
  }
  Barrier& barrier = block->barrier[id];
  const uint32_t side = barrier.phase & 1;
  if (barrier.arrived == 0) {
    barrier.site = site;
    barrier.expected = threads;
    barrier.votes[side] = 0;
  } else if (barrier.expected != threads) {
    fail("%s at %s:%d: barrier %d expects %d threads here, %d at %s:%d", kind, site.file, site.line,
         id, threads, barrier.expected, barrier.site.file, barrier.site.line);
  }
  check_aligned(fiber, id, kind, site);
  if (counter != nullptr) counter->lane(WarpEvent::BlockBarrier, nullptr, 0, site);
  tsan_release(&barrier.tag[side]);
  barrier.votes[side] += vote;
  barrier.arrived++;
  if (barrier.arrived >= expected_threads(block, barrier)) {
    release(block, id);
    const int votes = barrier.votes[side];
    maybe_preempt();
    if (wait) tsan_acquire(&barrier.tag[side]);
    return votes;
  }
  if (!wait) {
    maybe_preempt();
    return 0;
  }
  fiber->warp->at_barrier[id] |= 1u << fiber->lane;
  fiber->barrier = id;
  wait_here(State::Barrier, kind, site);
  tsan_acquire(&barrier.tag[side]);
  return barrier.votes[side];
}

void barrier_arrive(int id, int threads, const char* kind, Site site) {
  arrive(id, threads, false, 0, kind, site);
}

void barrier_sync(int id, int threads, const char* kind, Site site) {
  arrive(id, threads, true, 0, kind, site);
}

int barrier_vote(Vote vote, bool predicate, const char* kind, Site site) {
  // The AND vote counts the threads whose predicate is false.
  const bool counted = vote == Vote::And ? !predicate : predicate;
  const int votes = arrive(0, 0, true, counted ? 1 : 0, kind, site);
  switch (vote) {
    case Vote::Count:
      return votes;
    case Vote::And:
      return votes == 0;
    case Vote::Or:
      return votes != 0;
  }
  return 0;
}

// A barrier of the whole block waits only for threads that have not exited.
void barriers_thread_exited(Block* block) {
  for (int id = 0; id < 16; id++) {
    Barrier& barrier = block->barrier[id];
    if (barrier.arrived != 0 && barrier.expected == 0 && barrier.arrived >= block->live) {
      release(block, id);
    }
  }
}

}  // namespace simt
