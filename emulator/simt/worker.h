// What an operating system thread needs to run clusters: stacks, arenas and the records of threads.
#pragma once
#include <memory>
#include <vector>

#include "state.h"

namespace simt {

class Worker {
 public:
  Cluster cluster{};

  // Makes sure that there are as many fibers, warps and blocks, and puts them into the cluster.
  void reserve(size_t blocks, size_t threads_per_block);

 private:
  void reserve_fibers(size_t count);

  std::vector<std::unique_ptr<Fiber>> fibers_;
  std::vector<std::unique_ptr<Warp>> warps_;
  std::vector<std::unique_ptr<Block>> blocks_;
};

// A worker for as long as the lease lives. Workers go back to a pool and are never freed, for
// operating system threads come and go (test harnesses start one per test) and stacks are dear.
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
