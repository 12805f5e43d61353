// Device memory. Every allocation has pages of its own between two guard pages, starts at a
// multiple of 256 as CUDA guarantees, and ends less than 256 bytes before its guard page. Those
// bytes, and the bytes between the start of the first page and the start of the allocation, hold a
// canary that device_free checks.
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cstdio>
#include <deque>
#include <map>
#include <mutex>

#include "state.h"

namespace simt {

static constexpr size_t ALIGN = 256;
// Larger allocations map copies of one poisoned file, so that several GiB use memory only where
// they are written.
static constexpr size_t POISON_FILE = 16 << 20;
// The number of freed allocations that stay inaccessible, so that a use after free faults.
static constexpr size_t GRAVEYARD = 256;

struct Allocation {
  size_t bytes;
  unsigned char* map;
  size_t map_bytes;
};

struct Heap {
  std::mutex mutex;
  std::map<uintptr_t, Allocation> live;  // by start
  std::map<uintptr_t, Allocation> freed;
  std::deque<uintptr_t> freed_order;
  std::string damage;
  int poison_file = -1;
};

// Never destroyed: memory may be freed during process exit.
static Heap& heap() {
  static auto* h = new Heap;
  return *h;
}

static int poison_file(Heap& h) {
  if (h.poison_file >= 0) return h.poison_file;
  const int file = memfd_create("poison", MFD_CLOEXEC);
  if (file < 0 || ftruncate(file, POISON_FILE) != 0) return -1;
  void* const p = mmap(nullptr, POISON_FILE, PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
  if (p == MAP_FAILED) return -1;
  std::memset(p, 0xff, POISON_FILE);
  munmap(p, POISON_FILE);
  return h.poison_file = file;
}

// Fills the whole pages [begin, end) with 0xFF.
static bool poison(Heap& h, unsigned char* begin, unsigned char* end) {
  if (static_cast<size_t>(end - begin) <= POISON_FILE) {
    std::memset(begin, 0xff, end - begin);
    return true;
  }
  const int file = poison_file(h);
  if (file < 0) return false;
  for (unsigned char* p = begin; p < end; p += POISON_FILE) {
    const size_t bytes = std::min<size_t>(POISON_FILE, end - p);
    if (mmap(p, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_FIXED | MAP_NORESERVE, file, 0) ==
        MAP_FAILED) {
      return false;
    }
  }
  return true;
}

void* device_alloc(size_t bytes) {
  Heap& h = heap();
  const std::lock_guard<std::mutex> lock(h.mutex);
  const size_t pages = (std::max<size_t>(bytes, 1) + PAGE - 1) / PAGE * PAGE;
  const size_t map_bytes = pages + 2 * PAGE;
  if (map_bytes < bytes) return nullptr;
  void* const mapped = mmap(nullptr, map_bytes, PROT_READ | PROT_WRITE,
                            MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (mapped == MAP_FAILED) return nullptr;
  unsigned char* const map = static_cast<unsigned char*>(mapped);
  unsigned char* const first = map + PAGE;
  unsigned char* const guard = first + pages;
  if (!poison(h, first, guard)) {
    munmap(map, map_bytes);
    return nullptr;
  }
  mprotect(map, PAGE, PROT_NONE);
  mprotect(guard, PAGE, PROT_NONE);
  unsigned char* const start = guard - (std::max<size_t>(bytes, 1) + ALIGN - 1) / ALIGN * ALIGN;
  std::memset(first, CANARY, start - first);
  std::memset(start + bytes, CANARY, guard - (start + bytes));
  asan_poison(first, start - first);
  asan_poison(start + bytes, guard - (start + bytes));
  h.live[reinterpret_cast<uintptr_t>(start)] = {bytes, map, map_bytes};
  return start;
}

// Describes where the canary around an allocation was overwritten; empty if it is intact.
static std::string find_damage(unsigned char* start, const Allocation& a) {
  unsigned char* const first = a.map + PAGE;
  unsigned char* const guard = a.map + a.map_bytes - PAGE;
  asan_unpoison(first, guard - first);
  char text[160] = "";
  for (unsigned char* p = first; p < start; p++) {
    if (*p == CANARY) continue;
    std::snprintf(text, sizeof text, "%td bytes before the start of an allocation of %zu bytes",
                  start - p, a.bytes);
    break;
  }
  for (unsigned char* p = start + a.bytes; p < guard; p++) {
    if (*p == CANARY) continue;
    std::snprintf(text, sizeof text, "byte %td past the end of an allocation of %zu bytes",
                  p - (start + a.bytes), a.bytes);
    break;
  }
  if (text[0] == '\0') return "";
  return std::string("device memory overrun: ") + text + " was written";
}

static void quarantine(Heap& h, uintptr_t start, const Allocation& a) {
  mmap(a.map, a.map_bytes, PROT_NONE, MAP_PRIVATE | MAP_FIXED | MAP_ANONYMOUS | MAP_NORESERVE, -1,
       0);
  h.freed[start] = a;
  h.freed_order.push_back(start);
  if (h.freed_order.size() <= GRAVEYARD) return;
  const auto oldest = h.freed.find(h.freed_order.front());
  munmap(oldest->second.map, oldest->second.map_bytes);
  h.freed.erase(oldest);
  h.freed_order.pop_front();
}

void device_free(void* p) {
  if (p == nullptr) return;
  Heap& h = heap();
  const std::lock_guard<std::mutex> lock(h.mutex);
  const uintptr_t start = reinterpret_cast<uintptr_t>(p);
  const auto found = h.live.find(start);
  if (found == h.live.end()) {
    h.damage = "device_free of an address that is not the start of a live allocation";
    return;
  }
  const std::string damage = find_damage(static_cast<unsigned char*>(p), found->second);
  if (!damage.empty()) h.damage = damage;
  quarantine(h, start, found->second);
  h.live.erase(found);
}

const char* take_memory_error() {
  static thread_local std::string taken;
  Heap& h = heap();
  const std::lock_guard<std::mutex> lock(h.mutex);
  if (h.damage.empty()) return nullptr;
  taken = h.damage;
  h.damage.clear();
  return taken.c_str();
}

bool device_contains(const void* p, size_t n) {
  Heap& h = heap();
  const std::lock_guard<std::mutex> lock(h.mutex);
  const uintptr_t address = reinterpret_cast<uintptr_t>(p);
  auto above = h.live.upper_bound(address);
  if (above == h.live.begin()) return false;
  const auto& [start, allocation] = *--above;
  const size_t offset = address - start;
  return offset <= allocation.bytes && n <= allocation.bytes - offset;
}

std::vector<DeviceRange> device_ranges() {
  Heap& h = heap();
  const std::lock_guard<std::mutex> lock(h.mutex);
  std::vector<DeviceRange> ranges;
  for (const auto& [start, a] : h.live) ranges.push_back({start, start + a.bytes});
  return ranges;
}

// The allocation whose pages, including guard pages, contain the address.
static std::string describe_in(const std::map<uintptr_t, Allocation>& allocations,
                               uintptr_t address, const char* what) {
  for (const auto& [start, a] : allocations) {
    const uintptr_t map = reinterpret_cast<uintptr_t>(a.map);
    if (address < map || address >= map + a.map_bytes) continue;
    char text[160];
    if (address < start) {
      std::snprintf(text, sizeof text, "%zu bytes before %s allocation of %zu bytes",
                    static_cast<size_t>(start - address), what, a.bytes);
    } else {
      std::snprintf(text, sizeof text, "byte %zu of %s allocation of %zu bytes",
                    static_cast<size_t>(address - start), what, a.bytes);
    }
    return text;
  }
  return "";
}

std::string describe_device_address(uintptr_t address) {
  Heap& h = heap();
  const std::lock_guard<std::mutex> lock(h.mutex);
  std::string text = describe_in(h.live, address, "an");
  if (text.empty()) text = describe_in(h.freed, address, "a freed");
  return text;
}

}  // namespace simt
