// What the exported functions have in common: the checks at their start, and how they submit work.
#pragma once
#include "state.h"

namespace driver {

// Locks the driver and finds the calling thread's context. Exported functions begin with
// `Call call; if (call.error) return call.error;`. What is done to an object that knows its context
// works without a current one.
struct Call {
  enum Needs { CURRENT_CONTEXT, ANY_CONTEXT };
  explicit Call(Needs needs = CURRENT_CONTEXT);
  Driver& driver;
  const std::shared_ptr<HostThread>& thread;
  Lock lock;
  CUresult error;
  ContextPtr context;
};

// The stream of a handle, the default streams' special handles included.
StreamPtr find_stream(Call&, CUstream);
ErrorDomainPtr domain_of(const HostThread&, const Stream&);

// CUDA_SUCCESS, or the error that stands for a call which may not be made while a capture goes on;
// the captures that it disturbs become invalid.
CUresult capture_forbids(Call&);
void invalidate(Capture&);
// A stream that waits for a captured event becomes part of the capture.
CUresult join_capture(Call&, const StreamPtr&, const Event&);

// Appends work to a stream, or a node to the graph that the stream captures.
struct Submission {
  Task task;
  bool always = false;
  OperationPtr after;  // a further predecessor, whose failure is inherited
};
CUresult submit(Call&, const StreamPtr&, Submission, OperationPtr* submitted = nullptr);

// Runs unfinished operations until all of these have finished.
void complete(Lock&, HostThread&, std::vector<OperationPtr>);
void complete_context(Lock&, HostThread&, Context&);
// Runs at most one operation on the way to this one, as time passes for who polls.
void make_progress(Lock&, HostThread&, const OperationPtr&);

// Waits for a stream, and returns what sticks to it.
CUresult synchronize(Call&, const StreamPtr&);

// Adds an operation behind its predecessors; the flag says that it inherits the failure of one.
OperationPtr enqueue(const std::shared_ptr<HostThread>&, const ContextPtr&, const ErrorDomainPtr&,
                     Submission, const std::vector<std::pair<OperationPtr, bool>>& after);
// After a submission: keeps the queue finite, and sometimes runs something early.
void pace(Lock&, HostThread&, Context&);

// Gives back what a context owns, after its work has finished.
void release_context(Lock&, Context&);

// The device allocation that holds [address, address + bytes), or nullptr. One that
// cuMemFreeAsync was called for counts only as long as its memory is there, and only if asked.
const Allocation* find_allocation(CUdeviceptr address, size_t bytes, uintptr_t* start = nullptr,
                                  bool freed_too = false);
void free_allocation(Lock&, uintptr_t start, std::string* report);
bool is_pinned(const void* host, size_t bytes);

inline CUdeviceptr address_of(const void* pointer) {
  return static_cast<CUdeviceptr>(reinterpret_cast<uintptr_t>(pointer));
}
inline unsigned char* bytes_at(CUdeviceptr address) {
  return reinterpret_cast<unsigned char*>(static_cast<uintptr_t>(address));
}

std::shared_ptr<const Work> make_work(Work);
// After a kernel has run with these arguments: the log of kernels and the planted fault that the environment asks for.
Outcome after_run(const simt::Kernel&, const std::vector<void*>& arguments);
const char* error_name(CUresult);
// Says once, on the standard error, that this is not supported, and returns the code for it.
CUresult not_supported(const char* what);

}  // namespace driver
