// The state of a running launch. A thread is a fiber; 32 threads are a warp; warps form a block;
// the blocks of a cluster (often one) run together, from start to end, on one operating system
// thread.
#pragma once
#include <cstdint>
#include <deque>
#include <string>
#include <utility>
#include <vector>

#include "counter.h"
#include "export.h"
#include "sanitize.h"
#include "simt_ptx.h"
#include "tensor_map.h"
#include "thread.h"

namespace simt {

// The sources of simt/ are compiled as one file, so constants that several of them use are here.
constexpr size_t PAGE = 4096;
constexpr unsigned char CANARY = 0xfd;
constexpr uint32_t WHOLE_WARP = 0xffffffffu;

struct Block;
struct Cluster;
struct Fiber;
struct Warp;
struct WarpTraffic;

enum class State : uint8_t { Running, Warp, Barrier, Mbarrier, ClusterBarrier, Wgmma, Exited };

// ---- One thread ----

struct Copy {
  unsigned char* dst;
  const unsigned char* src;
  uint32_t bytes, src_bytes;
  bool done;
};

// The thread's cp.async copies in order of issue. Copy number i is ops[i - retired]; a group is the
// number of copies before its end.
struct Copies {
  std::vector<Copy> ops;
  std::vector<uint64_t> groups;
  uint64_t retired = 0;
};

struct Store {
  TensorMap map;
  int at[5];
  Block* block;
  uint32_t source;
  bool read, written;
  std::vector<unsigned char> snapshot;  // the tile, after it is read and before it is written
};

// TMA stores, as Copies.
struct Stores {
  std::vector<Store> ops;
  std::vector<uint64_t> groups;
  uint64_t retired = 0;
};

struct Fiber : ThreadVars {
  void* stack_pointer;
  Block* block;
  Warp* warp;
  uint32_t linear;  // the thread's number in its block
  State state;

  // The thread's current wait, for reports; while it runs, its last wait.
  const char* kind;
  Site site;
  int barrier;
  uint32_t address, parity;  // of an mbarrier

  uint32_t cluster_phase;
  bool cluster_arrived;
  Copies copies;
  Stores stores;

  unsigned char* stack;
  size_t stack_bytes;
  void* fake_stack;  // AddressSanitizer's
  void* tsan;        // ThreadSanitizer's
};

// ---- One warp ----

struct Arrival {
  void* operands;
  WarpFn apply;
  uint32_t mask;
  const char* kind;
  Site site;
};

struct Warp {
  uint32_t index;           // in its block
  uint32_t live, runnable;  // lanes that have not exited; that may run
  uint32_t pending;         // lanes that wait in a warp operation
  uint32_t at_barrier[16];  // lanes that wait at each barrier of the block
  uint32_t at_cluster_barrier, at_wgmma;
  Fiber* fiber[32];
  Arrival arrival[32];
  void* operands[32];  // those of `arrival`, in the form that WarpFn takes
  uint64_t wgmmas;     // how many wgmmas the warp has issued
  std::vector<uint64_t> wgmma_groups;
  uint32_t sync_phase;
  char sync_tag[2];
  WarpTraffic* traffic;  // of the counting library
};

// ---- One block ----

struct Barrier {
  int arrived, expected;  // expected 0: all threads that have not exited
  uint32_t phase;
  int votes[2];
  Site site;
  char tag[2];
};

struct Mbarrier {
  uint32_t address;
  bool valid;
  int count, pending;
  int64_t bytes;  // expected and not arrived yet
  uint32_t phase;
  char tag[2];
};

// A wgmma of a warp group, to which each of its four warps contributes.
struct GroupWgmma {
  Wgmma operation;
  float* d[4][32];
  uint32_t warps;  // which warps have issued it
  bool done;
};

// The tensor core of a warp group. wgmma number i is ops[i - retired].
struct WarpGroup {
  std::deque<GroupWgmma> ops;
  uint64_t retired = 0;
  AsyncUnit unit;
};

struct StaticArray {
  const void* key;
  unsigned char* at;
};

struct RedZone {
  uint32_t begin, end;
  const char* after;
};

struct Block : BlockVars {
  int live;
  std::vector<Warp*> warps;
  std::vector<WarpGroup> groups;
  Barrier barrier[16];
  std::deque<Mbarrier> mbarriers;
  std::vector<StaticArray> statics;
  std::vector<RedZone> red_zones;
  uint32_t static_end;    // the end of the used part of the arena
  uint32_t static_bytes;  // static shared memory, without red zones
};

// ---- Blocks that run together ----

// A TMA load in flight, or the arrival that waits for a thread's copies.
struct Async {
  enum Kind { Load, CopyArrive } kind;
  TensorMap map;
  int at[5];
  Block* block;  // of destination and barrier
  uint32_t destination, bar;
  Fiber* fiber;
  uint64_t copies;
};

enum class Order { InOrder, Reversed, Random, Priority };
enum class AsyncTime { Eager, Late, Mixed };
// The asynchronous units; each has its own timing.
enum class Unit { Copy, Load, Store, Wgmma };

struct Cluster {
  const Kernel* kernel;
  const LaunchConfig* config;
  Entry entry;
  void* arguments;

  Order order;
  AsyncTime async_time[4];  // by Unit
  uint64_t random;
  uint64_t polls;  // since the last progress
  uint32_t position;
  int live;
  bool failed;
  std::string error;

  std::vector<Fiber*> fibers;
  std::vector<Warp*> warps;  // in the order in which the scheduler visits them
  std::vector<Block*> blocks;
  std::vector<Async> async;
  AsyncUnit tma;
  LaunchTraffic* traffic;  // of the counting library

  int cluster_arrived;
  uint32_t cluster_phase;

  Fiber main;  // the operating system thread that runs the launch
  char start_tag, end_tag, cluster_tag[2];
};

extern __thread Cluster* cluster __attribute__((tls_model("initial-exec")));

inline Fiber* current_fiber() { return static_cast<Fiber*>(thread_vars); }
inline Block* current_block() { return current_fiber()->block; }

// ---- fiber.cpp ----

// Switches to `to`. `from` never runs again if it is leaving.
void switch_to(Fiber* from, Fiber* to, bool leaving = false);
// Sets a fiber up so that it starts in the kernel.
void prepare_fiber(Fiber* fiber);

// ---- scheduler.cpp ----

uint64_t next_random();
bool act_now(Unit unit);  // whether an asynchronous operation happens at its issue
inline void made_progress() { cluster->polls = 0; }
void run_one_async();
Fiber* pick_next();                                        // nullptr if no thread can run
void wait_here(State state, const char* kind, Site site);  // until the lane becomes runnable
void maybe_preempt();
// Like maybe_preempt, but prefers `to`, which has just become runnable and may be nullptr.
void maybe_hand_over(Fiber* to);

// ---- report.cpp ----

[[noreturn]] void fail_with(const std::string& message);
std::string deadlock_report();
std::string report_head(const Fiber* fiber);

// ---- Completion when a thread exits, or on behalf of another thread ----

void warp_lane_exited(Warp* warp);
void barriers_thread_exited(Block* block);
void cluster_thread_exited();
void copies_thread_exiting(Fiber* fiber);
void stores_thread_exiting(Fiber* fiber);
void run_copies(Fiber* fiber, uint64_t end);
void run_load(Async& load);
void mbar_arrive_on(Block* block, uint32_t address, const char* kind);
void mbar_bytes_arrived(Block* block, uint32_t address, uint32_t bytes);
Mbarrier* find_mbarrier(Block* block, uint32_t address);
Mbarrier& valid_mbarrier(Block* block, uint32_t address, const char* kind, Site site);

// ---- shared_memory.cpp ----

constexpr uint32_t ARENA_BYTES = 256 << 10;
// The block of a 32-bit shared address; removes the block's rank, which leaves the offset.
Block* block_of(uint32_t& address, const char* kind, Site site);
// The checked memory behind a shared address.
unsigned char* shared_at(uint32_t address, uint32_t bytes, uint32_t align, const char* kind,
                         Site site);
void prepare_shared(Block* block);
// The region that a thread wrote past the end of, or an empty string.
std::string shared_overrun(Block* block);

// ---- fault.cpp ----

// Runs `f` so that a fault inside a fiber fails the launch and not the process.
void run_guarded(void (*f)());

// ---- device_memory.cpp ----

// Describes the allocation at or near a device address; empty if it is not device memory.
std::string describe_device_address(uintptr_t address);
// The live allocations, in the order of their addresses.
struct DeviceRange {
  uintptr_t begin, end;
};
std::vector<DeviceRange> device_ranges();

// ---- launch.cpp ----

const DeviceLimits& device_limits();

}  // namespace simt
