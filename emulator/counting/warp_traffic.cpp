#include "warp_traffic.h"

#include <algorithm>

namespace simt {

// ---- Assembling requests ----

void WarpTraffic::begin(uint32_t lanes) {
  total = {};
  all_ = lanes;
}

void WarpTraffic::add(const InstructionPart& instruction, uint32_t lane, uintptr_t at,
                      uint32_t bytes) {
  Entry& entry = *executions_.try_emplace(instruction).first;
  Executions& executions = entry.second;
  if (executions.requests.empty()) {
    std::fill(std::begin(executions.count), std::end(executions.count), 0);
    active_.push_back(&entry);
  }
  const uint32_t n = executions.count[lane]++;
  if (n == executions.requests.size()) executions.requests.emplace_back();
  if (bytes == 0) return;
  Request& request = executions.requests[n];
  request.lanes |= 1u << lane;
  request.at[lane] = at;
  request.bytes[lane] = bytes;
}

void WarpTraffic::complete_requests(const LaunchTraffic& launch) {
  for (Entry* entry : active_) {
    for (const Request& request : entry->second.requests) {
      complete(launch, entry->first.event, request);
    }
    entry->second.requests.clear();
  }
  active_.clear();
}

// ---- Global memory ----

// The different sectors of a request. Neighbouring lanes often share them.
class Sectors {
 public:
  void add(uintptr_t at, size_t bytes) {
    for (uintptr_t s = at / SECTOR_BYTES; s <= (at + bytes - 1) / SECTOR_BYTES; s++) {
      if (all_.empty() || all_.back() != s) all_.push_back(s);
    }
  }
  const std::vector<uintptr_t>& different() {
    std::sort(all_.begin(), all_.end());
    all_.erase(std::unique(all_.begin(), all_.end()), all_.end());
    return all_;
  }
  void clear() { all_.clear(); }

 private:
  std::vector<uintptr_t> all_;
};

static void touch(const LaunchTraffic& launch, uintptr_t sector, bool read, bool written) {
  const uintptr_t at = sector * SECTOR_BYTES;
  Memory* const memory = launch.find(at);
  if (memory == nullptr) return;
  const size_t number = (at - memory->range.begin) / SECTOR_BYTES;
  if (read) memory->read.insert(number);
  if (written) memory->written.insert(number);
}

static void count_global(const LaunchTraffic& launch, GlobalTraffic& traffic, uint64_t bytes,
                         const std::vector<uintptr_t>& sectors, bool written) {
  traffic.requests++;
  traffic.bytes += bytes;
  traffic.sectors += sectors.size();
  for (const uintptr_t sector : sectors) touch(launch, sector, !written, written);
}

// ---- Shared memory ----

// One pass through the banks: the wavefronts are the most different words that one bank delivers.
class Wavefront {
 public:
  void add(uintptr_t at, uint32_t bytes) {
    for (uintptr_t word = at / 4; word <= (at + bytes - 1) / 4; word++) {
      uintptr_t* const end = words_ + num_words_;
      if (std::find(words_, end, word) != end) continue;
      words_[num_words_++] = word;
      depth_ = std::max(depth_, ++in_bank_[word % BANKS]);
    }
  }
  uint32_t depth() const { return depth_; }

 private:
  static constexpr uint32_t BANKS = 32;
  uintptr_t words_[2 * BANKS];  // 128 bytes; twice as many words if no lane is aligned
  uint32_t num_words_ = 0, in_bank_[BANKS] = {}, depth_ = 0;
};

// A warp moves at most 128 bytes at a time: 4 bytes for all lanes, 8 for 16 of them, 16 for 8.
static void count_shared(SharedTraffic& traffic, const Request& request) {
  uint32_t widest = 0;
  SIMT_FOR_EACH_LANE(lane, request.lanes) widest = std::max(widest, request.bytes[lane]);
  const uint32_t together = widest <= 4 ? 32 : widest <= 8 ? 16 : 8;
  const uint32_t first_lanes = together == 32 ? 0xffffffffu : (1u << together) - 1;
  traffic.requests++;
  for (uint32_t first = 0; first < 32; first += together) {
    const uint32_t lanes = request.lanes & first_lanes << first;
    if (lanes == 0) continue;
    Wavefront wavefront;
    SIMT_FOR_EACH_LANE(lane, lanes) wavefront.add(request.at[lane], request.bytes[lane]);
    traffic.wavefronts += wavefront.depth();
    traffic.ideal_wavefronts++;
  }
}

void WarpTraffic::count_operand(const std::vector<const unsigned char*>& chunks) {
  total.shared_read.requests++;
  for (size_t first = 0; first < chunks.size(); first += 8) {
    Wavefront wavefront;
    for (size_t i = first; i < first + 8; i++) {
      wavefront.add(reinterpret_cast<uintptr_t>(chunks[i]), 16);
    }
    total.shared_read.wavefronts += wavefront.depth();
    total.shared_read.ideal_wavefronts++;
  }
}

// ---- Counting requests ----

void WarpTraffic::complete(const LaunchTraffic& launch, WarpEvent event, const Request& request) {
  if (event == WarpEvent::BlockBarrier) total.operations.block_barriers++;
  if (request.lanes == 0) return;
  if (event == WarpEvent::SharedAtomic) total.operations.shared_atomics++;
  if (event == WarpEvent::SharedRead) count_shared(total.shared_read, request);
  if (event == WarpEvent::SharedWrite) count_shared(total.shared_write, request);
  if (event > WarpEvent::GlobalAtomic) return;

  static thread_local Sectors sectors;
  sectors.clear();
  uint64_t bytes = 0;
  SIMT_FOR_EACH_LANE(lane, request.lanes) {
    sectors.add(request.at[lane], request.bytes[lane]);
    bytes += request.bytes[lane];
  }
  if (event == WarpEvent::GlobalAtomic) {
    total.operations.global_atomics++;
    for (const uintptr_t sector : sectors.different()) touch(launch, sector, true, true);
  } else {
    const bool written = event == WarpEvent::GlobalWrite;
    count_global(launch, written ? total.global_write : total.global_read, bytes,
                 sectors.different(), written);
  }
}

void WarpTraffic::count_bulk(const LaunchTraffic& launch, WarpEvent event,
                             const std::vector<ByteRange>& ranges) {
  Sectors sectors;
  uint64_t bytes = 0;
  for (const ByteRange& range : ranges) {
    sectors.add(reinterpret_cast<uintptr_t>(range.at), range.bytes);
    bytes += range.bytes;
  }
  if (bytes == 0) return;
  const bool written = event == WarpEvent::GlobalWrite;
  count_global(launch, written ? total.global_write : total.global_read, bytes, sectors.different(),
               written);
}

}  // namespace simt
