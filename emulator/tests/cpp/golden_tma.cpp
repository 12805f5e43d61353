#include "golden.h"

namespace golden {

// A tensor, a box in it, and the coordinates of the box.
struct Tile {
  int element_bytes, data_type, swizzle;
  std::vector<uint64_t> dim;
  std::vector<uint32_t> box;
  std::vector<int> at;
  uint64_t pitch;  // bytes from one row of the tensor to the next
};

static const std::vector<Tile>& tiles() {
  constexpr int U8 = 0, U16 = 1, U32 = 2;
  static const std::vector<Tile> all = {
      {2, U16, 3, {100, 40}, {64, 16}, {0, 0}, 208},
      {2, U16, 3, {100, 40}, {64, 16}, {64, 32}, 208},  // past both ends
      {2, U16, 3, {100, 40}, {64, 8}, {-8, -3}, 208},   // before both starts
      {2, U16, 2, {50, 20}, {32, 16}, {24, 10}, 112},
      {2, U16, 1, {50, 20}, {16, 16}, {40, 0}, 112},
      {2, U16, 0, {50, 20}, {24, 9}, {43, 15}, 112},
      {4, U32, 3, {33, 30}, {32, 32}, {16, 0}, 144},
      {1, U8, 0, {75, 9}, {32, 4}, {60, 6}, 80},
      {2, U16, 3, {64, 9, 5}, {64, 4, 2}, {0, 6, 3}, 128},
      {2, U16, 2, {40, 6, 4}, {32, 3, 3}, {16, -1, 2}, 96},
      {2, U16, 3, {64, 6, 4, 3}, {64, 2, 2, 2}, {0, 5, 1, 2}, 128},
      {4, U32, 0, {12, 5, 3, 2}, {8, 3, 2, 2}, {8, -1, 2, 0}, 48},
  };
  return all;
}

static uint64_t tensor_bytes(const Tile& tile) {
  uint64_t rows = 1;
  for (size_t i = 1; i < tile.dim.size(); i++) rows *= tile.dim[i];
  return rows * tile.pitch;
}

static uint64_t box_bytes(const Tile& tile) {
  uint64_t bytes = tile.element_bytes;
  for (uint32_t side : tile.box) bytes *= side;
  return bytes;
}

static uint8_t byte_of(const std::vector<uint32_t>& words, uint64_t byte) {
  return static_cast<uint8_t>(words[byte / 4] >> 8 * (byte % 4));
}

static void set_byte(std::vector<uint32_t>& words, uint64_t byte, uint8_t value) {
  words[byte / 4] |= static_cast<uint32_t>(value) << 8 * (byte % 4);
}

// Calls f(byte of the box in shared memory, byte of the tensor or -1) for every byte of the box.
template <class F>
static void for_each_byte(const Tile& tile, F f) {
  for (uint64_t linear = 0; linear < box_bytes(tile); linear++) {
    uint64_t element = linear / tile.element_bytes, row_stride = tile.pitch, offset = 0;
    bool inside = true;
    for (size_t i = 0; i < tile.box.size(); i++) {
      const int64_t coordinate = tile.at[i] + static_cast<int64_t>(element % tile.box[i]);
      element /= tile.box[i];
      inside &= coordinate >= 0 && coordinate < static_cast<int64_t>(tile.dim[i]);
      if (i == 0) {
        offset += coordinate * tile.element_bytes;
      } else {
        offset += coordinate * row_stride;
        row_stride *= tile.dim[i];
      }
    }
    offset += linear % tile.element_bytes;
    // A swizzle permutes the 16-byte units within groups of 8, 4 or 2, by the index of their
    // 128-byte row.
    const uint64_t unit = linear / 16, group = (1u << tile.swizzle) - 1;
    f((unit ^ (unit / 8 & group)) * 16 + linear % 16, inside ? static_cast<int64_t>(offset) : -1);
  }
}

static Case base_case(const Tile& tile, const std::string& symbol, size_t number) {
  Case c;
  c.symbol = symbol;
  c.name = "_tile" + std::to_string(number);
  c.shared_bytes = 16 << 10;
  c.map.used = true;
  c.map.data_type = tile.data_type;
  c.map.swizzle = tile.swizzle;
  c.map.dim = tile.dim;
  c.map.box = tile.box;
  uint64_t stride = tile.pitch;
  for (size_t i = 1; i < tile.dim.size(); i++) {
    c.map.stride_bytes.push_back(stride);
    stride *= tile.dim[i];
  }
  c.in.assign(HEADER, 0);
  c.in[0] = static_cast<uint32_t>(box_bytes(tile));
  for (size_t i = 0; i < tile.at.size(); i++) c.in[1 + i] = static_cast<uint32_t>(tile.at[i]);
  return c;
}

static Case load_case(const Tile& tile, size_t number) {
  Case c = base_case(tile, "emu_golden_tma_load_" + std::to_string(tile.dim.size()) + "d", number);
  Random random(400 + number);
  std::vector<uint32_t> tensor(tensor_bytes(tile) / 4);
  for (uint32_t& word : tensor) word = random.word();
  c.in.insert(c.in.end(), tensor.begin(), tensor.end());
  c.want.assign(box_bytes(tile) / 4, 0);
  for_each_byte(tile, [&](uint64_t at, int64_t from) {
    if (from >= 0) set_byte(c.want, at, byte_of(tensor, from));
  });
  return c;
}

static Case store_case(const Tile& tile, size_t number) {
  Case c = base_case(tile, "emu_golden_tma_store_" + std::to_string(tile.dim.size()) + "d", number);
  c.map.over_out = true;
  Random random(500 + number);
  std::vector<uint32_t> shared(box_bytes(tile) / 4);
  for (uint32_t& word : shared) word = random.word();
  c.in.insert(c.in.end(), shared.begin(), shared.end());
  c.want.assign(tensor_bytes(tile) / 4, 0);
  for_each_byte(tile, [&](uint64_t from, int64_t at) {
    if (at >= 0) set_byte(c.want, at, byte_of(shared, from));
  });
  return c;
}

// Block r of the cluster loads the box one row below that of block r - 1; both blocks receive both.
static Case multicast_case() {
  Tile tile = tiles()[0];
  Case c = load_case(tile, 0);
  c.symbol = "emu_golden_tma_load_multicast_2d";
  c.name = "";
  c.cluster = 2;
  std::vector<uint32_t> both = c.want;
  tile.at[1]++;
  std::vector<uint32_t> second(c.want.size(), 0);
  const std::vector<uint32_t> tensor(c.in.begin() + HEADER, c.in.end());
  for_each_byte(tile, [&](uint64_t at, int64_t from) {
    if (from >= 0) set_byte(second, at, byte_of(tensor, from));
  });
  both.insert(both.end(), second.begin(), second.end());
  c.want = both;
  c.want.insert(c.want.end(), both.begin(), both.end());
  return c;
}

std::vector<Case> tma_cases() {
  std::vector<Case> cases;
  for (size_t i = 0; i < tiles().size(); i++) {
    cases.push_back(load_case(tiles()[i], i));
    cases.push_back(store_case(tiles()[i], i));
  }
  cases.push_back(multicast_case());
  return cases;
}

}  // namespace golden
