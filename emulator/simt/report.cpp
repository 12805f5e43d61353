// Reports: the fault, the thread and the place, and for a deadlock the state of every thread.
#include "state.h"

#include <cstdarg>
#include <cstdio>

namespace simt {

std::string report_head(const Fiber* fiber) {
  char text[512];
  const BlockVars* block = block_vars;
  const uint3 thread = fiber != nullptr ? fiber->thread_idx : uint3{0, 0, 0};
  std::snprintf(text, sizeof text, "kernel '%s' block (%u,%u,%u) thread (%u,%u,%u) seed %llu: ",
                cluster->kernel->symbol, block->block_idx.x, block->block_idx.y, block->block_idx.z,
                thread.x, thread.y, thread.z,
                static_cast<unsigned long long>(cluster->config->seed));
  return text;
}

void fail_with(const std::string& message) {
  Fiber* const fiber = current_fiber();
  cluster->error = report_head(fiber) + message;
  cluster->failed = true;
  tsan_release(&cluster->end_tag);
  switch_to(fiber, &cluster->main, true);
  __builtin_unreachable();
}

void fail(const char* format, ...) {
  char text[1024];
  va_list arguments;
  va_start(arguments, format);
  std::vsnprintf(text, sizeof text, format, arguments);
  va_end(arguments);
  fail_with(text);
}

// Describes the condition that a waiting thread lacks.
static std::string missing_condition(const Fiber* fiber) {
  char text[256] = "";
  switch (fiber->state) {
    case State::Barrier: {
      const Barrier& barrier = fiber->block->barrier[fiber->barrier];
      std::snprintf(text, sizeof text, " (barrier %d: %d of %d threads arrived)", fiber->barrier,
                    barrier.arrived, barrier.expected != 0 ? barrier.expected : fiber->block->live);
      break;
    }
    case State::Warp:
      std::snprintf(text, sizeof text, " (mask %08x, arrived %08x)",
                    fiber->warp->arrival[fiber->lane].mask, fiber->warp->pending);
      break;
    case State::Mbarrier:
      if (const Mbarrier* m = find_mbarrier(fiber->block, fiber->address)) {
        std::snprintf(text, sizeof text,
                      " (mbarrier at 0x%x, parity %u: %d of %d arrivals and %lld bytes missing, "
                      "phase %u)",
                      fiber->address, fiber->parity, m->pending, m->count,
                      static_cast<long long>(m->bytes), m->phase);
      }
      break;
    case State::ClusterBarrier:
      std::snprintf(text, sizeof text, " (%d of %d threads arrived)", cluster->cluster_arrived,
                    cluster->live);
      break;
    case State::Running:
    case State::Wgmma:
    case State::Exited:
      break;
  }
  return text;
}

static bool waits_equally(const Fiber* a, const Fiber* b) {
  if (a->block != b->block || a->state != b->state) return false;
  if (a->state == State::Exited) return true;
  return a->kind == b->kind && a->site.file == b->site.file && a->site.line == b->site.line &&
         (a->state != State::Barrier || a->barrier == b->barrier) &&
         (a->state != State::Warp || a->warp == b->warp);
}

std::string deadlock_report() {
  std::string report = "deadlock: no thread can run";
  const std::vector<Fiber*>& fibers = cluster->fibers;
  for (size_t i = 0, next; i < fibers.size(); i = next) {
    const Fiber* fiber = fibers[i];
    for (next = i + 1; next < fibers.size() && waits_equally(fiber, fibers[next]);) next++;
    char text[512];
    int length = std::snprintf(text, sizeof text, "\n  threads %u-%u", fiber->linear,
                               fibers[next - 1]->linear);
    if (cluster->blocks.size() > 1) {
      length += std::snprintf(text + length, sizeof text - length, " of block %u of the cluster",
                              fiber->block->cluster_rank);
    }
    if (fiber->state == State::Exited) {
      std::snprintf(text + length, sizeof text - length, ": exited");
    } else if (fiber->state == State::Running) {
      std::snprintf(text + length, sizeof text - length, ": running");
    } else {
      std::snprintf(text + length, sizeof text - length, ": in %s at %s:%d", fiber->kind,
                    fiber->site.file, fiber->site.line);
    }
    report += text + missing_condition(fiber);
  }
  return report;
}

}  // namespace simt
