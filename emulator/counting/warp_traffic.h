// The requests of a warp. Its lanes run one after another, so a request is put together from what
// each of them did: the n-th execution of an instruction by one lane belongs to the n-th execution
// of it by the others. Where all lanes meet, counting starts anew.
#pragma once
#include <unordered_map>
#include <vector>

#include "launch_traffic.h"

namespace simt {

// An instruction of a kernel: a return address, or a file and a line of it; and which part, if it
// is split into several accesses.
struct Spot {
  Deed deed;
  const void* where;
  int part;
  bool operator==(const Spot& other) const {
    return deed == other.deed && where == other.where && part == other.part;
  }
};

struct SpotHash {
  size_t operator()(const Spot& spot) const {
    const size_t address = reinterpret_cast<size_t>(spot.where);
    return (address * 16 + static_cast<size_t>(spot.deed)) * 0x9e3779b97f4a7c15ull +
           static_cast<size_t>(spot.part);
  }
};

struct Request {
  uint32_t lanes = 0;  // that move something
  uintptr_t at[32];
  uint32_t bytes[32];
};

struct WarpTraffic {
  Traffic total{};  // of the running cluster

  void begin(uint32_t lanes);
  void add(const Spot& spot, uint32_t lane, uintptr_t at, uint32_t bytes);
  bool is_whole_warp(uint32_t lanes) const { return (lanes & all_) == all_; }
  // All lanes are at one place: what they have done so far is complete.
  void lanes_meet(const LaunchTraffic& launch);

  // One request of a unit that does not act by lanes.
  void count_bulk(const LaunchTraffic& launch, Deed deed, const std::vector<Run>& runs);
  void count_operand(const std::vector<const unsigned char*>& chunks);

 private:
  struct Executions {
    uint32_t count[32];  // by lane
    std::vector<Request> requests;
  };
  using Entry = std::pair<const Spot, Executions>;

  void complete(const LaunchTraffic& launch, Deed deed, const Request& request);

  std::unordered_map<Spot, Executions, SpotHash> spots_;
  std::vector<Entry*> active_;  // those with requests
  uint32_t all_ = 0;            // the lanes that the warp began with
};

}  // namespace simt
