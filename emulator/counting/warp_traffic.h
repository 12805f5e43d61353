// The requests of a warp. Its lanes run one after another, so a request is assembled from the
// accesses of each lane: the n-th execution of an instruction by one lane belongs to the n-th
// execution of it by the others. Where all lanes rendezvous, counting restarts.
#pragma once
#include <unordered_map>
#include <vector>

#include "launch_traffic.h"

namespace simt {

// An instruction of a kernel: a return address, or a file and a line; and the part, if it is split
// into several accesses.
struct InstructionPart {
  WarpEvent event;
  const void* where;
  int part;
  bool operator==(const InstructionPart& other) const {
    return event == other.event && where == other.where && part == other.part;
  }
};

struct InstructionPartHash {
  size_t operator()(const InstructionPart& instruction) const {
    const size_t address = reinterpret_cast<size_t>(instruction.where);
    return (address * 16 + static_cast<size_t>(instruction.event)) * 0x9e3779b97f4a7c15ull +
           static_cast<size_t>(instruction.part);
  }
};

struct Request {
  uint32_t lanes = 0;  // that move bytes
  uintptr_t at[32];
  uint32_t bytes[32];
};

struct WarpTraffic {
  Traffic total{};  // of the running cluster

  void begin(uint32_t lanes);
  void add(const InstructionPart& instruction, uint32_t lane, uintptr_t at, uint32_t bytes);
  bool is_whole_warp(uint32_t lanes) const { return (lanes & all_) == all_; }
  // All lanes are at one place: their requests so far are complete.
  void complete_requests(const LaunchTraffic& launch);

  // One request of a unit that does not act per lane.
  void count_bulk(const LaunchTraffic& launch, WarpEvent event,
                  const std::vector<ByteRange>& ranges);
  void count_operand(const std::vector<const unsigned char*>& chunks);

 private:
  struct Executions {
    uint32_t count[32];  // by lane
    std::vector<Request> requests;
  };
  using Entry = std::pair<const InstructionPart, Executions>;

  void complete(const LaunchTraffic& launch, WarpEvent event, const Request& request);

  std::unordered_map<InstructionPart, Executions, InstructionPartHash> executions_;
  std::vector<Entry*> active_;  // those with requests
  uint32_t all_ = 0;            // the lanes at the start of the warp
};

}  // namespace simt
