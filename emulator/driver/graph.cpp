// Graphs: the result of a capture, its executable form, and its launches. A launch gives each node
// its own operation, so the schedule draws a new topological order each time.
#include <unordered_map>

#include "api.h"

namespace driver {
namespace {

CUresult instantiate(CUgraphExec* out, CUgraph handle, unsigned long long flags) {
  Call call;
  if (call.error) return call.error;
  GraphPtr graph = call.driver.graphs.find(handle);
  if (!out || !graph || flags & ~15ull) return CUDA_ERROR_INVALID_VALUE;
  if (flags & CUDA_GRAPH_INSTANTIATE_FLAG_DEVICE_LAUNCH) {
    return not_supported("graphs that the device launches");
  }
  auto exec = std::make_shared<GraphExec>();
  exec->context = graph->context;
  exec->nodes = graph->nodes;
  exec->flags = flags;
  *out = call.driver.graph_execs.add(exec);
  return CUDA_SUCCESS;
}

}  // namespace
}  // namespace driver

using namespace driver;

DRIVER_API CUresult cuGraphInstantiateWithFlags(CUgraphExec* out, CUgraph graph,
                                                unsigned long long flags) {
  return instantiate(out, graph, flags);
}

DRIVER_API CUresult cuGraphUpload(CUgraphExec handle, CUstream stream_handle) {
  Call call;
  if (call.error) return call.error;
  if (!call.driver.graph_execs.find(handle)) return CUDA_ERROR_INVALID_VALUE;
  StreamPtr stream = find_stream(call, stream_handle);
  if (!stream) return CUDA_ERROR_INVALID_HANDLE;
  if (stream->capture) {
    invalidate(*stream->capture);
    return CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED;
  }
  return domain_of(*call.thread, *stream)->error;
}

DRIVER_API CUresult cuGraphLaunch(CUgraphExec handle, CUstream stream_handle) {
  Call call;
  if (call.error) return call.error;
  auto exec = call.driver.graph_execs.find(handle);
  if (!exec) return CUDA_ERROR_INVALID_VALUE;
  StreamPtr stream = find_stream(call, stream_handle);
  if (!stream || stream->context != exec->context) return CUDA_ERROR_INVALID_HANDLE;
  if (stream->capture) {
    invalidate(*stream->capture);
    return not_supported("launching a graph into a capture");
  }
  // Everything is queued before any of it may run: the entry in stream order, then the nodes, then
  // the operation after which the stream continues.
  Submission entry;
  entry.task = {CU_GRAPH_NODE_TYPE_EMPTY, nullptr};
  entry.after = exec->last_launch;
  OperationPtr begin;
  if (CUresult error = submit(call, stream, std::move(entry), &begin)) return error;
  ErrorDomainPtr domain = domain_of(*call.thread, *stream);
  std::unordered_map<const Node*, OperationPtr> operations;
  std::vector<std::pair<OperationPtr, bool>> all = {{begin, false}};
  for (const NodePtr& node : exec->nodes) {
    std::vector<std::pair<OperationPtr, bool>> after = {{begin, false}};
    for (const NodePtr& needed : node->depends_on) {
      after.emplace_back(operations.at(needed.get()), false);
    }
    Submission submission;
    submission.task = node->task;
    if (node->task.type == CU_GRAPH_NODE_TYPE_KERNEL) call.driver.counters.launches++;
    OperationPtr operation =
        enqueue(call.thread, stream->context, domain, std::move(submission), after);
    operations[node.get()] = operation;
    all.emplace_back(operation, false);
  }
  // Work that another thread has put on the stream meanwhile also precedes the end of this launch.
  all.emplace_back(stream->last, false);
  Submission exit;
  exit.task = {CU_GRAPH_NODE_TYPE_EMPTY, nullptr};
  OperationPtr end = enqueue(call.thread, stream->context, domain, std::move(exit), all);
  stream->last = end;
  exec->last_launch = end;
  limit_queue(call.lock, *call.thread, *stream->context);
  return CUDA_SUCCESS;
}

DRIVER_API CUresult cuGraphExecDestroy(CUgraphExec handle) {
  Call call(Call::ANY_CONTEXT);
  if (call.error) return call.error;
  return call.driver.graph_execs.remove(handle) ? CUDA_SUCCESS : CUDA_ERROR_INVALID_VALUE;
}

DRIVER_API CUresult cuGraphDestroy(CUgraph handle) {
  Call call(Call::ANY_CONTEXT);
  if (call.error) return call.error;
  return call.driver.graphs.remove(handle) ? CUDA_SUCCESS : CUDA_ERROR_INVALID_VALUE;
}

DRIVER_API CUresult cuGraphExecGetFlags(CUgraphExec handle, uint64_t* flags) {
  Call call;
  if (call.error) return call.error;
  auto exec = call.driver.graph_execs.find(handle);
  if (!exec || !flags) return CUDA_ERROR_INVALID_VALUE;
  *flags = exec->flags;
  return CUDA_SUCCESS;
}

DRIVER_API CUresult cuGraphGetNodes(CUgraph handle, CUgraphNode* nodes, size_t* count) {
  Call call;
  if (call.error) return call.error;
  GraphPtr graph = call.driver.graphs.find(handle);
  if (!graph || !count) return CUDA_ERROR_INVALID_VALUE;
  if (nodes) {
    for (size_t i = 0; i < *count; i++) {
      nodes[i] = i < graph->nodes.size() ? graph->nodes[i]->handle : nullptr;
    }
    if (*count < graph->nodes.size()) return CUDA_SUCCESS;
  }
  *count = graph->nodes.size();
  return CUDA_SUCCESS;
}

DRIVER_API CUresult cuGraphNodeGetType(CUgraphNode handle, CUgraphNodeType* type) {
  Call call;
  if (call.error) return call.error;
  auto found = call.driver.nodes.find(handle);
  NodePtr node = found == call.driver.nodes.end() ? nullptr : found->second.lock();
  if (!node || !type) return CUDA_ERROR_INVALID_VALUE;
  *type = node->task.type;
  return CUDA_SUCCESS;
}
