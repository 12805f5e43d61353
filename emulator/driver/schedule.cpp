// Execution order. Submitted operations form a graph whose edges are stream order, event waits and
// the legacy stream's rule. An operation runs only when a thread waits for it or a queue is full;
// the waiting thread then runs the operations that it needs, in an order that its seed draws. With
// a seed other than 0 a submission sometimes runs an operation at once, and a wait sometimes runs
// one that it does not need.
#include <algorithm>
#include <chrono>
#include <cstdio>
#include <unordered_set>

#include "api.h"

namespace driver {
namespace {

constexpr size_t QUEUE_LIMIT = 1024;  // the most unfinished operations of a context
constexpr unsigned EARLY_ONE_IN = 4;  // submissions that run an operation at once
constexpr unsigned STRAY_ONE_IN = 8;  // steps of a wait that run an unneeded operation
constexpr size_t STRAYS_CONSIDERED = 64;

bool is_ready(const Operation& operation) {
  return operation.state == Operation::PENDING && operation.waits_for.empty();
}

int64_t now_ns() {
  return std::chrono::duration_cast<std::chrono::nanoseconds>(
             std::chrono::steady_clock::now().time_since_epoch())
      .count();
}

void finish(Operation& operation) {
  operation.state = Operation::DONE;
  operation.finished_ns = now_ns();
  auto dependents = std::move(operation.dependents);
  operation.dependents.clear();
  for (auto& [dependent, inherits] : dependents) {
    auto& waits = dependent->waits_for;
    waits.erase(std::find_if(waits.begin(), waits.end(),
                             [&](const OperationPtr& p) { return p.get() == &operation; }));
    if (inherits && operation.error && !dependent->error) dependent->error = operation.error;
  }
  state().finished.notify_all();
  operation.context->unfinished.erase(operation.id);
}

void run(Lock& lock, const OperationPtr& operation) {
  operation->state = Operation::RUNNING;
  CUresult error = operation->error ? operation->error : operation->domain->error;
  if (operation->work && (!error || operation->always)) {
    lock.unlock();
    Outcome outcome = (*operation->work)(*operation);
    lock.lock();
    if (outcome.error) {
      std::fprintf(stderr, "%s: %s\n", error_name(outcome.error), outcome.report.c_str());
      operation->thread->report = outcome.report;
      operation->thread->report_error = outcome.error;
      state().counters.failures++;
      if (!error) error = outcome.error;
    }
  }
  operation->error = error;
  if (error && !operation->domain->error) {
    operation->domain->error = error;
    operation->domain->thread = operation->thread.get();
  }
  finish(*operation);
}

// The unfinished operations that these need, including themselves, in order of submission.
std::vector<OperationPtr> unfinished_ancestors(std::vector<OperationPtr> stack) {
  std::vector<OperationPtr> found;
  std::unordered_set<const Operation*> seen;
  while (!stack.empty()) {
    OperationPtr operation = std::move(stack.back());
    stack.pop_back();
    if (!operation || operation->state == Operation::DONE) continue;
    if (!seen.insert(operation.get()).second) continue;
    stack.insert(stack.end(), operation->waits_for.begin(), operation->waits_for.end());
    found.push_back(std::move(operation));
  }
  std::sort(found.begin(), found.end(),
            [](const OperationPtr& a, const OperationPtr& b) { return a->id < b->id; });
  return found;
}

OperationPtr choose(HostThread& thread, const std::vector<OperationPtr>& operations) {
  OperationPtr chosen;
  uint64_t ready = 0;
  for (const OperationPtr& operation : operations) {
    if (!is_ready(*operation)) continue;
    if (thread.seed == 0) return operation;
    if (draw(thread) % ++ready == 0) chosen = operation;
  }
  return chosen;
}

// An operation of this thread that could run now.
OperationPtr choose_stray(HostThread& thread, const Context& context) {
  std::vector<OperationPtr> own;
  for (auto& [id, operation] : context.unfinished) {
    if (operation->thread.get() == &thread && is_ready(*operation)) own.push_back(operation);
    if (own.size() == STRAYS_CONSIDERED) break;
  }
  return choose(thread, own);
}

}  // namespace

void complete(Lock& lock, HostThread& thread, std::vector<OperationPtr> targets) {
  std::vector<OperationPtr> needed = unfinished_ancestors(std::move(targets));
  for (;;) {
    needed.erase(std::remove_if(needed.begin(), needed.end(),
                                [](const OperationPtr& p) { return p->state == Operation::DONE; }),
                 needed.end());
    if (needed.empty()) return;
    OperationPtr chosen;
    if (draw_one_in(thread, STRAY_ONE_IN)) chosen = choose_stray(thread, *needed[0]->context);
    if (!chosen) chosen = choose(thread, needed);
    if (chosen) {
      run(lock, chosen);
    } else {
      // Another thread runs an operation that this one needs. wait() is not used: with GCC 12 and
      // later it is a symbol that the libstdc++ of RHEL 9 lacks.
      state().finished.wait_for(lock, std::chrono::seconds(1));
    }
  }
}

void complete_context(Lock& lock, HostThread& thread, Context& context) {
  std::vector<OperationPtr> all;
  for (auto& [id, operation] : context.unfinished) all.push_back(operation);
  complete(lock, thread, std::move(all));
}

void make_progress(Lock& lock, HostThread& thread, const OperationPtr& target) {
  std::vector<OperationPtr> needed = unfinished_ancestors({target});
  if (needed.empty()) return;
  OperationPtr chosen = choose(thread, needed);
  if (chosen) {
    run(lock, chosen);
  } else {
    state().finished.wait_for(lock, std::chrono::milliseconds(1));
  }
}

OperationPtr enqueue(const std::shared_ptr<HostThread>& thread, const ContextPtr& context,
                     const ErrorDomainPtr& domain, Submission submission,
                     const std::vector<std::pair<OperationPtr, bool>>& after) {
  auto operation = std::make_shared<Operation>();
  operation->id = ++state().next_id;
  operation->work = std::move(submission.task.work);
  operation->always = submission.always;
  operation->thread = thread;
  operation->context = context;
  operation->domain = domain;
  operation->os_threads = thread->os_threads;
  operation->left_out = thread->left_out;
  if (submission.task.type == CU_GRAPH_NODE_TYPE_KERNEL && thread->seed != 0) {
    operation->seed = (thread->seed + 0x9e3779b97f4a7c15u * ++thread->launches) | 1;
  }
  for (auto& [predecessor, inherits] : after) {
    if (!predecessor) continue;
    if (predecessor->state == Operation::DONE) {
      if (inherits && !operation->error) operation->error = predecessor->error;
      continue;
    }
    predecessor->dependents.emplace_back(operation, inherits);
    operation->waits_for.push_back(predecessor);
  }
  context->unfinished.emplace(operation->id, operation);
  return operation;
}

void limit_queue(Lock& lock, HostThread& thread, Context& context) {
  while (context.unfinished.size() > QUEUE_LIMIT) {
    complete(lock, thread, {context.unfinished.begin()->second});
  }
  if (draw_one_in(thread, EARLY_ONE_IN)) {
    if (OperationPtr early = choose_stray(thread, context)) run(lock, early);
  }
}

uint64_t draw(HostThread& thread) {
  thread.random += 0x9e3779b97f4a7c15u;  // splitmix64
  uint64_t z = thread.random;
  z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
  z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
  return z ^ (z >> 31);
}

bool draw_one_in(HostThread& thread, unsigned count) {
  return thread.seed != 0 && draw(thread) % count == 0;
}

std::shared_ptr<const Work> make_work(Work work) {
  return std::make_shared<const Work>(std::move(work));
}

}  // namespace driver
