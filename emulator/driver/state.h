// The driver's objects. One mutex guards them all; it is never held while a kernel, a copy or a
// host function runs.
#pragma once
#include <condition_variable>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <unordered_map>
#include <utility>
#include <vector>

#include "cuda_types.h"
#include "runtime.h"

namespace driver {

using Lock = std::unique_lock<std::mutex>;

struct Operation;
struct Context;
struct HostThread;
struct Node;
struct Capture;
using OperationPtr = std::shared_ptr<Operation>;
using NodePtr = std::shared_ptr<Node>;

// The scope of a sticky failure: each created stream has its own; for the default streams, which
// all threads of a process share, each thread has one. On a GPU a failure would end the whole
// context.
struct ErrorDomain {
  CUresult error = CUDA_SUCCESS;
  const HostThread* thread = nullptr;  // the thread that submitted the failed operation
};
using ErrorDomainPtr = std::shared_ptr<ErrorDomain>;

// The outcome of an operation. CUDA_SUCCESS has an empty report.
struct Outcome {
  CUresult error = CUDA_SUCCESS;
  std::string report;
};

// The work of an operation. A graph executes the same work at each launch.
using Work = std::function<Outcome(const Operation&)>;

struct Task {
  CUgraphNodeType type;
  std::shared_ptr<const Work> work;  // null for an operation that only orders others
};

struct Operation {
  enum State { PENDING, RUNNING, DONE };
  uint64_t id;
  State state = PENDING;
  std::shared_ptr<const Work> work;
  bool always = false;  // runs on a failed stream too, because it releases a resource
  uint64_t seed = 0;
  unsigned os_threads = 1;
  uint64_t left_out = 0;               // blocks of a launch
  std::shared_ptr<HostThread> thread;  // the submitter
  std::shared_ptr<Context> context;
  ErrorDomainPtr domain;
  CUresult error = CUDA_SUCCESS;
  int64_t finished_ns = 0;
  // Unfinished predecessors, and the operations that wait for this one; the flag says that a
  // failure is inherited.
  std::vector<OperationPtr> waits_for;
  std::vector<std::pair<OperationPtr, bool>> dependents;
};

struct Stream {
  std::shared_ptr<Context> context;
  CUstream handle = nullptr;
  unsigned flags = 0;
  int priority = 0;
  uint64_t id = 0;
  bool legacy = false;
  bool destroyed = false;  // stays listed until its work is done: the legacy stream waits for it
  ErrorDomainPtr domain;   // null for the default streams
  OperationPtr last;
  std::shared_ptr<Capture> capture;
  std::vector<NodePtr> tail;  // while capturing: the dependencies of the next node
  bool blocking() const { return !legacy && !(flags & CU_STREAM_NON_BLOCKING); }
};
using StreamPtr = std::shared_ptr<Stream>;

struct Event {
  std::shared_ptr<Context> context;
  unsigned flags = 0;
  OperationPtr operation;  // of the last record
  std::shared_ptr<Capture> capture;
  std::vector<NodePtr> nodes;  // the nodes that a captured record depends on
};
using EventPtr = std::shared_ptr<Event>;

struct Context {
  CUcontext handle = nullptr;
  bool primary = false, alive = false;
  unsigned retained = 0, flags = 0;
  uint64_t id = 0;
  int cache_config = 0;
  size_t limits[CU_LIMIT_COUNT] = {};
  StreamPtr legacy;
  std::vector<StreamPtr> streams;  // created and per-thread ones
  std::map<uint64_t, OperationPtr> unfinished;
};
using ContextPtr = std::shared_ptr<Context>;

struct Module {
  ContextPtr context;
  std::map<std::string, CUfunction> functions;
};

struct Function {
  ContextPtr context;
  CUmodule module;
  const simt::Kernel* kernel;
  size_t max_dynamic_shared;
  int carveout, cluster_policy;
};

struct Node {
  CUgraphNode handle;
  Task task;
  std::vector<NodePtr> depends_on;
};

struct Graph {
  ContextPtr context;
  std::vector<NodePtr> nodes;  // in topological order
};
using GraphPtr = std::shared_ptr<Graph>;

struct GraphExec {
  ContextPtr context;
  std::vector<NodePtr> nodes;
  unsigned long long flags = 0;
  OperationPtr last_launch;  // launches of one executable graph never overlap
};

// One capture sequence, from cuStreamBeginCapture to cuStreamEndCapture.
struct Capture {
  uint64_t id;
  CUstreamCaptureMode mode;
  bool valid = true;
  std::shared_ptr<HostThread> thread;
  StreamPtr origin;
  std::vector<StreamPtr> streams;
  GraphPtr graph;
};
using CapturePtr = std::shared_ptr<Capture>;

// The state of one OS thread. Operations keep the state of their submitter alive.
struct HostThread {
  uint64_t seed, random;
  uint64_t launches = 0;
  unsigned os_threads;
  uint64_t left_out = 0;                 // blocks of each launch
  std::string report;                    // of the last failure of this thread's work
  CUresult report_error = CUDA_SUCCESS;  // and its code
  std::string report_copy;               // the text that last_error() returned
  ErrorDomainPtr default_domain = std::make_shared<ErrorDomain>();
  std::vector<ContextPtr> contexts;  // the stack; the last one is current
  std::map<Context*, StreamPtr> default_streams;
  CUstreamCaptureMode capture_mode = CU_STREAM_CAPTURE_MODE_GLOBAL;
  bool in_host_function = false;
};
const std::shared_ptr<HostThread>& this_thread();
uint64_t draw(HostThread&);                     // the next 64 random bits of a thread's schedule
bool draw_one_in(HostThread&, unsigned count);  // never with seed 0

// Handles of one kind of object.
template <class Handle, class T>
class Handles {
 public:
  explicit Handles(uintptr_t tag) : next_(tag << 40 | 0x100) {}
  Handle add(std::shared_ptr<T> object) {
    auto handle = reinterpret_cast<Handle>(next_ += 16);
    objects_.emplace(handle, std::move(object));
    return handle;
  }
  std::shared_ptr<T> find(Handle handle) const {
    auto it = objects_.find(handle);
    return it == objects_.end() ? nullptr : it->second;
  }
  bool remove(Handle handle) { return objects_.erase(handle) != 0; }
  template <class Predicate>
  void remove_if(Predicate predicate) {
    for (auto it = objects_.begin(); it != objects_.end();)
      it = predicate(*it->second) ? objects_.erase(it) : std::next(it);
  }
  size_t size() const { return objects_.size(); }

 private:
  uintptr_t next_;
  std::unordered_map<Handle, std::shared_ptr<T>> objects_;
};

struct Allocation {
  size_t size;
  ContextPtr context;
  uint64_t id;
  bool freed;  // by cuMemFreeAsync, which has not run yet
};

struct HostAllocation {
  size_t size;
  unsigned flags;
  bool registered;  // the user's own memory, pinned by cuMemHostRegister
};

struct Counters {
  uint64_t launches = 0, failures = 0, copies = 0, memsets = 0;
};

struct Driver {
  std::mutex mutex;
  std::condition_variable finished;  // an operation has finished
  bool initialised = false;
  uint64_t next_id = 0;
  ContextPtr primary;
  Handles<CUcontext, Context> contexts{1};
  Handles<CUmodule, Module> modules{2};
  Handles<CUfunction, Function> functions{3};
  Handles<CUstream, Stream> streams{4};
  Handles<CUevent, Event> events{5};
  Handles<CUgraph, Graph> graphs{6};
  Handles<CUgraphExec, GraphExec> graph_execs{7};
  uintptr_t next_node = uintptr_t{8} << 40;
  std::unordered_map<CUgraphNode, std::weak_ptr<Node>> nodes;
  std::vector<CapturePtr> captures;
  std::map<uintptr_t, Allocation> allocations;
  std::map<uintptr_t, HostAllocation> host_allocations;
  size_t allocated_bytes = 0;
  uint64_t release_threshold = 0;
  Counters counters;
  std::unordered_map<const simt::Kernel*, int> carveouts;  // the last preferred values
};
Driver& state();  // never destroyed: threads may outlive the process's static objects

}  // namespace driver
