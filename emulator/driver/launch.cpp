// Kernel launches: the driver's checks, the copy of the arguments, and the execution.
#include <cstring>
#include <numeric>

#include "api.h"
#include "device.h"

namespace driver {
namespace {

struct Launch {
  dim3 grid, block, cluster;
  size_t shared_bytes = 0;
};

// The arguments at the time of the launch: one buffer with the layout of the kernel's parameters.
struct Arguments {
  std::vector<unsigned char> buffer;
  std::vector<void*> pointers;
};

size_t buffer_size(const simt::Kernel& kernel) {
  if (kernel.num_parameters == 0) return 0;
  const simt::Parameter& last = kernel.parameters[kernel.num_parameters - 1];
  return last.offset + last.size;
}

// Reads the `extra` list: key, value, ..., end.
CUresult packed_buffer(void** extra, const void** buffer, size_t* size) {
  *buffer = nullptr;
  *size = 0;
  for (; extra[0] != reinterpret_cast<void*>(CU_LAUNCH_PARAM_END); extra += 2) {
    if (extra[0] == reinterpret_cast<void*>(CU_LAUNCH_PARAM_BUFFER_POINTER)) {
      *buffer = extra[1];
    } else if (extra[0] == reinterpret_cast<void*>(CU_LAUNCH_PARAM_BUFFER_SIZE)) {
      *size = *static_cast<const size_t*>(extra[1]);
    } else {
      return CUDA_ERROR_INVALID_VALUE;
    }
  }
  return *buffer || *size == 0 ? CUDA_SUCCESS : CUDA_ERROR_INVALID_VALUE;
}

CUresult copy_arguments(const simt::Kernel& kernel, void** parameters, void** extra,
                        Arguments* arguments) {
  if (parameters && extra) return CUDA_ERROR_INVALID_VALUE;
  arguments->buffer.resize(buffer_size(kernel));
  // Kernels read their parameters in place, so the buffer has the alignment of the strictest
  // parameter: 64 bytes for a tensor map; 128 leaves a margin.
  constexpr size_t ALIGNMENT = 128;
  arguments->buffer.resize(arguments->buffer.size() + ALIGNMENT);
  auto start = reinterpret_cast<uintptr_t>(arguments->buffer.data());
  unsigned char* base = arguments->buffer.data() + (ALIGNMENT - start % ALIGNMENT) % ALIGNMENT;
  if (extra) {
    const void* packed;
    size_t size;
    if (CUresult error = packed_buffer(extra, &packed, &size)) return error;
    if (size != buffer_size(kernel)) return CUDA_ERROR_INVALID_VALUE;
    if (size) std::memcpy(base, packed, size);
  } else if (kernel.num_parameters != 0 && !parameters) {
    return CUDA_ERROR_INVALID_VALUE;
  }
  for (unsigned i = 0; i < kernel.num_parameters; i++) {
    const simt::Parameter& parameter = kernel.parameters[i];
    if (!extra) {
      if (!parameters[i]) return CUDA_ERROR_INVALID_VALUE;
      std::memcpy(base + parameter.offset, parameters[i], parameter.size);
    }
    arguments->pointers.push_back(base + parameter.offset);
  }
  return CUDA_SUCCESS;
}

bool contains(const std::string& text, const char* word) {
  return text.find(word) != std::string::npos;
}

// Maps the runtime's report to one of the driver's few codes.
CUresult classify(const std::string& report) {
  if (contains(report, "aligned")) return CUDA_ERROR_MISALIGNED_ADDRESS;
  if (contains(report, "not supported on compute capability"))
    return CUDA_ERROR_ILLEGAL_INSTRUCTION;
  if (contains(report, "invalid access") && !contains(report, "stack overflow")) {
    return CUDA_ERROR_ILLEGAL_ADDRESS;
  }
  return CUDA_ERROR_LAUNCH_FAILED;
}

// The bytes between the end of an allocation and the next guard page belong to no allocation.
// Comparing them before and after a launch finds writes too near for the guard page, and names the
// kernel that made them. The allocations are those that an aligned 8-byte word of a parameter, a
// pointer or a struct, points into.
struct Tail {
  unsigned parameter;
  size_t offset;  // of the word, in bytes from the start of the parameter
  uintptr_t start;
  size_t size;
  std::vector<unsigned char> before;
};

constexpr size_t GRANULARITY = 256;  // of allocations

const unsigned char* tail_of(uintptr_t start, size_t size) {
  return reinterpret_cast<const unsigned char*>(start) + size;
}

size_t tail_bytes(size_t size) { return (GRANULARITY - size % GRANULARITY) % GRANULARITY; }

std::vector<Tail> find_tails(const simt::Kernel& kernel, const Arguments& arguments) {
  std::vector<Tail> tails;
  Lock lock(state().mutex);
  for (unsigned i = 0; i < kernel.num_parameters; i++) {
    const auto* parameter = static_cast<const unsigned char*>(arguments.pointers[i]);
    const size_t size = kernel.parameters[i].size;
    for (size_t offset = 0; offset + sizeof(CUdeviceptr) <= size; offset += sizeof(CUdeviceptr)) {
      CUdeviceptr address;
      std::memcpy(&address, parameter + offset, sizeof address);
      uintptr_t start;
      const Allocation* allocation = find_allocation(address, 0, &start, true);
      if (!allocation) continue;
      const unsigned char* tail = tail_of(start, allocation->size);
      tails.push_back(
          {i, offset, start, allocation->size, {tail, tail + tail_bytes(allocation->size)}});
    }
  }
  return tails;
}

std::string find_overrun(const simt::Kernel& kernel, const std::vector<Tail>& tails) {
  Lock lock(state().mutex);
  for (const Tail& tail : tails) {
    uintptr_t start;
    const Allocation* allocation = find_allocation(tail.start, 0, &start, true);
    // Skips memory that another stream has freed meanwhile: the runtime owns it again.
    if (!allocation || start != tail.start || allocation->size != tail.size) continue;
    const unsigned char* now = tail_of(tail.start, tail.size);
    for (size_t i = 0; i < tail.before.size(); i++) {
      if (now[i] == tail.before[i]) continue;
      return "kernel '" + std::string(kernel.symbol) + "' wrote byte " + std::to_string(i) +
             " past the end of an allocation of " + std::to_string(tail.size) +
             " bytes, which its parameter " + std::to_string(tail.parameter) + " at byte " +
             std::to_string(tail.offset) + " points into (or another kernel did at the same time)";
    }
  }
  return "";
}

Outcome run(const simt::Kernel& kernel, const Launch& launch, const Arguments& arguments,
            const Operation& operation) {
  simt::LaunchConfig config{launch.grid,         launch.block,   launch.cluster,
                            launch.shared_bytes, operation.seed, operation.os_threads,
                            operation.left_out};
  std::vector<Tail> tails = find_tails(kernel, arguments);
  // Two OS threads may run the same arguments of a graph at once.
  std::vector<void*> pointers = arguments.pointers;
  if (kernel.run(config, pointers.data()) != 0) {
    const char* report = simt::last_error();
    Outcome outcome{CUDA_ERROR_LAUNCH_FAILED, report ? report : "no report"};
    outcome.error = classify(outcome.report);
    return outcome;
  }
  std::string overrun = find_overrun(kernel, tails);
  if (!overrun.empty()) return {CUDA_ERROR_ILLEGAL_ADDRESS, overrun};
  return after_run(kernel, arguments.pointers);
}

CUresult check_cluster(const Launch& launch) {
  const dim3& cluster = launch.cluster;
  if (cluster.x == 0 || cluster.y == 0 || cluster.z == 0) return CUDA_ERROR_INVALID_VALUE;
  uint64_t size = uint64_t{cluster.x} * cluster.y * cluster.z;
  if (size == 1) return CUDA_SUCCESS;
  if (!device_properties()->clusters) return CUDA_ERROR_INVALID_CLUSTER_SIZE;
  bool divides = launch.grid.x % cluster.x == 0 && launch.grid.y % cluster.y == 0 &&
                 launch.grid.z % cluster.z == 0;
  return size <= MAX_CLUSTER && divides ? CUDA_SUCCESS : CUDA_ERROR_INVALID_CLUSTER_SIZE;
}

CUresult check_launch(const Function& function, const Launch& launch) {
  const dim3 &grid = launch.grid, &block = launch.block;
  if (grid.x == 0 || grid.y == 0 || grid.z == 0) return CUDA_ERROR_INVALID_VALUE;
  if (grid.x > MAX_GRID_X || grid.y > MAX_GRID_YZ || grid.z > MAX_GRID_YZ) {
    return CUDA_ERROR_INVALID_VALUE;
  }
  if (block.x == 0 || block.y == 0 || block.z == 0) return CUDA_ERROR_INVALID_VALUE;
  if (block.x > MAX_THREADS_PER_BLOCK || block.y > MAX_THREADS_PER_BLOCK || block.z > MAX_BLOCK_Z) {
    return CUDA_ERROR_INVALID_VALUE;
  }
  uint64_t threads = uint64_t{block.x} * block.y * block.z;
  if (threads > MAX_THREADS_PER_BLOCK || threads > function.kernel->max_threads) {
    return CUDA_ERROR_INVALID_VALUE;
  }
  if (launch.shared_bytes > function.max_dynamic_shared) return CUDA_ERROR_INVALID_VALUE;
  return check_cluster(launch);
}

CUresult launch_kernel(CUfunction handle, const Launch& launch, CUstream stream_handle,
                       void** parameters, void** extra) {
  Call call;
  if (call.error) return call.error;
  auto function = call.driver.functions.find(handle);
  StreamPtr stream = find_stream(call, stream_handle);
  if (!function || !stream) return CUDA_ERROR_INVALID_HANDLE;
  if (function->context != stream->context) return CUDA_ERROR_INVALID_CONTEXT;
  if (CUresult error = check_launch(*function, launch)) return error;
  const simt::Kernel* kernel = function->kernel;
  auto arguments = std::make_shared<Arguments>();
  if (CUresult error = copy_arguments(*kernel, parameters, extra, arguments.get())) return error;
  if (!stream->capture) call.driver.counters.launches++;
  Submission submission;
  submission.task = {CU_GRAPH_NODE_TYPE_KERNEL,
                     make_work([kernel, launch, arguments](const Operation& operation) {
                       return run(*kernel, launch, *arguments, operation);
                     })};
  return submit(call, stream, std::move(submission));
}

}  // namespace
}  // namespace driver

using namespace driver;

DRIVER_API CUresult cuLaunchKernel(CUfunction function, unsigned grid_x, unsigned grid_y,
                                   unsigned grid_z, unsigned block_x, unsigned block_y,
                                   unsigned block_z, unsigned shared_bytes, CUstream stream,
                                   void** parameters, void** extra) {
  Launch launch;
  launch.grid = dim3(grid_x, grid_y, grid_z);
  launch.block = dim3(block_x, block_y, block_z);
  launch.shared_bytes = shared_bytes;
  return launch_kernel(function, launch, stream, parameters, extra);
}

DRIVER_API CUresult cuLaunchKernelEx(const CUlaunchConfig* config, CUfunction function,
                                     void** parameters, void** extra) {
  if (!config || (config->num_attributes && !config->attributes)) return CUDA_ERROR_INVALID_VALUE;
  Launch launch;
  launch.grid = dim3(config->grid_x, config->grid_y, config->grid_z);
  launch.block = dim3(config->block_x, config->block_y, config->block_z);
  launch.shared_bytes = config->shared_bytes;
  const DeviceProperties* device = device_properties();
  for (unsigned i = 0; device && i < config->num_attributes; i++) {
    const CUlaunchAttribute& attribute = config->attributes[i];
    switch (attribute.id) {
      case CU_LAUNCH_ATTRIBUTE_IGNORE:
        break;
      case CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION:
        launch.cluster =
            dim3(attribute.value.cluster.x, attribute.value.cluster.y, attribute.value.cluster.z);
        break;
      case CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION:
        // Stream order is the strictest schedule that the attribute permits.
        if (attribute.value.flag && device->major < 9) {
          return not_supported("programmatic stream serialization below 9.0");
        }
        break;
      case CU_LAUNCH_ATTRIBUTE_PRIORITY:
        if (attribute.value.priority < GREATEST_PRIORITY ||
            attribute.value.priority > LEAST_PRIORITY) {
          return CUDA_ERROR_INVALID_VALUE;
        }
        break;
      default: {
        std::string name = "launch attribute " + std::to_string(attribute.id);
        return not_supported(name.c_str());
      }
    }
  }
  return launch_kernel(function, launch, config->stream, parameters, extra);
}
