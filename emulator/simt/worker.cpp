#include "worker.h"

#include <sys/mman.h>

#include <cstdlib>
#include <mutex>

namespace simt {

#if defined(SIMT_ASAN) || defined(SIMT_TSAN)
static constexpr size_t STACK_BYTES = 256 << 10;
#else
static constexpr size_t STACK_BYTES = 64 << 10;
#endif

// Memory without reservation, which uses no pages until it is touched.
static unsigned char* map_pages(size_t bytes) {
  void* const p = mmap(nullptr, bytes, PROT_READ | PROT_WRITE,
                       MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (p == MAP_FAILED) std::abort();
  return static_cast<unsigned char*>(p);
}

void Worker::reserve_fibers(size_t count) {
  if (fibers_.size() >= count) return;
  const size_t more = (count - fibers_.size() + 31) / 32 * 32;
  unsigned char* const stacks = map_pages(more * STACK_BYTES);
  for (size_t i = 0; i < more; i++) {
    auto fiber = std::make_unique<Fiber>();
    fiber->stack = stacks + i * STACK_BYTES;
    fiber->stack_bytes = STACK_BYTES;
    mprotect(fiber->stack, PAGE, PROT_NONE);  // An overflow faults.
#if defined(SIMT_TSAN)
    fiber->tsan = __tsan_create_fiber(0);
#endif
    fibers_.push_back(std::move(fiber));
  }
}

void Worker::reserve(size_t blocks, size_t threads_per_block) {
  const size_t warps_per_block = (threads_per_block + 31) / 32;
  reserve_fibers(blocks * threads_per_block);
  while (warps_.size() < blocks * warps_per_block) warps_.push_back(std::make_unique<Warp>());
  while (blocks_.size() < blocks) {
    auto block = std::make_unique<Block>();
    unsigned char* const pages = map_pages(ARENA_BYTES + 2 * PAGE);
    mprotect(pages, PAGE, PROT_NONE);
    mprotect(pages + PAGE + ARENA_BYTES, PAGE, PROT_NONE);
    block->shared = pages + PAGE;
    blocks_.push_back(std::move(block));
  }
  cluster.fibers.clear();
  cluster.warps.clear();
  cluster.blocks.clear();
  for (size_t i = 0; i < blocks * threads_per_block; i++)
    cluster.fibers.push_back(fibers_[i].get());
  for (size_t i = 0; i < blocks * warps_per_block; i++) cluster.warps.push_back(warps_[i].get());
  for (size_t i = 0; i < blocks; i++) cluster.blocks.push_back(blocks_[i].get());
}

static std::mutex& pool_mutex() {
  static auto* mutex = new std::mutex;
  return *mutex;
}

static std::vector<Worker*>& pool() {
  static auto* workers = new std::vector<Worker*>;
  return *workers;
}

Lease::Lease() {
  const std::lock_guard<std::mutex> lock(pool_mutex());
  if (pool().empty()) {
    worker_ = new Worker;
  } else {
    worker_ = pool().back();
    pool().pop_back();
  }
}

Lease::~Lease() {
  const std::lock_guard<std::mutex> lock(pool_mutex());
  pool().push_back(worker_);
}

}  // namespace simt
