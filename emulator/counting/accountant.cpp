// The Counter of this library: keeps the traffic of running launches separate and adds finished
// launches up by kernel.
#include "counter.h"

#include <map>
#include <string>

#include "warp_traffic.h"

namespace simt {
namespace {

WarpTraffic& running_warp() { return *current_fiber()->warp->traffic; }

// Operations are identified by their names in reports.
void count_operation(WarpOperations& operations, const char* kind) {
  const auto starts = [kind](const char* with) {
    return std::strncmp(kind, with, std::strlen(with)) == 0;
  };
  if (starts("__shfl")) {
    operations.shuffles++;
  } else if (starts("mma.sync") || starts("wgmma.mma_async")) {
    operations.matrix_multiplications++;
  } else if (starts("ldmatrix")) {
    operations.matrix_loads++;
  } else if (starts("stmatrix")) {
    operations.matrix_stores++;
  } else if (starts("__reduce")) {
    operations.reductions++;
  } else if (starts("__ballot") || starts("__any") || starts("__all")) {
    operations.votes++;
  } else if (starts("__match")) {
    operations.matches++;
  } else if (starts("__syncwarp")) {
    operations.warp_barriers++;
  }
}

class Accountant final : public Counter {
 public:
  Accountant() { counter = this; }

  LaunchTraffic* launch_begins() override { return new LaunchTraffic; }

  void cluster_begins() override {
    for (Warp* warp : cluster->warps) {
      if (warp->traffic == nullptr) warp->traffic = new WarpTraffic;  // never freed, like the warp
      warp->traffic->begin(warp->live);
    }
  }

  void cluster_ends() override {
    LaunchTraffic& launch = *cluster->traffic;
    Traffic sum{};
    for (Warp* warp : cluster->warps) {
      warp->traffic->complete_requests(launch);
      sum += warp->traffic->total;
    }
    const std::lock_guard<std::mutex> lock(launch.mutex);
    launch.total += sum;
  }

  void launch_ends(LaunchTraffic* ended, const Kernel& kernel, const LaunchConfig& config,
                   bool failed) override {
    const std::unique_ptr<LaunchTraffic> launch(ended);
    if (failed) return;
    const auto volume = [](const dim3& d) { return uint64_t{d.x} * d.y * d.z; };
    launch->total.launches = 1;
    launch->total.blocks = volume(config.grid);
    launch->total.warps = volume(config.grid) * ((volume(config.block) + 31) / 32);
    launch->count_unique_sectors();
    const std::lock_guard<std::mutex> lock(mutex_);
    kernels_[kernel.symbol] += launch->total;
  }

  void lane(WarpEvent event, const void* at, uint32_t bytes, Site site) override {
    running_warp().add({event, site.file, site.line}, current_fiber()->lane,
                       reinterpret_cast<uintptr_t>(at), bytes);
  }

  void warp_operation(Warp* warp, const char* kind, uint32_t mask) override {
    count_operation(warp->traffic->total.operations, kind);
    if (warp->traffic->is_whole_warp(mask)) warp->traffic->complete_requests(*cluster->traffic);
  }

  void warp_waits(Warp* warp, uint32_t lanes, bool with_exited) override {
    if (with_exited || warp->traffic->is_whole_warp(lanes)) {
      warp->traffic->complete_requests(*cluster->traffic);
    }
  }

  void operand(const std::vector<const unsigned char*>& chunks) override {
    running_warp().count_operand(chunks);
  }

  void bulk(WarpEvent event, const std::vector<ByteRange>& ranges) override {
    running_warp().count_bulk(*cluster->traffic, event, ranges);
  }

  bool traffic(const char* symbol, Traffic* traffic) override {
    const std::lock_guard<std::mutex> lock(mutex_);
    const auto found = kernels_.find(symbol);
    if (found == kernels_.end()) return false;
    *traffic = found->second;
    return true;
  }

  void reset() override {
    const std::lock_guard<std::mutex> lock(mutex_);
    kernels_.clear();
  }

 private:
  std::mutex mutex_;
  std::map<std::string, Traffic> kernels_;
};

// Never destroyed: a launch may still run during process exit.
Accountant& accountant = *new Accountant;

}  // namespace
}  // namespace simt
