// The boundary between the SIMT runtime, which runs kernels, and whoever launches them: the driver
// API of emulator/driver, or a C++ test. Nothing else of the runtime is meant for them.
#pragma once
#include <cstddef>
#include <cstdint>

#include "types.h"

namespace simt {

// One launch. A cluster of {1, 1, 1} is none. Equal configurations on equal inputs run the same
// schedule when os_threads is 1; seed 0 is the plain one, threads in order and copies late.
struct LaunchConfig {
  dim3 grid, block, cluster;
  size_t shared_bytes;
  uint64_t seed;
  unsigned os_threads;
  // The first so many blocks (clusters, where there are any) are left out: for kernels whose blocks do not depend on
  // one another, and tests that look at the last ones of a grid too large to run.
  uint64_t left_out = 0;
};

// Where an argument lies in the parameter buffer of a kernel, which is laid out as a C struct.
struct Parameter {
  size_t offset, size;
};

// An entry that EXPORT_KERNEL registered. `run` blocks until the grid has finished and returns 0,
// or -1 when the launch was refused or a thread did something that a GPU would not survive.
struct Kernel {
  const char* symbol;
  unsigned max_threads;
  unsigned num_parameters;
  const Parameter* parameters;
  int (*run)(const LaunchConfig&, void** arguments);
};

const Kernel* find_kernel(const char* symbol);  // nullptr if there is none
const Kernel* const* all_kernels(size_t* count);

// The full report of this OS thread's last failed run.
const char* last_error();

// Device memory. It starts at a multiple of 256 and lies between two guard pages; what separates
// its end from the guard page is filled with a canary. Its content is 0xFF: NaN in every float
// type.
void* device_alloc(size_t bytes);  // nullptr if there is no memory
void device_free(void*);

// Whether [p, p + n) lies within one live allocation.
bool device_contains(const void* p, size_t n);

// What the last device_free calls found: a write between the end of an allocation and its guard
// page. nullptr if nothing was found since the last call; the text is the caller's until its next.
const char* take_memory_error();

// What the launches of a kernel have moved, where the library counts it. src/traffic.rs has the
// same structs and says what each number means.
struct GlobalTraffic {
  uint64_t bytes, requests, sectors, unique_sectors;
};
struct SharedTraffic {
  uint64_t requests, wavefronts, ideal_wavefronts;
};
struct WarpOperations {
  uint64_t shuffles, votes, reductions, matches, matrix_multiplications, matrix_loads,
      matrix_stores, warp_barriers, block_barriers, global_atomics, shared_atomics;
};
struct Traffic {
  uint64_t launches, blocks, warps;
  GlobalTraffic global_read, global_write;
  SharedTraffic shared_read, shared_write;
  WarpOperations operations;
};

// The traffic of a kernel since the last reset; false if it was not launched, or if this library
// does not count.
bool kernel_traffic(const char* symbol, Traffic*);
void reset_traffic();

// What the emulated device can do. A kernel that goes beyond it is stopped with a report.
struct DeviceLimits {
  int major, minor;
  unsigned max_shared_bytes;
  bool clusters, tma, wgmma;
};
void set_device_limits(const DeviceLimits&);

// cuTensorMapEncodeTiled with its checks. The enumerations are the driver's numbers. 0 or -1.
int tensor_map_encode_tiled(void* map128, int data_type, unsigned rank, void* base,
                            const uint64_t* dim, const uint64_t* stride_bytes, const uint32_t* box,
                            const uint32_t* element_stride, int interleave, int swizzle, int l2,
                            int oob_fill);

}  // namespace simt
