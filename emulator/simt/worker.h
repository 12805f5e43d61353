// The resources with which an operating system thread executes clusters: stacks, arenas and thread
// records.
#pragma once
#include <memory>
#include <vector>

#include "state.h"

namespace simt {

class Worker {
 public:
  Cluster cluster{};

  // Ensures that there are enough fibers, warps and blocks, and assigns them to the cluster.
  void reserve(size_t blocks, size_t threads_per_block);

 private:
  void reserve_fibers(size_t count);

  std::vector<std::unique_ptr<Fiber>> fibers_;
  std::vector<std::unique_ptr<Warp>> warps_;
  std::vector<std::unique_ptr<Block>> blocks_;
};

// A worker for the lifetime of the lease. Workers return to a pool and are never freed, since
// operating system threads come and go (test harnesses start one per test) and stacks are
// expensive.
class Lease {
 public:
  Lease();
  ~Lease();
  Lease(const Lease&) = delete;
  Lease& operator=(const Lease&) = delete;
  Worker& operator*() { return *worker_; }

 private:
  Worker* worker_;
};

}  // namespace simt
