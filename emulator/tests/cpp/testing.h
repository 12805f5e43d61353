// A minimal test harness: tests register themselves, launches use find_kernel, and a failed check
// stops its test and not the program.
#pragma once
#include <cstdio>
#include <cstring>
#include <random>
#include <string>
#include <vector>

#include "runtime.h"

namespace testing {

struct Test {
  const char* name;
  void (*run)();
};
inline std::vector<Test>& tests() {
  static std::vector<Test> all;
  return all;
}
struct Register {
  Register(const char* name, void (*run)()) { tests().push_back({name, run}); }
};
#define TEST(name)                                           \
  static void name();                                        \
  static const ::testing::Register name##_test(#name, name); \
  static void name()

struct Failure {
  std::string message;
};
#define CHECK(condition, ...)                                                       \
  do {                                                                              \
    if (!(condition)) ::testing::fail(__FILE__, __LINE__, #condition, __VA_ARGS__); \
  } while (false)
[[noreturn]] void fail(const char* file, int line, const char* condition, const char* format, ...)
    __attribute__((format(printf, 4, 5)));

// Appends text to the running test's line of output.
void note(const std::string& text);

// The number of operating system threads of a launch, and whether the race checker is active.
extern unsigned os_threads;
#if defined(SIMT_TSAN)
constexpr bool UNDER_TSAN = true;
#else
constexpr bool UNDER_TSAN = false;
#endif
#if defined(__SANITIZE_ADDRESS__)
constexpr bool UNDER_ASAN = true;
#else
constexpr bool UNDER_ASAN = false;
#endif
// The number of `seeds` to try: fewer under sanitizers, which are slow.
constexpr uint64_t seeds(uint64_t wanted) {
  return UNDER_TSAN || UNDER_ASAN ? (wanted + 4) / 5 : wanted;
}

// Device memory for `size` values, poisoned.
template <class T>
class Buffer {
 public:
  explicit Buffer(size_t size)
      : at_(static_cast<T*>(simt::device_alloc(size * sizeof(T)))), size_(size) {}
  explicit Buffer(const std::vector<T>& values) : Buffer(values.size()) {
    if (size_ != 0) std::memcpy(static_cast<void*>(at_), values.data(), size_ * sizeof(T));
  }
  ~Buffer() { simt::device_free(at_); }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  T* get() const { return at_; }
  size_t size() const { return size_; }
  T& operator[](size_t i) const { return at_[i]; }
  std::vector<T> copy() const { return std::vector<T>(at_, at_ + size_); }

 private:
  T* at_;
  size_t size_;
};

struct Shape {
  dim3 grid, block;
  size_t shared_bytes = 0;
  uint64_t seed = 0;
  dim3 cluster = dim3(1);
};

// Runs a kernel. Returns the report, or an empty string.
template <class... A>
std::string run(const std::string& symbol, const Shape& shape, A... arguments) {
  const simt::Kernel* const kernel = simt::find_kernel(symbol.c_str());
  CHECK(kernel != nullptr, "no kernel '%s'", symbol.c_str());
  CHECK(kernel->num_parameters == sizeof...(A), "'%s' has %u parameters", symbol.c_str(),
        kernel->num_parameters);
  const size_t sizes[] = {sizeof(A)..., 0};
  for (size_t i = 0; i < sizeof...(A); i++) {
    CHECK(sizes[i] == kernel->parameters[i].size, "parameter %zu of '%s' has %zu bytes, not %zu", i,
          symbol.c_str(), kernel->parameters[i].size, sizes[i]);
  }
  void* addresses[] = {const_cast<void*>(static_cast<const void*>(&arguments))..., nullptr};
  const simt::LaunchConfig config = {shape.grid,         shape.block, shape.cluster,
                                     shape.shared_bytes, shape.seed,  os_threads};
  return kernel->run(config, addresses) == 0 ? std::string() : std::string(simt::last_error());
}

// The same, for kernels that must succeed.
template <class... A>
void run_ok(const std::string& symbol, const Shape& shape, A... arguments) {
  const std::string report = run(symbol, shape, arguments...);
  CHECK(report.empty(), "%s", report.c_str());
}

inline bool contains(const std::string& text, const std::string& part) {
  return text.find(part) != std::string::npos;
}

}  // namespace testing
