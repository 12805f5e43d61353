// The properties of the emulated device.
#pragma once
#include <cstddef>

namespace driver {

inline constexpr int DRIVER_VERSION = 13000;  // 1000 * major + 10 * minor
inline constexpr unsigned MAX_THREADS_PER_BLOCK = 1024;
inline constexpr unsigned MAX_BLOCK_Z = 64;
inline constexpr unsigned MAX_GRID_X = 0x7fffffff;
inline constexpr unsigned MAX_GRID_YZ = 65535;
inline constexpr size_t DEFAULT_SHARED_BYTES = 48 * 1024;  // without opting in to more
inline constexpr size_t TOTAL_MEMORY = size_t{16} << 30;
inline constexpr int LEAST_PRIORITY = 0, GREATEST_PRIORITY = -5;
inline constexpr unsigned MAX_CLUSTER = 8;  // the portable cluster size
// The host compiler allocates registers here; the reported number never limits occupancy.
inline constexpr int REPORTED_REGISTERS = 32;

struct DeviceProperties {
  int major, minor;
  const char* name;
  int multiprocessors;
  size_t shared_per_block_optin, shared_per_multiprocessor, l2_bytes;
  int threads_per_multiprocessor, blocks_per_multiprocessor;
  bool clusters, tma, wgmma;
};

// Chosen by MOE_EMULATOR_CC (8.0, 9.0 or 12.0) on first use in the process; nullptr if the variable
// has another value.
const DeviceProperties* device_properties();

// DRIVER_VERSION, or the older version in MOE_EMULATOR_DRIVER, read on first use in the process; 0
// if the variable has another value.
int driver_version();

}  // namespace driver
