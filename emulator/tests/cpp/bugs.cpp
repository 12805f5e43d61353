// Each planted bug must be reported, or must give wrong results in a stated share of the schedules;
// each correct twin must be right in all of them.
#include <functional>

#include "testing.h"

namespace {

using testing::Buffer;
using testing::contains;
using testing::run;
using testing::seeds;
using testing::Shape;

constexpr int BLOCK = 64;

// The outcome of the schedules of one kernel.
struct Outcome {
  uint64_t runs = 0, reported = 0, wrong = 0;
  std::string report;  // the first one
  uint64_t caught() const { return reported + wrong; }
};

template <class... A>
Outcome try_seeds(const char* symbol, const Shape& shape, size_t outputs,
                  const std::function<bool(const Buffer<int>&)>& right, A... arguments) {
  Outcome outcome;
  for (uint64_t seed = 0; seed < seeds(50); seed++) {
    Buffer<int> out(outputs);
    Shape seeded = shape;
    seeded.seed = seed;
    const std::string report = run(symbol, seeded, out.get(), arguments...);
    outcome.runs++;
    if (!report.empty()) {
      outcome.reported++;
      if (outcome.report.empty()) outcome.report = report;
    } else if (!right(out)) {
      outcome.wrong++;
    }
  }
  return outcome;
}

bool anything(const Buffer<int>&) { return true; }

// The kernel must be stopped under every seed, with a report that contains all the words.
template <class... A>
void must_report(const char* symbol, const Shape& shape, const std::vector<std::string>& words,
                 A... arguments) {
  const Outcome outcome = try_seeds(symbol, shape, BLOCK, anything, arguments...);
  CHECK(outcome.reported == outcome.runs, "%s: reported in %llu of %llu schedules", symbol,
        static_cast<unsigned long long>(outcome.reported),
        static_cast<unsigned long long>(outcome.runs));
  CHECK(contains(outcome.report, symbol), "the report does not name the kernel: %s",
        outcome.report.c_str());
  for (const std::string& word : words) {
    CHECK(contains(outcome.report, word), "'%s' is not in: %s", word.c_str(),
          outcome.report.c_str());
  }
}

// At least `percent` of the schedules must fail, by a report or by wrong results.
void must_catch(const char* symbol, const Outcome& outcome, uint64_t percent) {
  if (testing::UNDER_TSAN) return;  // The sanitizer reports the race itself.
  CHECK(outcome.caught() * 100 >= outcome.runs * percent, "%s: caught in %llu of %llu schedules",
        symbol, static_cast<unsigned long long>(outcome.caught()),
        static_cast<unsigned long long>(outcome.runs));
}

void must_pass(const char* symbol, const Outcome& outcome) {
  CHECK(outcome.caught() == 0, "%s: %llu reports, %llu wrong results; %s", symbol,
        static_cast<unsigned long long>(outcome.reported),
        static_cast<unsigned long long>(outcome.wrong), outcome.report.c_str());
}

const Shape ONE_BLOCK = {dim3(1), dim3(BLOCK)};
const Shape ONE_WARP = {dim3(1), dim3(32)};
Shape with_shared(Shape shape, size_t bytes) {
  shape.shared_bytes = bytes;
  return shape;
}

// ---- Reports ----

TEST(bug_divergent_barrier) {
  must_report("emu_bug_divergent_barrier", ONE_BLOCK,
              {"divergent barrier", "bugs.cu:13", "bugs.cu:15"});
}
TEST(bug_lost_barrier) {
  must_report("emu_bug_lost_barrier", ONE_BLOCK,
              {"deadlock", "bar.sync", "bugs.cu:", "barrier 1: 32 of 64 threads arrived"});
}
TEST(bug_barrier_count) {
  must_report("emu_bug_barrier_count", ONE_BLOCK, {"barrier 1 expects", "bugs.cu:"});
}
TEST(bug_absent_lanes) {
  must_report("emu_bug_absent_lanes", ONE_BLOCK,
              {"deadlock", "__shfl_xor_sync", "mask ffffffff, arrived 000fffff", "__syncthreads"});
}
TEST(bug_mixed_operations) {
  must_report("emu_bug_mixed_operations", ONE_BLOCK,
              {"divergent warp operation", "__shfl_sync", "__ballot_sync", "bugs.cu:"});
}
TEST(bug_mask_without_caller) {
  must_report("emu_bug_mask_without_caller", ONE_BLOCK, {"does not contain the calling lane"});
}
TEST(bug_spin) {
  Buffer<int> out(1);
  const std::string report = run("emu_bug_spin", ONE_BLOCK, static_cast<volatile int*>(out.get()));
  CHECK(contains(report, "livelock"), "%s", report.c_str());
}
TEST(bug_misaligned_ldmatrix) {
  must_report("emu_bug_misaligned_ldmatrix", with_shared(ONE_BLOCK, 1024),
              {"ldmatrix", "not 16-byte aligned", "bugs.cu:"});
}
TEST(bug_misaligned_cp_async) {
  Buffer<int> in(BLOCK + 4);
  must_report("emu_bug_misaligned_cp_async", with_shared(ONE_BLOCK, 1024),
              {"cp.async", "not 16-byte aligned", "bugs.cu:"}, static_cast<const int*>(in.get()));
}

// AddressSanitizer ends the process at these, with the exact line.
TEST(crash_shared_past_end) {
  must_report("emu_bug_shared_past_end", with_shared(ONE_BLOCK, BLOCK * 4),
              {"shared memory overrun", "byte 0 past the end of dynamic shared memory"});
}
TEST(crash_static_shared_past_end) {
  must_report("emu_bug_static_shared_past_end", ONE_BLOCK,
              {"shared memory overrun", "past the end of a static array"}, 1);
}
TEST(crash_shared_far) {
  must_report("emu_bug_shared_far", with_shared(ONE_BLOCK, 1024), {"invalid access"});
}
TEST(crash_global_past_end) {
  must_report("emu_bug_global_past_end", ONE_BLOCK,
              {"invalid access", "byte 256 of an allocation of 256 bytes"});
}
TEST(crash_stack_overflow) {
  must_report("emu_bug_stack_overflow", ONE_BLOCK, {"invalid access", "stack overflow"});
}
TEST(crash_freed_memory) {
  int* const freed = static_cast<int*>(simt::device_alloc(BLOCK * 4));
  simt::device_free(freed);
  const std::string report = run("emu_ok_syncthreads", with_shared(ONE_BLOCK, BLOCK * 4), freed);
  CHECK(contains(report, "byte ") && contains(report, "a freed allocation"), "%s", report.c_str());
}
TEST(bug_shared_too_large) {
  simt::set_device_limits({9, 0, 40000, true, true, true});
  const std::string report = run("emu_bug_shared_too_large", ONE_BLOCK, static_cast<int*>(nullptr));
  simt::set_device_limits({9, 0, 227 * 1024, true, true, true});
  CHECK(contains(report, "48000 of static shared memory"), "%s", report.c_str());
}

// ---- Wrong results ----

bool swapped(const Buffer<int>& out) {
  for (int i = 0; i < 32; i++) {
    if (out[i] != (i ^ 1)) return false;
  }
  return true;
}
bool reversed(const Buffer<int>& out) {
  for (int i = 0; i < BLOCK; i++) {
    if (out[i] != BLOCK - 1 - i) return false;
  }
  return true;
}

TEST(bug_uninitialised_shared) {
  must_catch("uninitialised",
             try_seeds("emu_bug_uninitialised_shared", with_shared(ONE_BLOCK, 256), BLOCK,
                       [](const Buffer<int>& out) { return out[63] == 1; }),
             100);
}
TEST(race_missing_syncwarp) {
  must_catch("missing_syncwarp",
             try_seeds("emu_bug_missing_syncwarp", with_shared(ONE_WARP, 128), 32, swapped), 100);
}
TEST(ok_syncwarp) {
  must_pass("syncwarp", try_seeds("emu_ok_syncwarp", with_shared(ONE_WARP, 128), 32, swapped));
}
TEST(ok_syncthreads) {
  must_pass("syncthreads",
            try_seeds("emu_ok_syncthreads", with_shared(ONE_BLOCK, 256), BLOCK, reversed));
}
// Only the race checker can find these; a plain run must complete.
TEST(race_shuffle_for_syncwarp) {
  try_seeds("emu_bug_shuffle_for_syncwarp", with_shared(ONE_WARP, 128), 32, anything);
}
TEST(race_global) { try_seeds("emu_bug_global_race", ONE_BLOCK, 1, anything); }

std::vector<int> bin_numbers() {
  std::vector<int> in(500);
  for (size_t i = 0; i < in.size(); i++) in[i] = static_cast<int>(i * i % BLOCK);
  return in;
}
bool histogram_right(const Buffer<int>& out) {
  std::vector<int> want(BLOCK);
  for (int bin : bin_numbers()) want[bin]++;
  return out.copy() == want;
}
TEST(race_missing_syncthreads) {
  Buffer<int> in(bin_numbers());
  must_catch("missing_syncthreads",
             try_seeds("emu_bug_missing_syncthreads", ONE_BLOCK, BLOCK, histogram_right,
                       static_cast<const int*>(in.get()), static_cast<int>(in.size())),
             90);
}
TEST(ok_histogram) {
  Buffer<int> in(bin_numbers());
  must_pass("histogram", try_seeds("emu_ok_histogram", ONE_BLOCK, BLOCK, histogram_right,
                                   static_cast<const int*>(in.get()), static_cast<int>(in.size())));
}

constexpr int TILES = 7;
std::vector<int> tile_values() {
  std::vector<int> in(TILES * BLOCK * 4);
  for (size_t i = 0; i < in.size(); i++) in[i] = static_cast<int>(i * 7 % 1000);
  return in;
}
bool pipeline_right(const Buffer<int>& out) {
  const std::vector<int> in = tile_values();
  for (int t = 0; t < BLOCK; t++) {
    int sum = 0;
    for (int tile = 0; tile < TILES; tile++) {
      const int* values = &in[(tile * BLOCK + (t + 37) % BLOCK) * 4];
      sum += values[0] + values[3];
    }
    if (out[t] != sum) return false;
  }
  return true;
}
Outcome try_pipeline(const char* symbol) {
  Buffer<int> in(tile_values());
  return try_seeds(symbol, with_shared(ONE_BLOCK, 2 * BLOCK * 16), BLOCK, pipeline_right,
                   static_cast<const int*>(in.get()), TILES);
}
TEST(ok_pipeline) { must_pass("pipeline", try_pipeline("emu_ok_pipeline")); }
TEST(bug_missing_copy_wait) {
  must_catch("missing_copy_wait", try_pipeline("emu_bug_missing_copy_wait"), 50);
}
TEST(race_missing_refill_barrier) {
  must_catch("missing_refill_barrier", try_pipeline("emu_bug_missing_refill_barrier"), 40);
}

TEST(ok_named_barriers) {
  must_pass("named_barriers", try_seeds(
                                  "emu_ok_named_barriers", ONE_BLOCK, 32,
                                  [](const Buffer<int>& out) {
                                    for (int i = 0; i < 32; i++) {
                                      if (out[i] != 45 * (31 - i)) return false;
                                    }
                                    return true;
                                  },
                                  10));
}

bool warp_operations_right(const Buffer<int>& out) {
  for (int thread = 0; thread < BLOCK; thread++) {
    const int lane = thread % 32;
    int low = 0, high = 0;
    unsigned same = 0, thirds = 0;
    for (int l = 0; l < 32; l++) {
      (l < 12 ? low : high) += l < 12 ? l : -l;
      same |= l % 5 == lane % 5 ? 1u << l : 0;
      thirds |= l % 3 == 0 ? 1u << l : 0;
    }
    const int want[] = {lane < 12 ? low : high,
                        static_cast<int>(same),
                        static_cast<int>(thirds),
                        lane > 0 ? lane - 1 : 0,
                        lane % 8 < 6 ? lane + 2 : lane,
                        lane ^ 5,
                        lane / 8 * 8 + 1,
                        16,
                        3,
                        2};
    for (int i = 0; i < 10; i++) {
      if (out[thread * 10 + i] != want[i]) return false;
    }
  }
  return true;
}
TEST(ok_warp_operations) {
  must_pass("warp_operations",
            try_seeds("emu_ok_warp_operations", ONE_BLOCK, BLOCK * 10, warp_operations_right));
}

// ---- Refused launches and repeated ones ----

TEST(refused_launches) {
  Buffer<int> out(BLOCK);
  const auto refused = [&](Shape shape, const char* words) {
    const std::string report = run("emu_ok_syncthreads", shape, out.get());
    CHECK(contains(report, "was not launched") && contains(report, words), "%s", report.c_str());
  };
  refused({dim3(1), dim3(BLOCK * 2)}, "launch bound is 64");
  refused({dim3(1), dim3(2048)}, "1 to 1024");
  refused({dim3(0), dim3(BLOCK)}, "empty grid");
  refused({dim3(1, 65536), dim3(BLOCK)}, "65535");
  refused(with_shared(ONE_BLOCK, 228 * 1024), "dynamic shared memory");
  refused({dim3(3), dim3(BLOCK), 0, 0, dim3(2)}, "not a multiple");
  refused({dim3(16), dim3(BLOCK), 0, 0, dim3(16)}, "8 is the portable bound");
  simt::set_device_limits({8, 0, 163 * 1024, false, false, false});
  refused({dim3(2), dim3(BLOCK), 0, 0, dim3(2)}, "no clusters");
  refused(with_shared(ONE_BLOCK, 164 * 1024), "dynamic shared memory");
  simt::set_device_limits({9, 0, 227 * 1024, true, true, true});
}

// The schedule decides which thread wins a race: equal seeds repeat the order, different ones vary
// it.
TEST(equal_seeds_repeat_the_schedule) {
  if (testing::UNDER_TSAN || testing::os_threads > 1) return;
  std::vector<int> distinct;
  for (uint64_t seed = 0; seed < 40; seed++) {
    int last[2];
    for (int& value : last) {
      Buffer<int> out(1);
      run("emu_bug_global_race", {dim3(1), dim3(BLOCK), 0, seed}, out.get());
      value = out[0];
    }
    CHECK(last[0] == last[1], "seed %llu: %d, then %d", static_cast<unsigned long long>(seed),
          last[0], last[1]);
    bool seen = false;
    for (int value : distinct) seen |= value == last[0];
    if (!seen) distinct.push_back(last[0]);
  }
  CHECK(distinct.size() >= 5, "only %zu outcomes", distinct.size());
}

}  // namespace
