// The boundary between the SIMT runtime, which executes kernels, and its callers: the driver API in
// emulator/driver, and the C++ tests. The runtime's other headers are internal.
#pragma once
#include <cstddef>
#include <cstdint>

#include "types.h"

namespace simt {

// One launch. The cluster size {1, 1, 1} means no clusters. With os_threads = 1, equal
// configurations and inputs give the same schedule; seed 0 is the plain one, with threads in order
// and copies late.
struct LaunchConfig {
  dim3 grid, block, cluster;
  size_t shared_bytes;
  uint64_t seed;
  unsigned os_threads;
  // The number of blocks (or clusters, if any) to skip at the start of the grid: for kernels whose
  // blocks are independent, and tests of the last blocks of a grid that is too large to run.
  uint64_t left_out = 0;
};

// Offset and size of an argument in a kernel's parameter buffer, which is laid out as a C struct.
struct Parameter {
  size_t offset, size;
};

// An entry that EXPORT_KERNEL registered. `run` blocks until the grid has finished and returns 0,
// or -1 if the launch was refused or a thread failed in a way that is fatal on a GPU.
struct Kernel {
  const char* symbol;
  unsigned max_threads;
  unsigned num_parameters;
  const Parameter* parameters;
  int (*run)(const LaunchConfig&, void** arguments);
};

const Kernel* find_kernel(const char* symbol);  // nullptr if there is none
const Kernel* const* all_kernels(size_t* count);

// The full report of the last failed run of this OS thread.
const char* last_error();

// Device memory. It starts at a multiple of 256 and lies between two guard pages; a canary fills
// the bytes between its end and the guard page. Its initial bytes are 0xFF: NaN in every float
// type.
void* device_alloc(size_t bytes);  // nullptr if there is no memory
void device_free(void*);

// Returns whether [p, p + n) lies within one live allocation.
bool device_contains(const void* p, size_t n);

// The finding of the last device_free calls: a write between the end of an allocation and its guard
// page. nullptr if there was none since the last call; the text is valid until the caller's next
// call.
const char* take_memory_error();

// The traffic of a kernel's launches, if the library counts it. src/traffic.rs has the same structs
// and documents each number.
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

// The traffic of a kernel since the last reset. Returns false if the kernel was not launched, or if
// this library does not count.
bool kernel_traffic(const char* symbol, Traffic*);
void reset_traffic();

// The limits of the emulated device. A kernel that exceeds them is stopped with a report.
struct DeviceLimits {
  int major, minor;
  unsigned max_shared_bytes;
  bool clusters, tma, wgmma;
};
void set_device_limits(const DeviceLimits&);

// cuTensorMapEncodeTiled with its checks. The enumerations have the driver's values. Returns 0 or
// -1.
int tensor_map_encode_tiled(void* map128, int data_type, unsigned rank, void* base,
                            const uint64_t* dim, const uint64_t* stride_bytes, const uint32_t* box,
                            const uint32_t* element_stride, int interleave, int swizzle, int l2,
                            int oob_fill);

}  // namespace simt
