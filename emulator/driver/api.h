// The common parts of the exported functions: the checks at their start, and the submission of
// work.
#pragma once
#include "state.h"

namespace driver {

// Locks the driver and finds the calling thread's context. Exported functions begin with `Call
// call; if (call.error) return call.error;`. Functions on an object that stores its context work
// without a current one.
struct Call {
  enum Needs { CURRENT_CONTEXT, ANY_CONTEXT };
  explicit Call(Needs needs = CURRENT_CONTEXT);
  Driver& driver;
  const std::shared_ptr<HostThread>& thread;
  Lock lock;
  CUresult error;
  ContextPtr context;
};

// The stream of a handle, including the special handles of the default streams.
StreamPtr find_stream(Call&, CUstream);
ErrorDomainPtr domain_of(const HostThread&, const Stream&);

// CUDA_SUCCESS, or the error for a call that is forbidden during a capture; the captures that the
// call disturbs become invalid.
CUresult capture_forbids(Call&);
void invalidate(Capture&);
// A stream that waits for a captured event becomes part of the capture.
CUresult join_capture(Call&, const StreamPtr&, const Event&);

// Appends work to a stream, or a node to the graph that the stream is capturing.
struct Submission {
  Task task;
  bool always = false;
  OperationPtr after;  // a further predecessor, whose failure is inherited
};
CUresult submit(Call&, const StreamPtr&, Submission, OperationPtr* submitted = nullptr);

// Executes unfinished operations until all of these have finished.
void complete(Lock&, HostThread&, std::vector<OperationPtr>);
void complete_context(Lock&, HostThread&, Context&);
// Executes at most one operation that this one needs, since time passes for a thread that polls.
void make_progress(Lock&, HostThread&, const OperationPtr&);

// Waits for a stream and returns the error that sticks to it.
CUresult synchronize(Call&, const StreamPtr&);

// Adds an operation after its predecessors; the flag says that it inherits a predecessor's failure.
OperationPtr enqueue(const std::shared_ptr<HostThread>&, const ContextPtr&, const ErrorDomainPtr&,
                     Submission, const std::vector<std::pair<OperationPtr, bool>>& after);
// Called after a submission: bounds the queue, and sometimes executes an operation early.
void limit_queue(Lock&, HostThread&, Context&);

// Releases the resources of a context after its work has finished.
void release_context(Lock&, Context&);

// The device allocation that contains [address, address + bytes), or nullptr. An allocation with a
// pending cuMemFreeAsync counts only on request, and only until its memory is freed.
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
// Called after a kernel has run with these arguments: writes the log of kernels and the planted
// fault that the environment requests.
Outcome after_run(const simt::Kernel&, const std::vector<void*>& arguments);
const char* error_name(CUresult);
// Prints once to the standard error that this is not supported, and returns the code for it.
CUresult not_supported(const char* what);

}  // namespace driver
