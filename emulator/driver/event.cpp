// Events: a point in a stream that other streams and the host can wait for, and its time.
#include "api.h"

namespace driver {
namespace {

CUresult find_recorded(Call& call, CUevent handle, EventPtr* event) {
  *event = call.driver.events.find(handle);
  if (!*event) return CUDA_ERROR_INVALID_HANDLE;
  if ((*event)->capture) {
    invalidate(*(*event)->capture);
    return CUDA_ERROR_CAPTURED_EVENT;
  }
  return capture_forbids(call);
}

}  // namespace
}  // namespace driver

using namespace driver;

DRIVER_API CUresult cuEventCreate(CUevent* out, unsigned flags) {
  Call call;
  if (call.error) return call.error;
  if (!out || flags & ~7u) return CUDA_ERROR_INVALID_VALUE;
  if (flags & CU_EVENT_INTERPROCESS) return not_supported("interprocess events");
  auto event = std::make_shared<Event>();
  event->context = call.context;
  event->flags = flags;
  *out = call.driver.events.add(event);
  return CUDA_SUCCESS;
}

DRIVER_API CUresult cuEventDestroy_v2(CUevent handle) {
  Call call(Call::ANY_CONTEXT);
  if (call.error) return call.error;
  return call.driver.events.remove(handle) ? CUDA_SUCCESS : CUDA_ERROR_INVALID_HANDLE;
}

DRIVER_API CUresult cuEventRecordWithFlags(CUevent handle, CUstream stream_handle, unsigned flags) {
  Call call;
  if (call.error) return call.error;
  EventPtr event = call.driver.events.find(handle);
  StreamPtr stream = find_stream(call, stream_handle);
  if (!event || !stream || event->context != stream->context) return CUDA_ERROR_INVALID_HANDLE;
  if (flags == CU_EVENT_EXTERNAL) return not_supported("cuEventRecord, external");
  if (flags != 0) return CUDA_ERROR_INVALID_VALUE;
  if (stream->capture) {
    if (!stream->capture->valid) return CUDA_ERROR_STREAM_CAPTURE_INVALIDATED;
    event->capture = stream->capture;
    event->nodes = stream->tail;
    event->operation.reset();
    return CUDA_SUCCESS;
  }
  Submission submission;
  submission.task = {CU_GRAPH_NODE_TYPE_EMPTY, nullptr};
  OperationPtr operation;
  if (CUresult error = submit(call, stream, std::move(submission), &operation)) return error;
  event->capture.reset();
  event->nodes.clear();
  event->operation = operation;
  return CUDA_SUCCESS;
}

DRIVER_API CUresult cuEventRecord(CUevent handle, CUstream stream) {
  return cuEventRecordWithFlags(handle, stream, 0);
}

DRIVER_API CUresult cuEventQuery(CUevent handle) {
  Call call(Call::ANY_CONTEXT);
  if (call.error) return call.error;
  EventPtr event;
  if (CUresult error = find_recorded(call, handle, &event)) return error;
  if (!event->operation) return CUDA_SUCCESS;
  if (event->operation->state == Operation::DONE) return event->operation->error;
  make_progress(call.lock, *call.thread, event->operation);
  return CUDA_ERROR_NOT_READY;
}

DRIVER_API CUresult cuEventSynchronize(CUevent handle) {
  Call call(Call::ANY_CONTEXT);
  if (call.error) return call.error;
  EventPtr event;
  if (CUresult error = find_recorded(call, handle, &event)) return error;
  OperationPtr operation = event->operation;
  if (!operation) return CUDA_SUCCESS;
  complete(call.lock, *call.thread, {operation});
  return operation->error;
}

DRIVER_API CUresult cuEventElapsedTime_v2(float* milliseconds, CUevent start_handle,
                                          CUevent end_handle) {
  Call call(Call::ANY_CONTEXT);
  if (call.error) return call.error;
  if (!milliseconds) return CUDA_ERROR_INVALID_VALUE;
  EventPtr start = call.driver.events.find(start_handle);
  EventPtr end = call.driver.events.find(end_handle);
  if (!start || !end) return CUDA_ERROR_INVALID_HANDLE;
  if ((start->flags | end->flags) & CU_EVENT_DISABLE_TIMING) return CUDA_ERROR_INVALID_HANDLE;
  if (start->capture || end->capture) return CUDA_ERROR_CAPTURED_EVENT;
  if (!start->operation || !end->operation) return CUDA_ERROR_INVALID_HANDLE;
  for (const EventPtr& event : {start, end}) {
    if (event->operation->state != Operation::DONE) return CUDA_ERROR_NOT_READY;
    if (event->operation->error) return event->operation->error;
  }
  *milliseconds =
      static_cast<float>(end->operation->finished_ns - start->operation->finished_ns) * 1e-6f;
  return CUDA_SUCCESS;
}

DRIVER_API CUresult cuEventElapsedTime(float* milliseconds, CUevent start, CUevent end) {
  return cuEventElapsedTime_v2(milliseconds, start, end);
}
