// Shared memory: one arena per block, with the dynamic part at offset 0 and static arrays behind
// it, each followed by a red zone. All of it starts as 0xFF, so that uninitialised reads give NaN
// or -1.
#include "state.h"

#include <cstdio>

namespace simt {

static constexpr uint32_t RED_ZONE = 64;

static void add_red_zone(Block* block, uint32_t begin, uint32_t end, const char* after) {
  TsanQuiet quiet;
  asan_unpoison(block->shared + begin, end - begin);
  std::memset(block->shared + begin, CANARY, end - begin);
  block->red_zones.push_back({begin, end, after});
  asan_poison(block->shared + begin, end - begin);
}

void prepare_shared(Block* block) {
  asan_unpoison(block->shared, ARENA_BYTES);
  block->statics.clear();
  block->red_zones.clear();
  block->static_bytes = 0;
  block->static_end = (block->dynamic_bytes + RED_ZONE + 127) & ~127u;
  std::memset(block->shared, 0xff, block->dynamic_bytes);
  add_red_zone(block, block->dynamic_bytes, block->static_end, "dynamic shared memory");
  asan_poison(block->shared + block->static_end, ARENA_BYTES - block->static_end);
}

void* static_shared(const void* key, size_t bytes, size_t align) {
  Block* const block = current_block();
  for (const StaticArray& array : block->statics) {
    if (array.key == key) return array.at;
  }
  const size_t begin = (block->static_end + align - 1) / align * align;
  const size_t end = begin + bytes, next = (end + RED_ZONE + 15) & ~size_t{15};
  block->static_bytes += static_cast<uint32_t>(bytes);
  if (block->dynamic_bytes + block->static_bytes > device_limits().max_shared_bytes ||
      next > ARENA_BYTES) {
    fail("%u bytes of dynamic and %u of static shared memory exceed the device's %u",
         block->dynamic_bytes, block->static_bytes, device_limits().max_shared_bytes);
  }
  unsigned char* const at = block->shared + begin;
  asan_unpoison(at, bytes);
  {
    TsanQuiet quiet;
    std::memset(at, 0xff, bytes);
    block->statics.push_back({key, at});
  }
  add_red_zone(block, static_cast<uint32_t>(end), static_cast<uint32_t>(next), "a static array");
  block->static_end = static_cast<uint32_t>(next);
  return at;
}

std::string shared_overrun(Block* block) {
  asan_unpoison(block->shared, ARENA_BYTES);
  for (const RedZone& zone : block->red_zones) {
    for (uint32_t at = zone.begin; at < zone.end; at++) {
      if (block->shared[at] == CANARY) continue;
      char text[160];
      std::snprintf(text, sizeof text,
                    "shared memory overrun: byte %u past the end of %s was written (offset %u)",
                    at - zone.begin, zone.after, at);
      return text;
    }
  }
  return "";
}

uint32_t shared_offset(const void* p) {
  const ptrdiff_t offset = static_cast<const unsigned char*>(p) - block_vars->shared;
  if (offset < 0 || offset > static_cast<ptrdiff_t>(ARENA_BYTES)) {
    fail("%p is not an address in shared memory", p);
  }
  return static_cast<uint32_t>(offset);
}

Block* block_of(uint32_t& address, const char* kind, Site site) {
  const uint32_t rank_plus_one = address >> 24;
  address &= 0xffffffu;
  if (rank_plus_one == 0) return static_cast<Block*>(block_vars);
  if (rank_plus_one > cluster->blocks.size()) {
    fail("%s at %s:%d: there is no block %u in a cluster of %zu", kind, site.file, site.line,
         rank_plus_one - 1, cluster->blocks.size());
  }
  Block* const block = cluster->blocks[rank_plus_one - 1];
  if (block->live == 0) {
    fail("%s at %s:%d: block %u of the cluster has exited; its shared memory no longer exists",
         kind, site.file, site.line, rank_plus_one - 1);
  }
  return block;
}

unsigned char* shared_at(uint32_t address, uint32_t bytes, uint32_t align, const char* kind,
                         Site site) {
  uint32_t offset = address;
  Block* const block = block_of(offset, kind, site);
  if (offset % align != 0) {
    fail("%s at %s:%d: shared address 0x%x is not %u-byte aligned", kind, site.file, site.line,
         address, align);
  }
  const uint64_t end = static_cast<uint64_t>(offset) + bytes;
  bool inside = end <= block->dynamic_bytes;
  // A static array lies between two red zones; the first red zone ends at or before the start of
  // the first array.
  for (size_t i = 0; !inside && i + 1 < block->red_zones.size(); i++) {
    inside = offset >= block->red_zones[i].end && end <= block->red_zones[i + 1].begin;
  }
  if (!inside) {
    fail(
        "%s at %s:%d: shared address 0x%x and the %u bytes there lie outside of the block's "
        "%u bytes of dynamic shared memory",
        kind, site.file, site.line, address, bytes, block->dynamic_bytes);
  }
  return block->shared + offset;
}

}  // namespace simt
