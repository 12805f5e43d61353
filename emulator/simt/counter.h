// Whom the runtime tells what memory traffic its threads cause. In a library that counts
// (emulator/counting) that is a Counter; in every other one `counter` is nullptr, and so nobody.
#pragma once
#include <cstddef>
#include <cstdint>
#include <vector>

#include "runtime.h"
#include "thread.h"

namespace simt {

struct Fiber;
struct Warp;
struct LaunchTraffic;

// What the lanes of a warp do together: the unit of all counts.
enum class Deed : uint8_t {
  GlobalRead,
  GlobalWrite,
  GlobalAtomic,
  SharedRead,
  SharedWrite,
  SharedAtomic,
  BlockBarrier,
};

// Consecutive bytes.
struct Run {
  const unsigned char* at;
  size_t bytes;
};

class Counter {
 public:
  // A launch, and the clusters that run for it, each on one operating system thread with
  // cluster->traffic as given by launch_begins.
  virtual LaunchTraffic* launch_begins() = 0;
  virtual void cluster_begins() = 0;
  virtual void cluster_ends() = 0;
  // A launch that failed leaves no counts.
  virtual void launch_ends(LaunchTraffic*, const Kernel&, const LaunchConfig&, bool failed) = 0;

  // The running lane's part of a deed of its warp at `site`. With 0 bytes it takes part and moves
  // nothing.
  virtual void lane(Deed, const void* at, uint32_t bytes, Site site) = 0;
  // An operation of a whole warp has taken place, for the lanes of `mask`.
  virtual void warp_operation(Warp*, const char* kind, uint32_t mask) = 0;
  // These lanes are at a barrier that opens, and so are, `with_exited`, all that have not exited.
  virtual void warp_waits(Warp*, uint32_t lanes, bool with_exited) = 0;

  // A tensor core reads an operand from shared memory: chunks of 16 bytes, eight at a time.
  virtual void operand(const std::vector<const unsigned char*>& chunks) = 0;
  // The running thread copies these runs of bytes of global memory at once.
  virtual void bulk(Deed, const std::vector<Run>&) = 0;

  // What the launches of a kernel have caused since the last reset; false if there were none.
  virtual bool traffic(const char* symbol, Traffic*) = 0;
  virtual void reset() = 0;

 protected:
  ~Counter() = default;
};

// Set by the initialisers of a library that counts.
extern Counter* counter;

}  // namespace simt
