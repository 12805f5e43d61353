#include "golden.h"

#include <cstdio>
#include <filesystem>
#include <fstream>
#include <map>
#include <sstream>

#include "testing.h"

namespace golden {

static std::vector<Case> all_cases() {
  std::vector<Case> cases = portable_cases();
  for (const auto& more : {tma_cases(), wgmma_cases()})
    cases.insert(cases.end(), more.begin(), more.end());
  return cases;
}

// The emulator's output for a case. Outputs start as zeros.
static std::vector<uint32_t> emulate(const Case& c, uint64_t seed) {
  testing::Buffer<uint32_t> in(c.in), out(std::vector<uint32_t>(c.want.size(), 0));
  const testing::Shape shape = {dim3(c.cluster), dim3(c.threads), c.shared_bytes, seed,
                                dim3(c.cluster)};
  uint32_t* const out_address = out.get();
  const uint32_t* const in_address = in.get();
  if (!c.map.used) {
    testing::run_ok(c.symbol, shape, out_address, in_address);
    return out.copy();
  }
  CUtensorMap map;
  void* const base = c.map.over_out ? out.get() : in.get() + HEADER;
  const std::vector<uint32_t> ones(c.map.dim.size(), 1);
  CHECK(simt::tensor_map_encode_tiled(
            &map, c.map.data_type, static_cast<unsigned>(c.map.dim.size()), base, c.map.dim.data(),
            c.map.stride_bytes.data(), c.map.box.data(), ones.data(), 0, c.map.swizzle, 0, 0) == 0,
        "the tensor map of %s was refused", (c.symbol + c.name).c_str());
  testing::run_ok(c.symbol, shape, out_address, in_address, map);
  return out.copy();
}

static void check_all(const std::vector<Case>& cases) {
  for (const Case& c : cases) {
    for (uint64_t seed = 0; seed < testing::seeds(20); seed++) {
      const std::vector<uint32_t> got = emulate(c, seed);
      for (size_t i = 0; i < got.size(); i++) {
        CHECK(got[i] == c.want[i], "%s seed %llu: word %zu of %zu is %08x and not %08x",
              (c.symbol + c.name).c_str(), static_cast<unsigned long long>(seed), i, got.size(),
              got[i], c.want[i]);
      }
    }
  }
}

TEST(golden_portable) { check_all(portable_cases()); }
TEST(golden_tma) { check_all(tma_cases()); }
TEST(golden_wgmma) { check_all(wgmma_cases()); }

// Every golden entry has a case.
TEST(golden_has_a_case_for_every_entry) {
  size_t count;
  const simt::Kernel* const* kernels = simt::all_kernels(&count);
  const std::vector<Case> cases = all_cases();
  for (size_t i = 0; i < count; i++) {
    const std::string symbol = kernels[i]->symbol;
    if (symbol.rfind("emu_golden_", 0) != 0) continue;
    bool found = false;
    for (const Case& c : cases) found |= c.symbol == symbol;
    CHECK(found, "no case for %s", symbol.c_str());
  }
}

// ---- Records of a GPU ----

// FNV-1a over the bytes, as examples/golden.rs computes it.
static uint64_t hash_of(const std::vector<uint32_t>& words) {
  uint64_t hash = 0xcbf29ce484222325ull;
  for (const uint32_t word : words) {
    for (int shift = 0; shift < 32; shift += 8) {
      hash = (hash ^ (word >> shift & 0xff)) * 0x100000001b3ull;
    }
  }
  return hash;
}

// Compares with every record in emulator/golden/: one line per case, with its name and the hash of
// that GPU's output. Without a record, the emulator is checked only against the plain loops above,
// and the test's line of output says so.
TEST(golden_matches_gpu_records) {
  std::map<std::string, uint64_t> emulated;
  const std::filesystem::path folder = "emulator/golden";
  CHECK(std::filesystem::is_directory(folder.parent_path()),
        "records are read relative to the repository's root, and %s is not the root",
        std::filesystem::current_path().c_str());
  size_t records = 0;
  for (const Case& c : all_cases()) emulated[c.symbol + c.name] = hash_of(emulate(c, 0));
  if (!std::filesystem::is_directory(folder)) {
    return testing::note("no record of a GPU to compare with");
  }
  for (const auto& entry : std::filesystem::directory_iterator(folder)) {
    if (entry.path().extension() != ".txt") continue;
    records++;
    std::ifstream record(entry.path());
    std::string line, name;
    uint64_t hash = 0;
    size_t lines = 0;
    while (std::getline(record, line)) {
      lines++;
      std::istringstream words(line);
      CHECK(words >> name >> std::hex >> hash && (words >> std::ws).eof(),
            "%s: line %zu is not a case and a hash", entry.path().c_str(), lines);
      CHECK(emulated.count(name) == 1, "%s records an unknown case %s", entry.path().c_str(),
            name.c_str());
      CHECK(emulated[name] == hash, "%s: the GPU's output differs for %s", entry.path().c_str(),
            name.c_str());
    }
    CHECK(lines > 0, "%s is empty", entry.path().c_str());
  }
  testing::note(records > 0 ? std::to_string(records) + " records compared"
                            : "no record of a GPU to compare with");
}

// ---- Files ----

static bool write_words(const std::string& path, const std::vector<uint32_t>& words) {
  std::FILE* const file = std::fopen(path.c_str(), "wb");
  if (file == nullptr) return false;
  const bool written = std::fwrite(words.data(), 4, words.size(), file) == words.size();
  return std::fclose(file) == 0 && written;
}

template <class T>
static std::string list(const std::vector<T>& values) {
  std::string text;
  for (const T& value : values) text += (text.empty() ? "" : ",") + std::to_string(value);
  return text.empty() ? "-" : text;
}

bool write_all(const char* directory) {
  const std::string prefix = std::string(directory) + "/";
  std::FILE* const index = std::fopen((prefix + "cases.txt").c_str(), "w");
  if (index == nullptr) return false;
  bool good = true;
  for (const Case& c : all_cases()) {
    const std::string name = c.symbol + c.name;
    good &= write_words(prefix + name + ".in", c.in);
    good &= write_words(prefix + name + ".out", emulate(c, 0));
    std::fprintf(index, "%s %s threads=%u cluster=%u shared=%zu out_words=%zu", name.c_str(),
                 c.symbol.c_str(), c.threads, c.cluster, c.shared_bytes, c.want.size());
    if (c.map.used) {
      std::fprintf(index, " map=%s type=%d swizzle=%d dim=%s stride=%s box=%s",
                   c.map.over_out ? "out" : "in+256", c.map.data_type, c.map.swizzle,
                   list(c.map.dim).c_str(), list(c.map.stride_bytes).c_str(),
                   list(c.map.box).c_str());
    }
    std::fprintf(index, "\n");
  }
  return std::fclose(index) == 0 && good;
}

}  // namespace golden
