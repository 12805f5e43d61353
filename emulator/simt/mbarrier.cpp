// mbarriers: a phase completes when all arrivals and all expected bytes are in. The state is kept
// outside shared memory, which holds only a mark, so that overwriting it is detected.
#include "state.h"

namespace simt {

static constexpr uint64_t MARK = 0x6d62617272696572ull;

Mbarrier* find_mbarrier(Block* block, uint32_t address) {
  for (Mbarrier& m : block->mbarriers) {
    if (m.valid && m.address == address) return &m;
  }
  return nullptr;
}

Mbarrier& valid_mbarrier(Block* block, uint32_t address, const char* kind, Site site) {
  Mbarrier* const m = find_mbarrier(block, address);
  if (m == nullptr) {
    fail("%s at %s:%d: no mbarrier was initialised at shared address 0x%x", kind, site.file,
         site.line, address);
  }
  uint64_t mark;
  {
    const TsanQuiet quiet;
    std::memcpy(&mark, block->shared + address, sizeof mark);
  }
  if (mark != (MARK ^ address)) {
    fail("%s at %s:%d: the mbarrier at shared address 0x%x was overwritten", kind, site.file,
         site.line, address);
  }
  return *m;
}

void mbar_init(uint32_t bar, uint32_t count, Site site) {
  need(Feature::Sm90, "mbarrier", site);
  unsigned char* const at = shared_at(bar, 8, 8, "mbarrier.init", site);
  Block* const block = current_block();
  if (count == 0 || count >= 1u << 20) {
    fail("mbarrier.init at %s:%d: the count %u is out of range", site.file, site.line, count);
  }
  if (find_mbarrier(block, bar) != nullptr) {
    fail("mbarrier.init at %s:%d: shared address 0x%x holds a live mbarrier", site.file, site.line,
         bar);
  }
  TsanQuiet quiet;
  block->mbarriers.push_back(
      {bar, true, static_cast<int>(count), static_cast<int>(count), 0, 0, {}});
  const uint64_t mark = MARK ^ bar;
  std::memcpy(at, &mark, sizeof mark);
}

void mbar_inval(uint32_t bar, Site site) {
  valid_mbarrier(current_block(), bar, "mbarrier.inval", site).valid = false;
}

// Returns one of the threads that the completion woke.
static Fiber* complete_if_due(Block* block, Mbarrier& m) {
  if (m.pending != 0 || m.bytes != 0) return nullptr;
  Fiber* woken = nullptr;
  m.phase++;
  m.pending = m.count;
  made_progress();
  for (Fiber* fiber : cluster->fibers) {
    if (fiber->state == State::Mbarrier && fiber->block == block && fiber->address == m.address &&
        (m.phase & 1) != fiber->parity) {
      fiber->warp->runnable |= 1u << fiber->lane;
      woken = fiber;
    }
  }
  return woken;
}

static Fiber* arrive(Block* block, Mbarrier& m, const char* kind) {
  if (m.pending <= 0) {
    fail("%s: more arrivals than the count %d of the mbarrier at shared address 0x%x", kind,
         m.count, m.address);
  }
  tsan_release(&m.tag[m.phase & 1]);
  m.pending--;
  return complete_if_due(block, m);
}

void mbar_arrive(uint32_t bar, const char* kind, Site site) {
  uint32_t offset = bar;
  Block* const block = block_of(offset, kind, site);
  Mbarrier& m = valid_mbarrier(block, offset, kind, site);
  current_fiber()->site = site;
  maybe_hand_over(arrive(block, m, kind));
}

void mbar_expect_tx(uint32_t bar, uint32_t bytes, bool and_arrive, Site site) {
  const char* const kind = and_arrive ? "mbarrier.arrive.expect_tx" : "mbarrier.expect_tx";
  Block* const block = current_block();
  Mbarrier& m = valid_mbarrier(block, bar, kind, site);
  if (bytes >= 1u << 20) {
    fail("%s at %s:%d: %u bytes exceed the limit of %u", kind, site.file, site.line, bytes,
         (1u << 20) - 1);
  }
  m.bytes += bytes;
  if (and_arrive) {
    arrive(block, m, kind);
  } else {
    complete_if_due(block, m);
  }
  maybe_preempt();
}

// An arrival on behalf of an asynchronous operation, whose issue has been checked.
void mbar_arrive_on(Block* block, uint32_t address, const char* kind) {
  Mbarrier* const m = find_mbarrier(block, address);
  if (m == nullptr) fail("%s: the mbarrier at shared address 0x%x no longer exists", kind, address);
  arrive(block, *m, kind);
}

void mbar_bytes_arrived(Block* block, uint32_t address, uint32_t bytes) {
  Mbarrier* const m = find_mbarrier(block, address);
  if (m == nullptr) fail("TMA load: the mbarrier at shared address 0x%x no longer exists", address);
  tsan_release(&m->tag[m->phase & 1]);
  m->bytes -= bytes;
  complete_if_due(block, *m);
}

// The mbarrier at `bar` of the caller's block; only threads of that block may wait for it.
static Mbarrier& waitable_mbarrier(uint32_t bar, Site site) {
  uint32_t offset = bar;
  Block* const block = block_of(offset, "mbarrier.try_wait", site);
  if (block != current_block()) {
    fail("mbarrier.try_wait at %s:%d: the mbarrier belongs to another block", site.file, site.line);
  }
  return valid_mbarrier(block, offset, "mbarrier.try_wait", site);
}

static bool completed(Mbarrier& m, uint32_t parity) {
  if ((m.phase & 1) == (parity & 1)) return false;
  tsan_acquire(&m.tag[(m.phase - 1) & 1]);
  return true;
}

bool mbar_test(uint32_t bar, uint32_t parity, Site site) {
  Mbarrier& m = waitable_mbarrier(bar, site);
  if (completed(m, parity)) return true;
  current_fiber()->kind = "mbarrier.try_wait";
  current_fiber()->site = site;
  yield_thread();
  return completed(m, parity);
}

void mbar_wait(uint32_t bar, uint32_t parity, Site site) {
  Mbarrier& m = waitable_mbarrier(bar, site);
  if (completed(m, parity)) {
    maybe_preempt();
    return;
  }
  Fiber* const fiber = current_fiber();
  fiber->address = m.address;
  fiber->parity = parity & 1;
  // The phase may have advanced, even twice, before the thread runs; the thread acquires the phase
  // that woke it.
  const uint32_t phase = m.phase;
  wait_here(State::Mbarrier, "mbarrier.try_wait", site);
  tsan_acquire(&m.tag[phase & 1]);
}

}  // namespace simt
