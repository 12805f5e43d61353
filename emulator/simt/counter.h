// The interface through which the runtime reports memory traffic. The counting library
// (emulator/counting) implements it; in every other library `counter` is nullptr.
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

// Events that the lanes of a warp cause together: the unit of all counts.
enum class WarpEvent : uint8_t {
  GlobalRead,
  GlobalWrite,
  GlobalAtomic,
  SharedRead,
  SharedWrite,
  SharedAtomic,
  BlockBarrier,
};

// Consecutive bytes.
struct ByteRange {
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

  // The running lane's part of an event of its warp at `site`. With 0 bytes the lane takes part and
  // moves no memory.
  virtual void lane(WarpEvent, const void* at, uint32_t bytes, Site site) = 0;
  // A warp-wide operation has completed for the lanes of `mask`.
  virtual void warp_operation(Warp*, const char* kind, uint32_t mask) = 0;
  // These lanes wait at a barrier that opens. With `with_exited` they are all lanes that have not
  // exited.
  virtual void warp_waits(Warp*, uint32_t lanes, bool with_exited) = 0;

  // A tensor core reads an operand from shared memory: chunks of 16 bytes, eight at a time.
  virtual void operand(const std::vector<const unsigned char*>& chunks) = 0;
  // The running thread copies these ranges of global memory at once.
  virtual void bulk(WarpEvent, const std::vector<ByteRange>&) = 0;

  // The traffic of a kernel's launches since the last reset; false if there were none.
  virtual bool traffic(const char* symbol, Traffic*) = 0;
  virtual void reset() = 0;

 protected:
  ~Counter() = default;
};

// Set by the initialisers of the counting library.
extern Counter* counter;

}  // namespace simt
