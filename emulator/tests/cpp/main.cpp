// Runs the tests whose names contain the first argument; without one, all tests. Tests called
// crash_* and race_* end in a report of the corresponding sanitizer; under that sanitizer they run
// only on request.
//   emulator-tests [--threads N] [--write-golden DIR] [NAME]
#include <cstdarg>
#include <cstdlib>

#include "golden.h"
#include "testing.h"

namespace testing {

unsigned os_threads = 1;

void fail(const char* file, int line, const char* condition, const char* format, ...) {
  char text[4096];
  va_list arguments;
  va_start(arguments, format);
  std::vsnprintf(text, sizeof text, format, arguments);
  va_end(arguments);
  throw Failure{std::string(file) + ":" + std::to_string(line) + ": " + condition + ": " + text};
}

static std::string notes;

void note(const std::string& text) { notes += (notes.empty() ? "" : "; ") + text; }

static int run_all(const char* filter) {
  int ran = 0, failed = 0;
  for (const Test& test : tests()) {
    if (!contains(test.name, filter)) continue;
    const bool is_finding =
        std::strncmp(test.name, "crash_", 6) == 0 || std::strncmp(test.name, "race_", 5) == 0;
    if (is_finding && (UNDER_ASAN || UNDER_TSAN) && filter[0] == '\0') continue;
    ran++;
    std::string message;
    notes.clear();
    try {
      test.run();
      if (const char* damage = simt::take_memory_error()) message = damage;
    } catch (const Failure& failure) {
      message = failure.message;
    }
    const bool ok = message.empty();
    const std::string& text = ok ? notes : message;
    std::printf("%s %s%s%s\n", ok ? "ok    " : "FAILED", test.name, text.empty() ? "" : ": ",
                text.c_str());
    std::fflush(stdout);
    failed += !message.empty();
  }
  std::printf("%d tests, %d failed\n", ran, failed);
  return failed != 0 || ran == 0;
}

}  // namespace testing

int main(int argc, char** argv) {
  const char* filter = "";
  for (int i = 1; i < argc; i++) {
    if (std::strcmp(argv[i], "--threads") == 0 && i + 1 < argc) {
      testing::os_threads = static_cast<unsigned>(std::atoi(argv[++i]));
    } else if (std::strcmp(argv[i], "--write-golden") == 0 && i + 1 < argc) {
      return golden::write_all(argv[i + 1]) ? 0 : 1;
    } else {
      filter = argv[i];
    }
  }
  return testing::run_all(filter);
}
