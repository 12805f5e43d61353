// ptx.cuh and its twin must declare the same functions with the same signatures.
#include <fstream>
#include <iterator>
#include <regex>
#include <set>

#include "testing.h"

namespace {

std::string read(const std::string& path) {
  std::ifstream file(path);
  CHECK(file.good(), "cannot read %s", path.c_str());
  return {std::istreambuf_iterator<char>(file), std::istreambuf_iterator<char>()};
}

// "type name(parameters)" for each function of namespace ptx, on one line and without the twin's
// parameter for the call site.
std::set<std::string> signatures(const std::string& path, const std::string& keyword) {
  std::string text = read(path);
  text = text.substr(text.find("namespace ptx {"));
  text = std::regex_replace(text, std::regex(",?\\s*SIMT_SITE"), "");
  text = std::regex_replace(text, std::regex("\\[\\[maybe_unused\\]\\] "), "");
  text = std::regex_replace(text, std::regex("\\s+"), " ");
  const std::regex function(keyword + " (\\w+ \\w+\\(.*?\\)) \\{");
  std::set<std::string> found;
  for (std::sregex_iterator i(text.begin(), text.end(), function), end; i != end; ++i) {
    found.insert((*i)[1]);
  }
  return found;
}

TEST(ptx_and_its_twin_agree) {
  const std::string here = __FILE__, root = here.substr(0, here.rfind('/')) + "/../../..";
  const auto device = signatures(root + "/kernels/ptx.cuh", "__forceinline__");
  const auto twin = signatures(root + "/emulator/simt/simt_ptx.h", "inline");
  CHECK(device.size() > 50, "only %zu functions found in ptx.cuh", device.size());
  for (const std::string& signature : device) {
    CHECK(twin.count(signature), "the twin lacks: %s", signature.c_str());
  }
  for (const std::string& signature : twin) {
    CHECK(device.count(signature), "ptx.cuh lacks: %s", signature.c_str());
  }
}

}  // namespace
