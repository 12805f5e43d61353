// Observation of kernels that the environment requests: a log of kernel names, and a planted fault
// in one kernel's results.
#include <fcntl.h>
#include <unistd.h>

#include <cstdlib>
#include <cstring>
#include <set>

#include "api.h"

namespace driver {
namespace {

Outcome failure(const std::string& report) { return {CUDA_ERROR_LAUNCH_FAILED, report}; }

const char* environment(const char* name) {
  const char* text = std::getenv(name);
  return text && *text ? text : nullptr;
}

// MOE_EMULATOR_LAUNCHES=FILE: appends a kernel's name after its first run in this process.
// Processes may share the file: each line is a single write.
Outcome log_launch(const simt::Kernel& kernel) {
  static const char* const path = environment("MOE_EMULATOR_LAUNCHES");
  if (!path) return {};
  static std::mutex mutex;
  static std::set<const simt::Kernel*> logged;
  std::lock_guard<std::mutex> lock(mutex);
  if (!logged.insert(&kernel).second) return {};
  const std::string line = std::string(kernel.symbol) + "\n";
  const int file = open(path, O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0666);
  const bool written =
      file >= 0 && write(file, line.data(), line.size()) == static_cast<ssize_t>(line.size());
  if (file >= 0) close(file);
  return written ? Outcome()
                 : failure("MOE_EMULATOR_LAUNCHES: " + std::string(path) + " cannot be written");
}

// MOE_EMULATOR_FAULT=flip:KERNEL: after each run, inverts bit 14 of the memory at the kernel's
// first output, whose address is the first field of its parameter. In an f32 this changes the value
// by 2^-9 of it; in a 16-bit float it is the highest bit of the exponent.
Outcome flip_bit(const simt::Kernel& kernel, const std::vector<void*>& arguments) {
  CUdeviceptr output = 0;
  if (!arguments.empty() && kernel.parameters[0].size >= sizeof output) {
    std::memcpy(&output, arguments[0], sizeof output);
  }
  Lock lock(state().mutex);
  if (!find_allocation(output, sizeof(uint16_t))) {
    return failure("MOE_EMULATOR_FAULT: the parameter of '" + std::string(kernel.symbol) +
                   "' does not begin with an address of device memory");
  }
  bytes_at(output)[1] ^= 0x40;
  return {};
}

// MOE_EMULATOR_FAULT=fail:KERNEL: the launch fails.
Outcome plant_fault(const simt::Kernel& kernel, const std::vector<void*>& arguments) {
  static const char* const fault = environment("MOE_EMULATOR_FAULT");
  if (!fault) return {};
  const char* const colon = std::strchr(fault, ':');
  const std::string kind = colon ? std::string(fault, colon) : fault;
  const bool known = kind == "flip" || kind == "fail";
  if (!known || !colon || !simt::find_kernel(colon + 1)) {
    return failure("MOE_EMULATOR_FAULT is '" + std::string(fault) +
                   "', expected flip:KERNEL or fail:KERNEL with the name of a kernel");
  }
  if (std::strcmp(kernel.symbol, colon + 1) != 0) return {};
  if (kind == "flip") return flip_bit(kernel, arguments);
  return failure("kernel '" + std::string(kernel.symbol) +
                 "' fails as requested by MOE_EMULATOR_FAULT");
}

}  // namespace

Outcome after_run(const simt::Kernel& kernel, const std::vector<void*>& arguments) {
  const Outcome logged = log_launch(kernel);
  return logged.error ? logged : plant_fault(kernel, arguments);
}

}  // namespace driver
