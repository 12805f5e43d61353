// Stream capture: calls that turn submissions into graph nodes, and calls that a capture forbids.
#include <algorithm>
#include <unordered_set>

#include "api.h"

namespace driver {

void invalidate(Capture& capture) { capture.valid = false; }

CUresult capture_forbids(Call& call) {
  if (call.thread->capture_mode == CU_STREAM_CAPTURE_MODE_RELAXED) return CUDA_SUCCESS;
  bool forbidden = false;
  for (const CapturePtr& capture : call.driver.captures) {
    if (capture->mode == CU_STREAM_CAPTURE_MODE_RELAXED) continue;
    bool own = capture->thread == call.thread;
    bool global = capture->mode == CU_STREAM_CAPTURE_MODE_GLOBAL &&
                  call.thread->capture_mode == CU_STREAM_CAPTURE_MODE_GLOBAL;
    if (!own && !global) continue;
    invalidate(*capture);
    forbidden = true;
  }
  return forbidden ? CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED : CUDA_SUCCESS;
}

CUresult join_capture(Call& call, const StreamPtr& stream, const Event& event) {
  const CapturePtr& capture = event.capture;
  auto& captures = call.driver.captures;
  if (std::find(captures.begin(), captures.end(), capture) == captures.end()) {
    return CUDA_ERROR_CAPTURED_EVENT;  // the capture has ended
  }
  if (!capture->valid) return CUDA_ERROR_STREAM_CAPTURE_INVALIDATED;
  if (stream->legacy) {
    invalidate(*capture);
    return CUDA_ERROR_STREAM_CAPTURE_IMPLICIT;
  }
  if (stream->capture && stream->capture != capture) {
    invalidate(*capture);
    invalidate(*stream->capture);
    return CUDA_ERROR_STREAM_CAPTURE_MERGE;
  }
  if (!stream->capture) {
    stream->capture = capture;
    stream->tail.clear();
    capture->streams.push_back(stream);
  }
  for (const NodePtr& node : event.nodes) {
    auto& tail = stream->tail;
    if (std::find(tail.begin(), tail.end(), node) == tail.end()) tail.push_back(node);
  }
  return CUDA_SUCCESS;
}

namespace {

// Returns whether all nodes precede the end of the stream on which the capture began.
bool is_joined(const Capture& capture) {
  std::unordered_set<const Node*> reached;
  std::vector<NodePtr> stack = capture.origin->tail;
  while (!stack.empty()) {
    NodePtr node = stack.back();
    stack.pop_back();
    if (!reached.insert(node.get()).second) continue;
    stack.insert(stack.end(), node->depends_on.begin(), node->depends_on.end());
  }
  return reached.size() == capture.graph->nodes.size();
}

CUstreamCaptureStatus status_of(const Stream& stream) {
  if (!stream.capture) return CU_STREAM_CAPTURE_STATUS_NONE;
  return stream.capture->valid ? CU_STREAM_CAPTURE_STATUS_ACTIVE
                               : CU_STREAM_CAPTURE_STATUS_INVALIDATED;
}

CUresult capture_info(CUstream handle, CUstreamCaptureStatus* status, uint64_t* id) {
  Call call;
  if (call.error) return call.error;
  StreamPtr stream = find_stream(call, handle);
  if (!stream) return CUDA_ERROR_INVALID_HANDLE;
  if (!status) return CUDA_ERROR_INVALID_VALUE;
  if (stream->legacy) {
    for (const StreamPtr& other : call.context->streams) {
      if (other->blocking() && other->capture) return CUDA_ERROR_STREAM_CAPTURE_IMPLICIT;
    }
  }
  *status = status_of(*stream);
  if (id && stream->capture) *id = stream->capture->id;
  return CUDA_SUCCESS;
}

}  // namespace
}  // namespace driver

using namespace driver;

DRIVER_API CUresult cuStreamBeginCapture_v2(CUstream handle, CUstreamCaptureMode mode) {
  Call call;
  if (call.error) return call.error;
  StreamPtr stream = find_stream(call, handle);
  if (!stream) return CUDA_ERROR_INVALID_HANDLE;
  if (mode < CU_STREAM_CAPTURE_MODE_GLOBAL || mode > CU_STREAM_CAPTURE_MODE_RELAXED) {
    return CUDA_ERROR_INVALID_VALUE;
  }
  if (stream->legacy) return CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED;
  if (stream->capture) return CUDA_ERROR_ILLEGAL_STATE;
  if (CUresult error = domain_of(*call.thread, *stream)->error) return error;
  auto& nodes = call.driver.nodes;
  for (auto it = nodes.begin(); it != nodes.end();) {
    it = it->second.expired() ? nodes.erase(it) : std::next(it);
  }
  auto capture = std::make_shared<Capture>();
  capture->id = ++call.driver.next_id;
  capture->mode = mode;
  capture->thread = call.thread;
  capture->origin = stream;
  capture->streams = {stream};
  capture->graph = std::make_shared<Graph>();
  capture->graph->context = stream->context;
  stream->capture = capture;
  stream->tail.clear();
  call.driver.captures.push_back(capture);
  return CUDA_SUCCESS;
}

DRIVER_API CUresult cuStreamEndCapture(CUstream handle, CUgraph* out) {
  Call call;
  if (call.error) return call.error;
  StreamPtr stream = find_stream(call, handle);
  if (!stream) return CUDA_ERROR_INVALID_HANDLE;
  if (!out) return CUDA_ERROR_INVALID_VALUE;
  *out = nullptr;
  CapturePtr capture = stream->capture;
  if (!capture) return CUDA_ERROR_ILLEGAL_STATE;
  if (capture->mode != CU_STREAM_CAPTURE_MODE_RELAXED && capture->thread != call.thread) {
    return CUDA_ERROR_STREAM_CAPTURE_WRONG_THREAD;
  }
  if (capture->origin != stream) {
    invalidate(*capture);
    return CUDA_ERROR_STREAM_CAPTURE_UNMATCHED;
  }
  bool joined = is_joined(*capture);
  for (const StreamPtr& member : capture->streams) {
    member->capture.reset();
    member->tail.clear();
  }
  auto& captures = call.driver.captures;
  captures.erase(std::find(captures.begin(), captures.end(), capture));
  capture->origin.reset();
  capture->streams.clear();
  if (!capture->valid) return CUDA_ERROR_STREAM_CAPTURE_INVALIDATED;
  if (!joined) return CUDA_ERROR_STREAM_CAPTURE_UNJOINED;
  *out = call.driver.graphs.add(capture->graph);
  return CUDA_SUCCESS;
}

DRIVER_API CUresult cuStreamIsCapturing(CUstream handle, CUstreamCaptureStatus* status) {
  return capture_info(handle, status, nullptr);
}

DRIVER_API CUresult cuStreamGetCaptureInfo_v2(CUstream handle, CUstreamCaptureStatus* status,
                                              uint64_t* id, CUgraph* graph,
                                              const CUgraphNode** dependencies, size_t* count) {
  if (graph || dependencies || count) return not_supported("cuStreamGetCaptureInfo of a graph");
  return capture_info(handle, status, id);
}

DRIVER_API CUresult cuStreamGetCaptureInfo_v3(CUstream handle, CUstreamCaptureStatus* status,
                                              uint64_t* id, CUgraph* graph,
                                              const CUgraphNode** dependencies, const void** edges,
                                              size_t* count) {
  if (edges) return not_supported("cuStreamGetCaptureInfo of edges");
  return cuStreamGetCaptureInfo_v2(handle, status, id, graph, dependencies, count);
}

DRIVER_API CUresult cuThreadExchangeStreamCaptureMode(CUstreamCaptureMode* mode) {
  Call call(Call::ANY_CONTEXT);
  if (call.error) return call.error;
  if (!mode || *mode < CU_STREAM_CAPTURE_MODE_GLOBAL || *mode > CU_STREAM_CAPTURE_MODE_RELAXED) {
    return CUDA_ERROR_INVALID_VALUE;
  }
  std::swap(*mode, call.thread->capture_mode);
  return CUDA_SUCCESS;
}
