// plan: groups slots by expert, stably, and cuts each expert's rows into tiles. The plan's experts
//       are E ids of the router, from first_expert on; a slot with any other id (any bits) is
//       inactive and has no row. id(s) below is the router's id minus first_expert.
//   expert_offsets[e] = active slots of experts below e; [E] is the number of rows in use
//   row_of_slot[s]    = expert_offsets[id(s)] + number of slots before s with the same id, else -1
//   token_of_row[r]   = s / K for the slot s of row r, -1 for unused rows
//   tiles             = for each expert in order, its rows in tiles of at most block_m; unused
//                       entries are zero. num_tiles = tile_offsets[E].
//   expert_ids == nullptr: all ids are 0. A dense product is a grouped one with a single expert.
// A counting sort in three launches, whose sizes depend on the shape alone. If one block has all
// slots, single does the three steps in one launch.
//   count   grid (num_blocks), block (PLAN_THREADS): counts a block's slots of each expert
//   scan    grid (1), block (PLAN_SCAN_THREADS): prefix sums over (expert, block), in memory order;
//           offsets of experts and of their tiles
//   place   grid (num_blocks), block (whole warps, at most PLAN_THREADS): a warp places its slots
//           in order; equal ids within a warp are ranked by __match_any_sync
//   Shared memory: E counters of 4 bytes for count, E for each warp for place and single.
// Roofline reads 3 * 4*T*K and 4 * 4*E*num_blocks bytes, writes 2 * 4*T*K and the tiles: at T16384
//         E128 K8, 1.6 MB + 0.3 MB + 1.0 MB.
// Writers one per element: a row has one slot, and the slot of a tile's first row writes the tile.
//         Atomics add integers, in any order. The result is deterministic, and stable.
// Bounds  place checks every index before a write, as the plan may have any contents: a graph that
//         is replayed on an unordered stream may write the same memory at the same time.
#include "kernel.cuh"

struct TypedPlanParams {
  int* expert_offsets;         // [E + 1] out
  int* row_of_slot;            // [T, K] out
  int* token_of_row;           // [T * K] out
  GemmTile* tiles;             // [max_tiles] out
  int* tile_offsets;           // [E + 1] out
  int* counts;                 // [E, num_blocks] out
  const uint32_t* expert_ids;  // [T, K] or null
  PlanArgs args;
};
static_assert(sizeof(TypedPlanParams) == sizeof(PlanParams), "the same layout");
ASSERT_SAME_OFFSET(TypedPlanParams, PlanParams, expert_offsets);
ASSERT_SAME_OFFSET(TypedPlanParams, PlanParams, row_of_slot);
ASSERT_SAME_OFFSET(TypedPlanParams, PlanParams, token_of_row);
ASSERT_SAME_OFFSET(TypedPlanParams, PlanParams, tiles);
ASSERT_SAME_OFFSET(TypedPlanParams, PlanParams, tile_offsets);
ASSERT_SAME_OFFSET(TypedPlanParams, PlanParams, counts);
ASSERT_SAME_OFFSET(TypedPlanParams, PlanParams, expert_ids);
ASSERT_SAME_OFFSET(TypedPlanParams, PlanParams, args);

static_assert(MAX_EXPERTS <= PLAN_MAX_COUNTERS, "a warp has a counter for every expert");

// 16-byte loads of a thread in a step of exclusive_scan.
constexpr int SCAN_LOADS = 4;

// ---- Slots --------------------------------------------------------------------------------------

// The slots first .. end - 1, none if first == end.
struct SlotRange {
  int first, end;
};

__device__ __forceinline__ SlotRange clamped(int64_t first, int64_t end, int64_t limit) {
  return {(int)min(first, limit), (int)min(end, limit)};
}

__device__ __forceinline__ SlotRange block_range(const PlanArgs& args) {
  const int64_t first = (int64_t)blockIdx.x * args.block_slots;
  return clamped(first, first + args.block_slots, args.slots);
}

// A warp's part of its block's slots: whole groups of 32, in the order of the warps.
__device__ __forceinline__ SlotRange warp_range(SlotRange block, const PlanArgs& args) {
  const int warps = blockDim.x / WARP_SIZE;
  const int groups = (args.block_slots + WARP_SIZE - 1) / WARP_SIZE;
  const int64_t length = (int64_t)((groups + warps - 1) / warps) * WARP_SIZE;
  const int64_t first = block.first + threadIdx.x / WARP_SIZE * length;
  return clamped(first, first + length, block.end);
}

// The slot's expert, or E if it is inactive.
__device__ __forceinline__ int expert_of(const uint32_t* expert_ids, int slot,
                                         const PlanArgs& args) {
  const uint32_t id = expert_ids == nullptr ? 0 : expert_ids[slot];
  // Ids below the first wrap around to large ones.
  return (int)min(id - (uint32_t)args.first_expert, (uint32_t)args.num_experts);
}

// ---- count --------------------------------------------------------------------------------------

// Writes counts.
__device__ __forceinline__ void plan_count(const TypedPlanParams& params) {
  const PlanArgs& args = params.args;
  SHARED_DYNAMIC(shared);
  int* counters = reinterpret_cast<int*>(shared);  // [E]
  for (int e = threadIdx.x; e < args.num_experts; e += blockDim.x) counters[e] = 0;
  __syncthreads();
  const SlotRange range = block_range(args);
  for (int slot = range.first + threadIdx.x; slot < range.end; slot += blockDim.x) {
    const int expert = expert_of(params.expert_ids, slot, args);
    if (expert < args.num_experts) atomicAdd(&counters[expert], 1);
  }
  __syncthreads();
  for (int e = threadIdx.x; e < args.num_experts; e += blockDim.x) {
    params.counts[e * args.num_blocks + blockIdx.x] = counters[e];
  }
}

// ---- scan ---------------------------------------------------------------------------------------

__device__ __forceinline__ int4 load_four(const int* values, int i, int n) {
  if (i + 4 <= n) return *reinterpret_cast<const int4*>(values + i);
  int4 four = {0, 0, 0, 0};
  if (i < n) four.x = values[i];
  if (i + 1 < n) four.y = values[i + 1];
  if (i + 2 < n) four.z = values[i + 2];
  return four;
}

__device__ __forceinline__ void store_four(int* values, int i, int n, int4 four) {
  if (i + 4 <= n) {
    *reinterpret_cast<int4*>(values + i) = four;
    return;
  }
  if (i < n) values[i] = four.x;
  if (i + 1 < n) values[i + 1] = four.y;
  if (i + 2 < n) values[i + 2] = four.z;
}

// Replaces values[0 .. n - 1] in global memory by their exclusive prefix sums and returns their
// total. A block-wide operation that ends with a barrier; `values` is 16-byte aligned. If the block
// wrote `values`, a barrier must come before.
__device__ __forceinline__ int exclusive_scan(int* values, int n) {
  SHARED_ARRAY(int, warp_totals, WARP_SIZE);
  const int lane = threadIdx.x % WARP_SIZE, warp = threadIdx.x / WARP_SIZE;
  const int warps = blockDim.x / WARP_SIZE;
  constexpr int LOAD = WARP_SIZE * 4;
  const int step = blockDim.x * SCAN_LOADS * 4;
  int before = 0;
  for (int step_first = 0; step_first < n; step_first += step) {
    const int first = step_first + warp * SCAN_LOADS * LOAD + lane * 4;
    int4 part[SCAN_LOADS];
#pragma unroll
    for (int i = 0; i < SCAN_LOADS; i++) part[i] = load_four(values, first + i * LOAD, n);

    int running = 0;
#pragma unroll
    for (int i = 0; i < SCAN_LOADS; i++) {
      const int sum = part[i].x + part[i].y + part[i].z + part[i].w;
      const int inclusive = warp_inclusive_sum(sum);
      const int a = running + inclusive - sum;
      const int b = a + part[i].x, c = b + part[i].y, d = c + part[i].z;
      part[i] = {a, b, c, d};
      running += __shfl_sync(FULL_WARP, inclusive, WARP_SIZE - 1);
    }
    if (lane == 0) warp_totals[warp] = running;
    __syncthreads();

    const int total = lane < warps ? warp_totals[lane] : 0;
    const int inclusive = warp_inclusive_sum(total);
    const int offset = before + __shfl_sync(FULL_WARP, inclusive - total, warp);
    before += __shfl_sync(FULL_WARP, inclusive, WARP_SIZE - 1);
#pragma unroll
    for (int i = 0; i < SCAN_LOADS; i++) {
      const int4 p = part[i];
      const int4 shifted = {p.x + offset, p.y + offset, p.z + offset, p.w + offset};
      store_four(values, first + i * LOAD, n, shifted);
    }
    __syncthreads();  // before the next step writes warp_totals
  }
  return before;
}

// Writes expert_offsets and tile_offsets, and turns counts into the row of each block's first slot
// of each expert.
__device__ __forceinline__ void plan_scan(const TypedPlanParams& params) {
  const PlanArgs& args = params.args;
  int* const tile_offsets = params.tile_offsets;
  int* const counts = params.counts;
  const int num_experts = args.num_experts;
  const int rows = exclusive_scan(counts, num_experts * args.num_blocks);
  for (int e = threadIdx.x; e <= num_experts; e += blockDim.x) {
    const int begin = e < num_experts ? counts[e * args.num_blocks] : rows;
    const int end = e + 1 < num_experts ? counts[(e + 1) * args.num_blocks] : rows;
    params.expert_offsets[e] = begin;
    if (e < num_experts) tile_offsets[e] = (end - begin + args.block_m - 1) / args.block_m;
  }
  __syncthreads();
  const int num_tiles = exclusive_scan(tile_offsets, num_experts);
  if (threadIdx.x == 0) tile_offsets[num_experts] = num_tiles;
}

// ---- place --------------------------------------------------------------------------------------

// Writes row_of_slot, token_of_row and tiles.
__device__ __forceinline__ void plan_place(const TypedPlanParams& params) {
  const PlanArgs& args = params.args;
  const uint32_t* const expert_ids = params.expert_ids;
  const int* const expert_offsets = params.expert_offsets;
  const int* const tile_offsets = params.tile_offsets;
  SHARED_DYNAMIC(shared);
  int* next_rows = reinterpret_cast<int*>(shared);  // [warps, E]: first counts, then next rows
  const int num_experts = args.num_experts;
  const int lane = threadIdx.x % WARP_SIZE;
  const int warps = blockDim.x / WARP_SIZE;
  int* next_row = next_rows + threadIdx.x / WARP_SIZE * num_experts;
  const SlotRange block = block_range(args);
  const SlotRange range = warp_range(block, args);

  for (int i = threadIdx.x; i < warps * num_experts; i += blockDim.x) next_rows[i] = 0;
  __syncthreads();
  for (int slot = range.first + lane; slot < range.end; slot += WARP_SIZE) {
    const int expert = expert_of(expert_ids, slot, args);
    if (expert < num_experts) atomicAdd(&next_row[expert], 1);
  }
  __syncthreads();
  for (int e = threadIdx.x; e < num_experts; e += blockDim.x) {
    int row = params.counts[e * args.num_blocks + blockIdx.x];
    for (int warp = 0; warp < warps; warp++) {
      const int count = next_rows[warp * num_experts + e];
      next_rows[warp * num_experts + e] = row;
      row += count;
    }
  }
  __syncthreads();

  // 32 slots at a time. Lanes of one expert receive consecutive rows.
  for (int first = range.first; first < range.end; first += WARP_SIZE) {
    const int slot = first + lane;
    const int expert = slot < range.end ? expert_of(expert_ids, slot, args) : num_experts;
    const uint32_t peers = __match_any_sync(FULL_WARP, expert);
    const int leader = __ffs(peers) - 1;
    int row = 0;
    if (lane == leader && expert < num_experts) {
      row = next_row[expert];
      next_row[expert] = row + __popc(peers);
    }
    row = __shfl_sync(FULL_WARP, row, leader) + __popc(peers & ((1u << lane) - 1));
    __syncwarp();  // the next 32 slots may have another leader for this expert

    if (slot < range.end) params.row_of_slot[slot] = expert < num_experts ? row : INACTIVE;
    if (expert < num_experts && (uint32_t)row < (uint32_t)args.slots) {
      params.token_of_row[row] = slot / args.top_k;
      const int begin = expert_offsets[expert], end = expert_offsets[expert + 1];
      const int tile = (row - begin) / args.block_m;
      const uint32_t at = tile_offsets[expert] + tile;
      if (row - begin == tile * args.block_m && at < (uint32_t)args.max_tiles) {
        params.tiles[at] = {expert, row, min(args.block_m, end - row), 0};
      }
    }
  }

  // There are as many rows as slots: a block writes the unused rows among those with its slots'
  // indices.
  const int rows = expert_offsets[num_experts];
  for (int row = block.first + threadIdx.x; row < block.end; row += blockDim.x) {
    if (row >= rows) params.token_of_row[row] = INACTIVE;
  }
  const int threads = gridDim.x * blockDim.x, thread = blockIdx.x * blockDim.x + threadIdx.x;
  const int num_tiles = min(max(tile_offsets[num_experts], 0), args.max_tiles);
  for (int tile = num_tiles + thread; tile < args.max_tiles; tile += threads) {
    params.tiles[tile] = {0, 0, 0, 0};
  }
}

// ---- Entries ------------------------------------------------------------------------------------

// clang-format off: three lines per entry
extern "C" __global__ void __launch_bounds__(PLAN_THREADS)
moe_plan_fwd_count(const TypedPlanParams params) { plan_count(params); }
EXPORT_KERNEL(moe_plan_fwd_count, PLAN_THREADS)

extern "C" __global__ void __launch_bounds__(PLAN_SCAN_THREADS)
moe_plan_fwd_scan(const TypedPlanParams params) { plan_scan(params); }
EXPORT_KERNEL(moe_plan_fwd_scan, PLAN_SCAN_THREADS)

extern "C" __global__ void __launch_bounds__(PLAN_THREADS)
moe_plan_fwd_place(const TypedPlanParams params) { plan_place(params); }
EXPORT_KERNEL(moe_plan_fwd_place, PLAN_THREADS)
// clang-format on

// The three steps for a grid of one block, whose barriers make its writes visible to its threads.
extern "C" __global__ void __launch_bounds__(PLAN_THREADS)
    moe_plan_fwd_single(const TypedPlanParams params) {
  plan_count(params);
  __syncthreads();
  plan_scan(params);
  __syncthreads();
  plan_place(params);
}
EXPORT_KERNEL(moe_plan_fwd_single, PLAN_THREADS)
