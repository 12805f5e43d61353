// cp.async: copies from global to shared memory. Each completes between its issue and the wait for
// it; the seed decides when.
#include "state.h"

namespace simt {

static void run_copy(Copy& copy) {
  if (copy.done) return;
  copy.done = true;
  tsan_read(copy.src, copy.src_bytes);
  tsan_write(copy.dst, copy.bytes);
  TsanQuiet quiet;
  if (copy.src_bytes != 0) std::memcpy(copy.dst, copy.src, copy.src_bytes);
  std::memset(copy.dst + copy.src_bytes, 0, copy.bytes - copy.src_bytes);
}

// Performs the thread's copies whose number is below `end`.
void run_copies(Fiber* fiber, uint64_t end) {
  Copies& copies = fiber->copies;
  for (uint64_t i = copies.retired; i < end && i - copies.retired < copies.ops.size(); i++) {
    run_copy(copies.ops[i - copies.retired]);
  }
}

static uint64_t issued(const Copies& copies) { return copies.retired + copies.ops.size(); }

void cp_async(uint32_t dst, const void* src, uint32_t bytes, uint32_t src_bytes, Site site) {
  if (reinterpret_cast<uintptr_t>(src) % bytes != 0) {
    fail("cp.async at %s:%d: global address %p is not %u-byte aligned", site.file, site.line, src,
         bytes);
  }
  if (src_bytes > bytes) {
    fail("cp.async at %s:%d: src_bytes %u exceeds the copy size %u", site.file, site.line,
         src_bytes, bytes);
  }
  unsigned char* const to = shared_at(dst, bytes, bytes, "cp.async", site);
  Copies& copies = current_fiber()->copies;
  {
    TsanQuiet quiet;
    copies.ops.push_back({to, static_cast<const unsigned char*>(src), bytes, src_bytes, false});
  }
  if (counter != nullptr) {
    counter->lane(WarpEvent::GlobalRead, src, src_bytes, site);
    counter->lane(WarpEvent::SharedWrite, to, bytes, site);
  }
  // Records the issue: a fault is then reported where the copy was issued, not where it happens.
  current_fiber()->kind = "cp.async";
  current_fiber()->site = site;
  if (act_now(Unit::Copy)) run_copy(copies.ops.back());
}

void cp_async_commit() {
  TsanQuiet quiet;
  Copies& copies = current_fiber()->copies;
  copies.groups.push_back(issued(copies));
}

void cp_async_wait(uint32_t groups_left) {
  Fiber* const fiber = current_fiber();
  Copies& copies = fiber->copies;
  if (copies.groups.size() <= groups_left) return;
  const size_t groups = copies.groups.size() - groups_left;
  const uint64_t end = copies.groups[groups - 1];
  run_copies(fiber, end);
  TsanQuiet quiet;
  copies.ops.erase(copies.ops.begin(), copies.ops.begin() + (end - copies.retired));
  copies.groups.erase(copies.groups.begin(), copies.groups.begin() + groups);
  copies.retired = end;
}

void cp_async_mbar_arrive(uint32_t bar, Site site) {
  Fiber* const fiber = current_fiber();
  uint32_t offset = bar;
  Block* const block = block_of(offset, "cp.async.mbarrier.arrive", site);
  Mbarrier& m = valid_mbarrier(block, offset, "cp.async.mbarrier.arrive", site);
  // The arrival comes after this thread's earlier operations, whichever thread performs it.
  tsan_release(&m.tag[m.phase & 1]);
  const uint64_t end = issued(fiber->copies);
  if (act_now(Unit::Copy)) {
    run_copies(fiber, end);
    mbar_arrive_on(block, offset, "cp.async.mbarrier.arrive");
    return;
  }
  TsanQuiet quiet;
  Async arrival{};
  arrival.kind = Async::CopyArrive;
  arrival.block = block;
  arrival.bar = offset;
  arrival.fiber = fiber;
  arrival.copies = end;
  cluster->async.push_back(arrival);
}

void copies_thread_exiting(Fiber* fiber) { run_copies(fiber, issued(fiber->copies)); }

}  // namespace simt
