// TMA: tile loads and stores by tensor map. A load acts between its issue and the wait for its
// mbarrier; a store reads its tile before wait_group.read returns and writes it before wait_group
// returns.
#include <algorithm>

#include "state.h"

namespace simt {

static TensorMap decode(const CUtensorMap* map, int rank, const char* kind, Site site) {
  need(Feature::Tma, kind, site);
  if (reinterpret_cast<uintptr_t>(map) % 64 != 0) {
    fail("%s at %s:%d: the tensor map at %p is not 64-byte aligned", kind, site.file, site.line,
         static_cast<const void*>(map));
  }
  TensorMap decoded;
  {
    const TsanQuiet quiet;
    std::memcpy(&decoded, map, sizeof decoded);
  }
  if (decoded.magic != TENSOR_MAP_MAGIC) {
    fail("%s at %s:%d: not a tensor map", kind, site.file, site.line);
  }
  if (rank != 0 && decoded.rank != rank) {
    fail("%s at %s:%d: the tensor map has rank %d, the instruction %d", kind, site.file, site.line,
         decoded.rank, rank);
  }
  return decoded;
}

void tma_check_map(const CUtensorMap* map, Site site) {
  decode(map, 0, "prefetch.tensormap", site);
}

// The global address of row number `row` of a box at `at`, for a first coordinate of 0. Returns
// false if the row lies outside the tensor.
static bool row_in_tensor(const TensorMap& map, const int* at, uint32_t row,
                          unsigned char*& start) {
  start = map.base;
  for (int i = 1; i < map.rank; i++) {
    const int64_t coordinate = static_cast<int64_t>(at[i]) + row % map.box[i];
    row /= map.box[i];
    if (coordinate < 0 || static_cast<uint64_t>(coordinate) >= map.dim[i]) return false;
    start += static_cast<uint64_t>(coordinate) * map.stride[i - 1];
  }
  return true;
}

// The elements of a 16-byte chunk that lie inside the tensor: [first, last).
static void columns_in_tensor(const TensorMap& map, int64_t x, int& first, int& last) {
  const int64_t count = 16 / map.element_bytes, dim = static_cast<int64_t>(map.dim[0]);
  first = static_cast<int>(x < 0 ? (-x < count ? -x : count) : 0);
  last = static_cast<int>(x + count > dim ? (dim > x ? dim - x : 0) : count);
  if (last < first) last = first;
}

// A box load or store is one request; its width is the part of the box inside the tensor.
static void count_box(WarpEvent event, const TensorMap& map, const int* at) {
  if (counter == nullptr) return;
  std::vector<ByteRange> ranges;
  const int64_t dim = static_cast<int64_t>(map.dim[0]);
  const int64_t first = std::max<int64_t>(at[0], 0);
  const int64_t last = std::min<int64_t>(int64_t{at[0]} + map.box[0], dim);
  for (uint32_t row = 0; row < map.rows() && first < last; row++) {
    unsigned char* start;
    if (!row_in_tensor(map, at, row, start)) continue;
    ranges.push_back(
        {start + first * map.element_bytes, static_cast<size_t>(last - first) * map.element_bytes});
  }
  counter->bulk(event, ranges);
}

// The location in shared memory of the chunk at `offset` of a box.
static unsigned char* chunk_at(const TensorMap& map, Block* block, uint32_t box, uint32_t offset) {
  return block->shared + swizzled(box + offset, map.swizzle);
}

static void fill_outside(const TensorMap& map, unsigned char* chunk) {
  std::memset(chunk, 0, 16);
  if (!map.fill_nan) return;
  for (int i = 0; i < 16; i += map.element_bytes) {
    if (map.element_bytes == 2) {
      const uint16_t nan = 0x7fff;
      std::memcpy(chunk + i, &nan, 2);
    } else if (map.element_bytes == 4) {
      const uint32_t nan = 0x7fffffff;
      std::memcpy(chunk + i, &nan, 4);
    }
  }
}

void run_load(Async& load) {
  AsUnit unit(cluster->tma);
  const TensorMap& map = load.map;
  for (uint32_t row = 0; row < map.rows(); row++) {
    unsigned char* start;
    const bool inside = row_in_tensor(map, load.at, row, start);
    for (uint32_t byte = 0; byte < map.inner_bytes(); byte += 16) {
      unsigned char* const chunk =
          chunk_at(map, load.block, load.destination, row * map.inner_bytes() + byte);
      const int64_t x = static_cast<int64_t>(load.at[0]) + byte / map.element_bytes;
      int first = 0, last = 0;
      if (inside) columns_in_tensor(map, x, first, last);
      tsan_write(chunk, 16);
      TsanQuiet quiet;
      if (last - first < 16 / map.element_bytes) fill_outside(map, chunk);
      if (last > first) {
        std::memcpy(chunk + first * map.element_bytes, start + (x + first) * map.element_bytes,
                    static_cast<size_t>(last - first) * map.element_bytes);
      }
    }
  }
  tsan_release(&cluster->tma.done);
  mbar_bytes_arrived(load.block, load.bar, map.box_bytes());
}

// Reads the tile from shared memory, unswizzled, into a snapshot.
static void read_store(Store& store) {
  if (store.read) return;
  store.read = true;
  AsUnit unit(cluster->tma);
  store.snapshot.resize(store.map.box_bytes());
  for (uint32_t byte = 0; byte < store.map.box_bytes(); byte += 16) {
    const unsigned char* chunk = chunk_at(store.map, store.block, store.source, byte);
    tsan_read(chunk, 16);
    TsanQuiet quiet;
    std::memcpy(store.snapshot.data() + byte, chunk, 16);
  }
  tsan_release(&cluster->tma.done);
}

static void write_store(Store& store) {
  read_store(store);
  if (store.written) return;
  store.written = true;
  AsUnit unit(cluster->tma);
  const TensorMap& map = store.map;
  for (uint32_t row = 0; row < map.rows(); row++) {
    unsigned char* start;
    if (!row_in_tensor(map, store.at, row, start)) continue;
    for (uint32_t byte = 0; byte < map.inner_bytes(); byte += 16) {
      const int64_t x = static_cast<int64_t>(store.at[0]) + byte / map.element_bytes;
      int first, last;
      columns_in_tensor(map, x, first, last);
      if (last == first) continue;
      unsigned char* const to = start + (x + first) * map.element_bytes;
      const size_t bytes = static_cast<size_t>(last - first) * map.element_bytes;
      tsan_write(to, bytes);
      TsanQuiet quiet;
      std::memcpy(
          to, store.snapshot.data() + row * map.inner_bytes() + byte + first * map.element_bytes,
          bytes);
    }
  }
  tsan_release(&cluster->tma.done);
}

// Starts the load of one box into one block.
static void issue_load(const TensorMap& map, const int* at, Block* block, uint32_t dst,
                       uint32_t bar) {
  Async load{};
  load.kind = Async::Load;
  load.map = map;
  for (int i = 0; i < map.rank; i++) load.at[i] = at[i];
  load.block = block;
  load.destination = dst;
  load.bar = bar;
  tsan_release(&cluster->tma.issue);
  if (act_now(Unit::Load)) {
    run_load(load);
  } else {
    TsanQuiet quiet;
    cluster->async.push_back(load);
  }
}

static TensorMap check_load(uint32_t dst, const CUtensorMap* map, int rank, Site site) {
  const TensorMap decoded = decode(map, rank, "TMA load", site);
  shared_at(dst, decoded.box_bytes(), swizzle_align(decoded.swizzle), "TMA load", site);
  current_fiber()->kind = "TMA load";
  current_fiber()->site = site;
  return decoded;
}

void tma_load(uint32_t dst, const CUtensorMap* map, uint32_t bar, const int* at, int rank,
              Site site) {
  const TensorMap decoded = check_load(dst, map, rank, site);
  uint32_t dst_offset = dst, bar_offset = bar;
  Block* const block = block_of(dst_offset, "TMA load", site);
  if (block_of(bar_offset, "TMA load", site) != block) {
    fail("TMA load at %s:%d: destination and mbarrier belong to different blocks", site.file,
         site.line);
  }
  valid_mbarrier(block, bar_offset, "TMA load", site);
  count_box(WarpEvent::GlobalRead, decoded, at);
  issue_load(decoded, at, block, dst_offset, bar_offset);
  maybe_preempt();
}

void tma_load_multicast(uint32_t dst, const CUtensorMap* map, uint32_t bar, const int* at, int rank,
                        uint16_t blocks, Site site) {
  need(Feature::Clusters, "TMA multicast", site);
  const TensorMap decoded = check_load(dst, map, rank, site);
  if (blocks == 0 || blocks >> cluster->blocks.size() != 0) {
    fail("TMA multicast at %s:%d: invalid block mask %04x for a cluster of %zu", site.file,
         site.line, blocks, cluster->blocks.size());
  }
  count_box(WarpEvent::GlobalRead, decoded, at);  // Once, for any number of receiving blocks.
  for (uint32_t rank_of_block = 0; rank_of_block < cluster->blocks.size(); rank_of_block++) {
    if ((blocks >> rank_of_block & 1) == 0) continue;
    uint32_t address = (dst & 0xffffffu) | (rank_of_block + 1) << 24;
    Block* const block = block_of(address, "TMA multicast", site);
    valid_mbarrier(block, bar & 0xffffffu, "TMA multicast", site);
    issue_load(decoded, at, block, address, bar & 0xffffffu);
  }
}

void tma_store(const CUtensorMap* map, uint32_t src, const int* at, int rank, Site site) {
  Store store{};
  store.map = decode(map, rank, "TMA store", site);
  shared_at(src, store.map.box_bytes(), swizzle_align(store.map.swizzle), "TMA store", site);
  for (int i = 0; i < rank; i++) store.at[i] = at[i];
  count_box(WarpEvent::GlobalWrite, store.map, at);
  store.block = current_block();
  store.source = src;
  current_fiber()->kind = "TMA store";
  current_fiber()->site = site;
  tsan_release(&cluster->tma.issue);
  Stores& stores = current_fiber()->stores;
  {
    TsanQuiet quiet;
    stores.ops.push_back(store);
  }
  if (act_now(Unit::Store)) read_store(stores.ops.back());
  if (stores.ops.back().read && act_now(Unit::Store)) write_store(stores.ops.back());
}

void tma_store_commit() {
  TsanQuiet quiet;
  Stores& stores = current_fiber()->stores;
  stores.groups.push_back(stores.retired + stores.ops.size());
}

void tma_store_wait(uint32_t groups_left, bool read_only) {
  Stores& stores = current_fiber()->stores;
  if (stores.groups.size() > groups_left) {
    const size_t groups = stores.groups.size() - groups_left;
    const uint64_t end = stores.groups[groups - 1];
    for (uint64_t i = stores.retired; i < end; i++) {
      Store& store = stores.ops[i - stores.retired];
      if (read_only) {
        read_store(store);
      } else {
        write_store(store);
      }
    }
    if (!read_only) {
      TsanQuiet quiet;
      stores.ops.erase(stores.ops.begin(), stores.ops.begin() + (end - stores.retired));
      stores.groups.erase(stores.groups.begin(), stores.groups.begin() + groups);
      stores.retired = end;
    }
  }
  tsan_acquire(&cluster->tma.done);
}

// A store needs its source until it has been read; the source is lost when the block exits.
void stores_thread_exiting(Fiber* fiber) {
  for (Store& store : fiber->stores.ops) {
    if (!store.read) {
      fail(
          "TMA store at %s:%d: the thread exits before the store has read shared memory; "
          "wait for it first",
          fiber->site.file, fiber->site.line);
    }
    write_store(store);
  }
}

}  // namespace simt
