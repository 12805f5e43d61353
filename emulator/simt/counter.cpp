// The counter and its queries. In the plain library the counter is null and there is no traffic.
#include "counter.h"

namespace simt {

Counter* counter = nullptr;

bool kernel_traffic(const char* symbol, Traffic* traffic) {
  return counter != nullptr && counter->traffic(symbol, traffic);
}

void reset_traffic() {
  if (counter != nullptr) counter->reset();
}

}  // namespace simt
