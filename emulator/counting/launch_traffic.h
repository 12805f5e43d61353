// The memory that one launch has touched and moved so far.
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

// The sectors of an allocation that were touched; zero pages until then.
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

// An allocation at the start of the launch. Later allocations are not its kernel's.
struct Memory {
  DeviceRange range;
  SectorSet read, written;
  explicit Memory(DeviceRange range);
};

struct LaunchTraffic {
  std::vector<std::unique_ptr<Memory>> memories;  // by address
  std::mutex mutex;                               // guards the members below
  Traffic total{};

  LaunchTraffic();
  Memory* find(uintptr_t address) const;  // nullptr if it is not device memory
  void count_unique_sectors();
};

}  // namespace simt
