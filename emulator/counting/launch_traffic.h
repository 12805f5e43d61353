// What one launch has touched and moved so far.
#pragma once
#include <atomic>
#include <cstdlib>
#include <memory>
#include <mutex>
#include <vector>

#include "state.h"

namespace simt {

constexpr uintptr_t SECTOR_BYTES = 32;

Traffic& operator+=(Traffic&, const Traffic&);

// Which of the sectors of an allocation were touched; made of zero pages until they are.
class SectorSet {
 public:
  explicit SectorSet(size_t sectors);
  void insert(size_t sector);
  uint64_t size() const;

 private:
  using Word = std::atomic<uint64_t>;
  struct Free {
    void operator()(Word* words) const { std::free(words); }
  };
  std::unique_ptr<Word[], Free> words_;
  size_t num_words_;
  std::atomic<bool> any_{false};
};

// An allocation as the launch finds it. What is allocated later is no business of its kernel.
struct Memory {
  DeviceRange range;
  SectorSet read, written;
  explicit Memory(DeviceRange range);
};

struct LaunchTraffic {
  std::vector<std::unique_ptr<Memory>> memories;  // by address
  std::mutex mutex;                               // of what follows
  Traffic total{};

  LaunchTraffic();
  Memory* find(uintptr_t address) const;  // nullptr: not device memory
  void count_unique_sectors();
};

}  // namespace simt
