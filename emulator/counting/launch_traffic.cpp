#include "launch_traffic.h"

#include <algorithm>

namespace simt {

Traffic& operator+=(Traffic& sum, const Traffic& more) {
  constexpr size_t COUNTS = sizeof(Traffic) / sizeof(uint64_t);
  static_assert(COUNTS * sizeof(uint64_t) == sizeof(Traffic), "all members are counts");
  uint64_t a[COUNTS], b[COUNTS];
  std::memcpy(a, &sum, sizeof a);
  std::memcpy(b, &more, sizeof b);
  for (size_t i = 0; i < COUNTS; i++) a[i] += b[i];
  std::memcpy(&sum, a, sizeof a);
  return sum;
}

SectorSet::SectorSet(size_t sectors) : num_words_((sectors + 63) / 64) {
  words_.reset(static_cast<Word*>(std::calloc(num_words_, sizeof(Word))));
  if (words_ == nullptr) std::abort();
}

void SectorSet::insert(size_t sector) {
  Word& word = words_[sector / 64];
  const uint64_t bit = uint64_t{1} << sector % 64;
  if (word.load(std::memory_order_relaxed) & bit) return;
  word.fetch_or(bit, std::memory_order_relaxed);
  any_.store(true, std::memory_order_relaxed);
}

uint64_t SectorSet::size() const {
  if (!any_) return 0;
  uint64_t count = 0;
  for (size_t i = 0; i < num_words_; i++) count += __builtin_popcountll(words_[i]);
  return count;
}

static size_t sectors_of(DeviceRange range) {
  return (range.end - range.begin + SECTOR_BYTES - 1) / SECTOR_BYTES;
}

Memory::Memory(DeviceRange given)
    : range(given), read(sectors_of(given)), written(sectors_of(given)) {}

LaunchTraffic::LaunchTraffic() {
  for (const DeviceRange range : device_ranges()) {
    memories.push_back(std::make_unique<Memory>(range));
  }
}

Memory* LaunchTraffic::find(uintptr_t address) const {
  const auto above = std::upper_bound(
      memories.begin(), memories.end(), address,
      [](uintptr_t a, const std::unique_ptr<Memory>& memory) { return a < memory->range.begin; });
  if (above == memories.begin()) return nullptr;
  Memory* const memory = std::prev(above)->get();
  return address < memory->range.end ? memory : nullptr;
}

void LaunchTraffic::count_unique_sectors() {
  for (const auto& memory : memories) {
    total.global_read.unique_sectors += memory->read.size();
    total.global_write.unique_sectors += memory->written.size();
  }
}

}  // namespace simt
