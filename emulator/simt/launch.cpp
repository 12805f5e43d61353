// Launches: the checks, the order of the blocks, and the execution of each cluster.
#include <pthread.h>

#include <algorithm>
#include <atomic>
#include <cstdio>
#include <mutex>
#include <thread>

#include "worker.h"

namespace simt {

static thread_local std::string t_error;

const char* last_error() { return t_error.c_str(); }

// ---- The device ----

static DeviceLimits g_limits{9, 0, 227 * 1024, true, true, true};

void set_device_limits(const DeviceLimits& limits) { g_limits = limits; }
const DeviceLimits& device_limits() { return g_limits; }

void need(Feature feature, const char* what, Site site) {
  bool there = false;
  switch (feature) {
    case Feature::Sm90:
      there = g_limits.major >= 9;
      break;
    case Feature::Clusters:
      there = g_limits.clusters;
      break;
    case Feature::Tma:
      there = g_limits.tma;
      break;
    case Feature::Wgmma:
      there = g_limits.wgmma;
      break;
  }
  if (!there) {
    fail("%s at %s:%d: not supported on compute capability %d.%d", what, site.file, site.line,
         g_limits.major, g_limits.minor);
  }
}

// ---- The table of kernels ----

static std::vector<const Kernel*>& table() {
  static auto* kernels = new std::vector<const Kernel*>;
  return *kernels;
}

void register_kernel(const Kernel* kernel) { table().push_back(kernel); }

const Kernel* const* all_kernels(size_t* count) {
  *count = table().size();
  return table().data();
}

const Kernel* find_kernel(const char* symbol) {
  for (const Kernel* kernel : table()) {
    if (std::strcmp(kernel->symbol, symbol) == 0) return kernel;
  }
  return nullptr;
}

// ---- One cluster ----

static uint64_t count(const dim3& d) { return static_cast<uint64_t>(d.x) * d.y * d.z; }

static void prepare_warp(Warp* warp, uint32_t index, uint32_t lanes) {
  warp->index = index;
  warp->live = warp->runnable = lanes == 32 ? 0xffffffffu : (1u << lanes) - 1;
  warp->pending = warp->at_cluster_barrier = warp->at_wgmma = warp->sync_phase = 0;
  std::fill(std::begin(warp->at_barrier), std::end(warp->at_barrier), 0);
  warp->wgmmas = 0;
  warp->wgmma_groups.clear();
}

static void prepare_thread(Fiber* fiber, Block* block, Warp* warp, uint32_t linear) {
  const dim3& size = block->block_dim;
  fiber->thread_idx = {linear % size.x, linear / size.x % size.y, linear / (size.x * size.y)};
  fiber->lane = linear % 32;
  fiber->linear = linear;
  fiber->block = block;
  fiber->warp = warp;
  fiber->state = State::Running;
  fiber->kind = "nothing";
  fiber->site = {"-", 0};
  fiber->cluster_arrived = false;
  fiber->copies.ops.clear();
  fiber->copies.groups.clear();
  fiber->copies.retired = 0;
  fiber->stores.ops.clear();
  fiber->stores.groups.clear();
  fiber->stores.retired = 0;
  fiber->fake_stack = nullptr;
  warp->fiber[fiber->lane] = fiber;
  asan_unpoison(fiber->stack + 4096, fiber->stack_bytes - 4096);
  prepare_fiber(fiber);
}

static void prepare_block(Cluster& c, uint32_t rank, const uint3& first_block) {
  const LaunchConfig& config = *c.config;
  const uint32_t threads = static_cast<uint32_t>(count(config.block)), warps = (threads + 31) / 32;
  Block* const block = c.blocks[rank];
  block->block_idx = {first_block.x + rank % config.cluster.x,
                      first_block.y + rank / config.cluster.x % config.cluster.y,
                      first_block.z + rank / (config.cluster.x * config.cluster.y)};
  block->block_dim = config.block;
  block->grid_dim = config.grid;
  block->cluster_rank = rank;
  block->cluster_size = static_cast<uint32_t>(c.blocks.size());
  block->dynamic_bytes = static_cast<uint32_t>(config.shared_bytes);
  block->live = static_cast<int>(threads);
  block->mbarriers.clear();
  std::memset(block->barrier, 0, sizeof block->barrier);
  block->groups.resize(std::max<size_t>(block->groups.size(), (warps + 3) / 4));
  for (WarpGroup& group : block->groups) {
    group.ops.clear();
    group.retired = 0;
  }
  prepare_shared(block);
  block->warps.clear();
  for (uint32_t i = 0; i < warps; i++) {
    Warp* const warp = c.warps[rank * warps + i];
    block->warps.push_back(warp);
    prepare_warp(warp, i, std::min(32u, threads - i * 32));
    for (uint32_t t = i * 32; t < std::min(threads, (i + 1) * 32); t++) {
      prepare_thread(c.fibers[rank * threads + t], block, warp, t);
    }
  }
}

// Draws everything that CUDA leaves unspecified. Seed 0 is the plain schedule, with copies as late
// as possible.
static void draw_schedule(Cluster& c, uint64_t number) {
  const uint64_t seed = c.config->seed;
  c.random = (seed + 1) * 0x9e3779b97f4a7c15ull ^ (number + 1) * 0xd1b54a32d192ed03ull;
  if (c.random == 0) c.random = 1;
  for (int i = 0; i < 4; i++) next_random();
  c.order = Order::InOrder;
  for (AsyncTime& time : c.async_time) time = AsyncTime::Late;
  if (seed == 0) return;
  c.order = static_cast<Order>(next_random() >> 62);
  for (AsyncTime& time : c.async_time) time = static_cast<AsyncTime>(next_random() % 3);
  // In half of the schedules Hopper's units act at the most harmful time: loads at once, the others
  // late.
  if (next_random() >> 63) {
    c.async_time[static_cast<int>(Unit::Load)] = AsyncTime::Eager;
    c.async_time[static_cast<int>(Unit::Store)] = AsyncTime::Late;
    c.async_time[static_cast<int>(Unit::Wgmma)] = AsyncTime::Late;
  }
  if (c.order == Order::Reversed) std::reverse(c.warps.begin(), c.warps.end());
  if (c.order == Order::Random || c.order == Order::Priority) {
    for (size_t i = c.warps.size() - 1; i > 0; i--) {
      std::swap(c.warps[i], c.warps[next_random() % (i + 1)]);
    }
  }
}

static void find_own_stack([[maybe_unused]] Fiber& main) {
#if defined(SIMT_ASAN)
  pthread_attr_t attributes;
  void* low;
  pthread_getattr_np(pthread_self(), &attributes);
  pthread_attr_getstack(&attributes, &low, &main.stack_bytes);
  pthread_attr_destroy(&attributes);
  main.stack = static_cast<unsigned char*>(low);
#endif
#if defined(SIMT_TSAN)
  main.tsan = __tsan_get_current_fiber();
#endif
}

// Executes cluster `number` of the grid. Returns false if it failed; `error` is then the report.
static bool run_cluster(Worker& worker, const Kernel& kernel, const LaunchConfig& config,
                        Entry entry, void* arguments, uint64_t number, std::string& error) {
  Cluster& c = worker.cluster;
  cluster = &c;
  worker.reserve(count(config.cluster), count(config.block));
  c.kernel = &kernel;
  c.config = &config;
  c.entry = entry;
  c.arguments = arguments;
  c.polls = 0;
  c.position = 0;
  c.live = static_cast<int>(c.fibers.size());
  c.failed = false;
  c.async.clear();
  c.cluster_arrived = 0;
  c.cluster_phase = 0;
  const uint64_t across = config.grid.x / config.cluster.x, down = config.grid.y / config.cluster.y;
  const uint3 first_block = {static_cast<unsigned>(number % across) * config.cluster.x,
                             static_cast<unsigned>(number / across % down) * config.cluster.y,
                             static_cast<unsigned>(number / across / down) * config.cluster.z};
  for (uint32_t rank = 0; rank < c.blocks.size(); rank++) prepare_block(c, rank, first_block);
  draw_schedule(c, number);
  if (counter != nullptr) counter->cluster_begins();

  find_own_stack(c.main);
  tsan_release(&c.start_tag);
  run_guarded([] { switch_to(&cluster->main, pick_next()); });
  for (Fiber* fiber : c.fibers) {
    if (fiber->state != State::Exited) tsan_abandon(fiber->tsan, &c.end_tag);
  }
  tsan_acquire(&c.end_tag);
  tsan_acquire(&c.tma.done);
  for (Block* block : c.blocks) {
    for (WarpGroup& group : block->groups) tsan_acquire(&group.unit.done);
  }
  thread_vars = nullptr;
  if (counter != nullptr) counter->cluster_ends();

  for (Block* block : c.blocks) {
    const std::string overrun = shared_overrun(block);
    if (!c.failed && !overrun.empty()) {
      block_vars = block;
      c.error = report_head(nullptr) + overrun;
      c.failed = true;
    }
  }
  block_vars = nullptr;
  cluster = nullptr;
  if (c.failed) error = c.error;
  return !c.failed;
}

// ---- The grid ----

// The reason why a launch is refused, or an empty string.
static std::string refusal_reason(const Kernel& kernel, const LaunchConfig& config) {
  const uint64_t threads = count(config.block), blocks = count(config.cluster);
  if (threads == 0 || threads > 1024) {
    return "a block of " + std::to_string(threads) + " threads, 1 to 1024 are allowed";
  }
  if (threads > kernel.max_threads) {
    return "a block of " + std::to_string(threads) + " threads, the launch bound is " +
           std::to_string(kernel.max_threads);
  }
  if (config.block.z > 64) return "block dimension z is over 64";
  if (count(config.grid) == 0) return "an empty grid";
  if (config.grid.x > 0x7fffffff || config.grid.y > 65535 || config.grid.z > 65535) {
    return "the grid is larger than 2147483647 x 65535 x 65535";
  }
  if (config.shared_bytes > g_limits.max_shared_bytes) {
    return std::to_string(config.shared_bytes) +
           " bytes of dynamic shared memory, the device has " +
           std::to_string(g_limits.max_shared_bytes);
  }
  if (blocks > 1 && !g_limits.clusters) return "the device has no clusters";
  if (blocks > 8) {
    return "a cluster of " + std::to_string(blocks) + " blocks, 8 is the portable bound";
  }
  if (config.grid.x % config.cluster.x || config.grid.y % config.cluster.y ||
      config.grid.z % config.cluster.z) {
    return "the grid is not a multiple of the cluster";
  }
  if (config.left_out >= count(config.grid) / blocks) {
    return "all of its " + std::to_string(count(config.grid) / blocks) + " blocks are left out";
  }
  return "";
}

// Hands out the clusters of a grid from `first` on, in an order that depends on the seed.
class Tickets {
 public:
  Tickets(uint64_t first, uint64_t clusters, uint64_t seed) : first_(first), clusters_(clusters) {
    if (seed == 0) return;
    order_.resize(clusters);
    for (uint64_t i = 0; i < clusters; i++) order_[i] = static_cast<uint32_t>(i);
    uint64_t x = seed * 0x2545f4914f6cdd1dull | 1;
    for (uint64_t i = clusters - 1; i > 0; i--) {
      x ^= x << 13;
      x ^= x >> 7;
      x ^= x << 17;
      std::swap(order_[i], order_[x % (i + 1)]);
    }
  }
  bool next(uint64_t& number) {
    const uint64_t ticket = next_++;
    if (ticket >= clusters_) return false;
    number = first_ + (order_.empty() ? ticket : order_[ticket]);
    return true;
  }

 private:
  const uint64_t first_, clusters_;
  std::atomic<uint64_t> next_{0};
  std::vector<uint32_t> order_;
};

int launch(const Kernel& kernel, const LaunchConfig& given, Entry entry, void* arguments) {
  LaunchConfig config = given;
  for (unsigned* d : {&config.cluster.x, &config.cluster.y, &config.cluster.z}) *d += *d == 0;
  const std::string refusal = refusal_reason(kernel, config);
  if (!refusal.empty()) {
    t_error = "kernel '" + std::string(kernel.symbol) + "' was not launched: " + refusal;
    return -1;
  }
  const uint64_t clusters = count(config.grid) / count(config.cluster) - config.left_out;
  Tickets tickets(config.left_out, clusters, config.seed);
  std::atomic<bool> stop{false};
  std::mutex mutex;
  std::string error;
  LaunchTraffic* const traffic = counter != nullptr ? counter->launch_begins() : nullptr;
  const auto run = [&] {
    Lease worker;
    (*worker).cluster.traffic = traffic;
    uint64_t number;
    std::string own_error;
    while (!stop && tickets.next(number)) {
      if (run_cluster(*worker, kernel, config, entry, arguments, number, own_error)) continue;
      const std::lock_guard<std::mutex> lock(mutex);
      if (!stop.exchange(true)) error = own_error;
    }
  };
  const uint64_t threads = std::min<uint64_t>(config.os_threads, clusters);
  if (threads <= 1) {
    config.os_threads = 1;
    run();
  } else {
    std::vector<std::thread> others;
    for (uint64_t i = 0; i < threads; i++) others.emplace_back(run);
    for (std::thread& other : others) other.join();
  }
  if (counter != nullptr) counter->launch_ends(traffic, kernel, config, stop);
  if (!stop) return 0;
  t_error = error;
  return -1;
}

}  // namespace simt
