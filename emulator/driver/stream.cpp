// Streams: handles, and the order in which submitted work must run.
#include <algorithm>

#include "api.h"
#include "device.h"

namespace driver {
namespace {

CUresult create_stream(CUstream* out, unsigned flags, int priority) {
  Call call;
  if (call.error) return call.error;
  if (!out || flags & ~CU_STREAM_NON_BLOCKING) return CUDA_ERROR_INVALID_VALUE;
  auto stream = std::make_shared<Stream>();
  stream->context = call.context;
  stream->flags = flags;
  stream->priority = std::clamp(priority, GREATEST_PRIORITY, LEAST_PRIORITY);
  stream->id = ++call.driver.next_id;
  stream->domain = std::make_shared<ErrorDomain>();
  stream->handle = call.driver.streams.add(stream);
  call.context->streams.push_back(stream);
  *out = stream->handle;
  return CUDA_SUCCESS;
}

bool is_idle(const Stream& stream) { return !stream.last || stream.last->state == Operation::DONE; }

void forget_destroyed_streams(Context& context) {
  auto& streams = context.streams;
  streams.erase(std::remove_if(streams.begin(), streams.end(),
                               [](const StreamPtr& s) { return s->destroyed && is_idle(*s); }),
                streams.end());
}

// The legacy stream and all blocking streams wait for each other. A blocking stream that is
// capturing cannot do so.
bool legacy_disturbs_captures(const Context& context) {
  bool disturbed = false;
  for (const StreamPtr& stream : context.streams) {
    if (!stream->blocking() || !stream->capture) continue;
    invalidate(*stream->capture);
    disturbed = true;
  }
  return disturbed;
}

CUresult add_node(Call& call, Stream& stream, Task task) {
  Capture& capture = *stream.capture;
  if (!capture.valid) return CUDA_ERROR_STREAM_CAPTURE_INVALIDATED;
  auto node = std::make_shared<Node>();
  node->handle = reinterpret_cast<CUgraphNode>(call.driver.next_node += 16);
  node->task = std::move(task);
  node->depends_on = stream.tail;
  call.driver.nodes[node->handle] = node;
  capture.graph->nodes.push_back(node);
  stream.tail = {node};
  return CUDA_SUCCESS;
}

}  // namespace

StreamPtr find_stream(Call& call, CUstream handle) {
  auto number = reinterpret_cast<uintptr_t>(handle);
  if (number == 0 || number == CU_STREAM_LEGACY) {
    return call.context ? call.context->legacy : nullptr;
  }
  if (number != CU_STREAM_PER_THREAD) return call.driver.streams.find(handle);
  if (!call.context) return nullptr;
  StreamPtr& stream = call.thread->default_streams[call.context.get()];
  if (!stream || stream->destroyed) {  // by a reset of the context
    stream = std::make_shared<Stream>();
    stream->context = call.context;
    stream->handle = handle;
    stream->id = ++call.driver.next_id;
    call.context->streams.push_back(stream);
  }
  return stream;
}

ErrorDomainPtr domain_of(const HostThread& thread, const Stream& stream) {
  return stream.domain ? stream.domain : thread.default_domain;
}

CUresult submit(Call& call, const StreamPtr& stream, Submission submission,
                OperationPtr* submitted) {
  if (stream->capture) return add_node(call, *stream, std::move(submission.task));
  Context& context = *stream->context;
  ErrorDomainPtr domain = domain_of(*call.thread, *stream);
  CUresult error = domain->error;
  if (error && !submission.always) return error;
  std::vector<std::pair<OperationPtr, bool>> after = {{stream->last, false},
                                                      {submission.after, true}};
  if (stream->legacy) {
    if (legacy_disturbs_captures(context)) return CUDA_ERROR_STREAM_CAPTURE_IMPLICIT;
    forget_destroyed_streams(context);
    for (const StreamPtr& other : context.streams) {
      if (other->blocking()) after.emplace_back(other->last, false);
    }
  } else if (stream->blocking()) {
    after.emplace_back(context.legacy->last, false);
  }
  OperationPtr operation =
      enqueue(call.thread, stream->context, domain, std::move(submission), after);
  stream->last = operation;
  if (submitted) *submitted = operation;
  limit_queue(call.lock, *call.thread, context);
  return error;
}

CUresult synchronize(Call& call, const StreamPtr& stream) {
  ContextPtr context = stream->context;
  std::vector<OperationPtr> targets = {stream->last};
  if (stream->legacy) {
    for (const StreamPtr& other : context->streams) {
      if (other->blocking()) targets.push_back(other->last);
    }
  }
  complete(call.lock, *call.thread, std::move(targets));
  return domain_of(*call.thread, *stream)->error;
}

}  // namespace driver

using namespace driver;

namespace {

// For functions that must not be called on a capturing stream.
CUresult find_idle_stream(Call& call, CUstream handle, StreamPtr* stream) {
  *stream = find_stream(call, handle);
  if (!*stream) return call.context ? CUDA_ERROR_INVALID_HANDLE : CUDA_ERROR_INVALID_CONTEXT;
  if ((*stream)->capture) {
    invalidate(*(*stream)->capture);
    return CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED;
  }
  return capture_forbids(call);
}

}  // namespace

DRIVER_API CUresult cuStreamCreate(CUstream* out, unsigned flags) {
  return create_stream(out, flags, 0);
}

DRIVER_API CUresult cuStreamCreateWithPriority(CUstream* out, unsigned flags, int priority) {
  return create_stream(out, flags, priority);
}

DRIVER_API CUresult cuStreamDestroy_v2(CUstream handle) {
  Call call(Call::ANY_CONTEXT);
  if (call.error) return call.error;
  StreamPtr stream = call.driver.streams.find(handle);
  if (!stream) return CUDA_ERROR_INVALID_HANDLE;
  if (stream->capture) {
    invalidate(*stream->capture);
    return CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED;
  }
  // Its work remains queued; a synchronisation of the context, or a dependent operation, executes
  // it.
  call.driver.streams.remove(handle);
  stream->destroyed = true;
  forget_destroyed_streams(*stream->context);
  return CUDA_SUCCESS;
}

DRIVER_API CUresult cuStreamSynchronize(CUstream handle) {
  Call call(Call::ANY_CONTEXT);
  if (call.error) return call.error;
  StreamPtr stream;
  if (CUresult error = find_idle_stream(call, handle, &stream)) return error;
  return synchronize(call, stream);
}

DRIVER_API CUresult cuStreamQuery(CUstream handle) {
  Call call(Call::ANY_CONTEXT);
  if (call.error) return call.error;
  StreamPtr stream;
  if (CUresult error = find_idle_stream(call, handle, &stream)) return error;
  if (is_idle(*stream)) return domain_of(*call.thread, *stream)->error;
  make_progress(call.lock, *call.thread, stream->last);
  return CUDA_ERROR_NOT_READY;
}

DRIVER_API CUresult cuStreamGetFlags(CUstream handle, unsigned* flags) {
  Call call(Call::ANY_CONTEXT);
  if (call.error) return call.error;
  StreamPtr stream = find_stream(call, handle);
  if (!stream) return CUDA_ERROR_INVALID_HANDLE;
  if (!flags) return CUDA_ERROR_INVALID_VALUE;
  *flags = stream->flags;
  return CUDA_SUCCESS;
}

DRIVER_API CUresult cuStreamGetPriority(CUstream handle, int* priority) {
  Call call(Call::ANY_CONTEXT);
  if (call.error) return call.error;
  StreamPtr stream = find_stream(call, handle);
  if (!stream) return CUDA_ERROR_INVALID_HANDLE;
  if (!priority) return CUDA_ERROR_INVALID_VALUE;
  *priority = stream->priority;
  return CUDA_SUCCESS;
}

DRIVER_API CUresult cuStreamGetId(CUstream handle, unsigned long long* id) {
  Call call(Call::ANY_CONTEXT);
  if (call.error) return call.error;
  StreamPtr stream = find_stream(call, handle);
  if (!stream) return CUDA_ERROR_INVALID_HANDLE;
  if (!id) return CUDA_ERROR_INVALID_VALUE;
  *id = stream->id;
  return CUDA_SUCCESS;
}

DRIVER_API CUresult cuStreamGetCtx(CUstream handle, CUcontext* context) {
  Call call(Call::ANY_CONTEXT);
  if (call.error) return call.error;
  StreamPtr stream = find_stream(call, handle);
  if (!stream) return CUDA_ERROR_INVALID_HANDLE;
  if (!context) return CUDA_ERROR_INVALID_VALUE;
  *context = stream->context->handle;
  return CUDA_SUCCESS;
}

DRIVER_API CUresult cuStreamWaitEvent(CUstream handle, CUevent event_handle, unsigned flags) {
  Call call;
  if (call.error) return call.error;
  StreamPtr stream = find_stream(call, handle);
  EventPtr event = call.driver.events.find(event_handle);
  if (!stream || !event) return CUDA_ERROR_INVALID_HANDLE;
  if (flags == CU_EVENT_EXTERNAL) return not_supported("cuStreamWaitEvent, external");
  if (flags != 0) return CUDA_ERROR_INVALID_VALUE;
  if (event->capture) return join_capture(call, stream, *event);
  if (!event->operation) return CUDA_SUCCESS;  // never recorded
  if (stream->capture) {
    invalidate(*stream->capture);
    return CUDA_ERROR_STREAM_CAPTURE_ISOLATION;
  }
  Submission submission;
  submission.task = {CU_GRAPH_NODE_TYPE_EMPTY, nullptr};
  submission.after = event->operation;
  return submit(call, stream, std::move(submission));
}

DRIVER_API CUresult cuLaunchHostFunc(CUstream handle, CUhostFn function, void* user_data) {
  Call call;
  if (call.error) return call.error;
  StreamPtr stream = find_stream(call, handle);
  if (!stream) return CUDA_ERROR_INVALID_HANDLE;
  if (!function) return CUDA_ERROR_INVALID_VALUE;
  Submission submission;
  submission.task = {CU_GRAPH_NODE_TYPE_HOST,
                     make_work([function, user_data](const Operation&) -> Outcome {
                       HostThread& thread = *this_thread();
                       thread.in_host_function = true;
                       function(user_data);
                       thread.in_host_function = false;
                       return {};
                     })};
  return submit(call, stream, std::move(submission));
}
