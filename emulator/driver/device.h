// What the emulated device is.
#pragma once
#include <cstddef>

namespace driver {

inline constexpr int DRIVER_VERSION = 13000;  // 1000 * major + 10 * minor
inline constexpr unsigned MAX_THREADS_PER_BLOCK = 1024;
inline constexpr unsigned MAX_BLOCK_Z = 64;
inline constexpr unsigned MAX_GRID_X = 0x7fffffff;
inline constexpr unsigned MAX_GRID_YZ = 65535;
inline constexpr size_t DEFAULT_SHARED_BYTES = 48 * 1024;  // for a launch that has not opted in
inline constexpr size_t TOTAL_MEMORY = size_t{16} << 30;
inline constexpr int LEAST_PRIORITY = 0, GREATEST_PRIORITY = -5;
inline constexpr unsigned MAX_CLUSTER = 8;  // what every device with clusters has
// The host compiler decides on registers here; a number that never limits occupancy is reported.
inline constexpr int REPORTED_REGISTERS = 32;

struct DeviceProperties {
  int major, minor;
  const char* name;
  int multiprocessors;
  size_t shared_per_block_optin, shared_per_multiprocessor, l2_bytes;
  int threads_per_multiprocessor, blocks_per_multiprocessor;
  bool clusters, tma, wgmma;
};

// Chosen by MOE_EMULATOR_CC (8.0, 9.0 or 12.0) when the process first asks; nullptr where the
// variable says something else.
const DeviceProperties* device_properties();

// DRIVER_VERSION, or the older one that MOE_EMULATOR_DRIVER names when the process first asks; 0 where the
// variable says something else.
int driver_version();

}  // namespace driver
