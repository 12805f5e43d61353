// TMA, mbarriers, wgmma and clusters in combination, and mistakes with them.
#include "testing.h"

namespace {

using testing::Buffer;
using testing::contains;
using testing::run;
using testing::seeds;
using testing::Shape;

CUtensorMap matrix_map(void* base, int data_type, int element_bytes, uint64_t columns,
                       uint64_t rows, uint32_t box_columns, uint32_t box_rows, int swizzle) {
  CUtensorMap map;
  const uint64_t dim[] = {columns, rows}, stride[] = {columns * element_bytes};
  const uint32_t box[] = {box_columns, box_rows}, ones[] = {1, 1};
  CHECK(simt::tensor_map_encode_tiled(&map, data_type, 2, base, dim, stride, box, ones, 0, swizzle,
                                      0, 0) == 0,
        "a tensor map of %zu x %zu was refused", size_t(rows), size_t(columns));
  return map;
}

// ---- The GEMM ----

struct Problem {
  int m, n, k;
  std::vector<__nv_bfloat16> a, b;
  std::vector<float> c;
};

Problem make_problem(int m, int n, int k, unsigned seed) {
  Problem p{m, n, k, {}, {}, {}};
  std::mt19937 random(seed);
  std::vector<int> a(m * k), b(n * k);
  for (int& v : a) p.a.push_back(__float2bfloat16_rn(float(v = int(random() % 15) - 7)));
  for (int& v : b) p.b.push_back(__float2bfloat16_rn(float(v = int(random() % 15) - 7)));
  for (int i = 0; i < m; i++) {
    for (int j = 0; j < n; j++) {
      int sum = 0;
      for (int l = 0; l < k; l++) sum += a[i * k + l] * b[j * k + l];
      p.c.push_back(float(sum));
    }
  }
  return p;
}

// The report of a run, "wrong result", or an empty string.
std::string run_gemm(const char* symbol, const Problem& p, uint64_t seed) {
  constexpr int BF16 = 9;
  Buffer<__nv_bfloat16> a(p.a), b(p.b);
  Buffer<float> c(p.c.size());
  const CUtensorMap map_a = matrix_map(a.get(), BF16, 2, p.k, p.m, 64, 128, 3);
  const CUtensorMap map_b = matrix_map(b.get(), BF16, 2, p.k, p.n, 64, 64, 3);
  const Shape shape = {dim3((p.n + 63) / 64, (p.m + 127) / 128), dim3(384), 3 * 24576 + 48, seed};
  const std::string report = run(symbol, shape, c.get(), map_a, map_b, p.m, p.n, p.k);
  if (!report.empty()) return report;
  return c.copy() == p.c ? "" : "wrong result";
}

TEST(ok_gemm_sm90) {
  for (uint64_t seed = 0; seed < seeds(50); seed++) {
    const int step = static_cast<int>(seed);
    const Problem p = make_problem(1 + step * 31 % 200, 1 + step * 53 % 150,
                                   8 * (1 + step * 7 % 50), static_cast<unsigned>(seed));
    const std::string report = run_gemm("emu_ok_gemm_sm90", p, seed);
    CHECK(report.empty(), "%d x %d x %d: %s", p.m, p.n, p.k, report.c_str());
  }
}

void must_catch_gemm(const char* symbol, uint64_t percent, const char* words) {
  const Problem p = make_problem(128, 64, 448, 1);
  uint64_t caught = 0;
  bool reported = false;
  for (uint64_t seed = 0; seed < seeds(50); seed++) {
    const std::string report = run_gemm(symbol, p, seed);
    caught += !report.empty();
    reported |= contains(report, words);
  }
  if (testing::UNDER_TSAN) return;  // The sanitizer reports the race itself.
  CHECK(caught * 100 >= percent * seeds(50), "%s: caught in %llu of %llu schedules", symbol,
        static_cast<unsigned long long>(caught), static_cast<unsigned long long>(seeds(50)));
  CHECK(reported, "%s: no outcome contains '%s'", symbol, words);
}
TEST(bug_gemm_no_empty_wait) {
  must_catch_gemm("emu_bug_gemm_no_empty_wait", 90, "more arrivals than the count");
}
TEST(race_gemm_early_release) { must_catch_gemm("emu_bug_gemm_early_release", 30, "wrong result"); }
TEST(race_gemm_no_multiply_wait) {
  must_catch_gemm("emu_bug_gemm_no_multiply_wait", 30, "wrong result");
}
TEST(race_gemm_too_few_bytes) { must_catch_gemm("emu_bug_gemm_too_few_bytes", 30, "mbarrier"); }

// ---- The tile copy ----

std::string run_add_one(const char* symbol, uint64_t seed) {
  constexpr int U32 = 2, TILES = 9, ROWS = TILES * 8 - 3;
  std::vector<uint32_t> values(ROWS * 32), want;
  for (size_t i = 0; i < values.size(); i++) values[i] = static_cast<uint32_t>(i * i);
  for (uint32_t value : values) want.push_back(value + 1);
  Buffer<uint32_t> in(values), out(values.size());
  const CUtensorMap map_in = matrix_map(in.get(), U32, 4, 32, ROWS, 32, 8, 0);
  const CUtensorMap map_out = matrix_map(out.get(), U32, 4, 32, ROWS, 32, 8, 0);
  const std::string report = run(symbol, {dim3(1), dim3(32), 2048, seed}, map_out, map_in, TILES);
  if (!report.empty()) return report;
  return out.copy() == want ? "" : "wrong result";
}
TEST(ok_add_one_sm90) {
  for (uint64_t seed = 0; seed < seeds(50); seed++) {
    const std::string report = run_add_one("emu_ok_add_one_sm90", seed);
    CHECK(report.empty(), "%s", report.c_str());
  }
}
TEST(bug_store_overwritten) {
  if (testing::UNDER_TSAN) return;
  uint64_t caught = 0;
  for (uint64_t seed = 0; seed < seeds(50); seed++) {
    caught += !run_add_one("emu_bug_store_overwritten", seed).empty();
  }
  CHECK(caught * 2 >= seeds(50), "caught in %llu schedules",
        static_cast<unsigned long long>(caught));
}

// ---- mbarriers and clusters ----

void must_report(const char* symbol, const std::vector<std::string>& words, unsigned cluster = 1) {
  for (uint64_t seed = 0; seed < seeds(50); seed++) {
    Buffer<int> out(32);
    const std::string report =
        run(symbol, {dim3(cluster), dim3(32), 0, seed, dim3(cluster)}, out.get());
    for (const std::string& word : words) {
      CHECK(contains(report, word), "%s: '%s' is not in '%s'", symbol, word.c_str(),
            report.c_str());
    }
  }
}
TEST(bug_mbarriers) {
  must_report("emu_bug_mbar_lost_bytes",
              {"deadlock", "mbarrier.try_wait at", "hopper_sm90.cu:", "4096 bytes missing"});
  must_report("emu_bug_mbar_uninitialised", {"no mbarrier was initialised"});
  must_report("emu_bug_mbar_overwritten", {"was overwritten"});
  must_report("emu_bug_mbar_too_many_arrivals", {"more arrivals than the count 1"});
}
TEST(bug_cluster) {
  must_report("emu_bug_cluster_rank", {"block 2 of a cluster of 2"}, 2);
  if (testing::UNDER_TSAN) return;
  uint64_t caught = 0;
  for (uint64_t seed = 0; seed < seeds(50); seed++) {
    Buffer<int> out(32);
    const std::string report =
        run("emu_bug_cluster_exits_early", {dim3(2), dim3(32), 0, seed, dim3(2)}, out.get());
    caught += contains(report, "has exited");
  }
  CHECK(caught * 5 >= seeds(50), "caught in %llu schedules",
        static_cast<unsigned long long>(caught));
}

// ---- Limits ----

TEST(other_devices) {
  const Problem p = make_problem(64, 64, 64, 1);
  simt::set_device_limits({12, 0, 99 * 1024, true, true, false});
  const std::string no_wgmma = run_gemm("emu_ok_gemm_sm90", p, 0);
  simt::set_device_limits({8, 0, 163 * 1024, false, false, false});
  const std::string no_hopper = run_gemm("emu_ok_gemm_sm90", p, 0);
  const std::string no_tma = run_add_one("emu_ok_add_one_sm90", 0);
  simt::set_device_limits({9, 0, 227 * 1024, true, true, true});
  CHECK(contains(no_wgmma, "not supported on compute capability 12.0"), "%s", no_wgmma.c_str());
  CHECK(contains(no_hopper, "not supported on compute capability 8.0"), "%s", no_hopper.c_str());
  CHECK(contains(no_tma, "mbarrier at"), "%s", no_tma.c_str());
}

TEST(tensor_map_rules) {
  alignas(64) CUtensorMap map[2];
  Buffer<uint16_t> memory(4096);
  struct Request {
    void* map;
    int type;
    void* base;
    std::vector<uint64_t> dim, stride;
    std::vector<uint32_t> box, step;
    int interleave, swizzle, l2, fill;
  };
  const Request good = {&map[0], 1, memory.get(), {64, 32}, {128}, {64, 16}, {1, 1}, 0, 3, 2, 0};
  const auto accepts = [](const Request& r) {
    return simt::tensor_map_encode_tiled(r.map, r.type, static_cast<unsigned>(r.dim.size()), r.base,
                                         r.dim.data(), r.stride.data(), r.box.data(), r.step.data(),
                                         r.interleave, r.swizzle, r.l2, r.fill) == 0;
  };
  CHECK(accepts(good), "a good map");
  const auto refuses = [&](const char* what, auto change) {
    Request bad = good;
    change(bad);
    CHECK(!accepts(bad), "%s", what);
  };
  refuses("map not aligned", [&](Request& r) { r.map = reinterpret_cast<char*>(map) + 32; });
  refuses("base not aligned", [&](Request& r) { r.base = memory.get() + 4; });
  refuses("stride not aligned", [](Request& r) { r.stride = {120}; });
  refuses("box too large", [](Request& r) { r.box = {64, 257}; });
  refuses("empty box", [](Request& r) { r.box = {64, 0}; });
  refuses("empty tensor", [](Request& r) { r.dim = {64, 0}; });
  refuses("inner box not 16 bytes", [](Request& r) { r.box = {4, 16}; });
  refuses("inner box over the swizzle", [](Request& r) { r.box = {128, 16}; });
  refuses("interleaved", [](Request& r) { r.interleave = 1; });
  refuses("NaN fill for integers", [](Request& r) { r.fill = 1; });
  refuses("unknown type", [](Request& r) { r.type = 20; });
}

}  // namespace
