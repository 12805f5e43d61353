// The element types, the intrinsics and device memory, without a kernel.
#include <cmath>
#include <cstdint>

#include "simt.h"
#include "testing.h"

namespace {

// The value of a bit pattern with `exponent` and `mantissa` bits, by definition.
double value_of(uint16_t bits, int exponent, int mantissa) {
  const int e = bits >> mantissa & ((1 << exponent) - 1), m = bits & ((1 << mantissa) - 1);
  const int bias = (1 << (exponent - 1)) - 1;
  double value;
  if (e == (1 << exponent) - 1) {
    value = m == 0 ? INFINITY : NAN;
  } else if (e == 0) {
    value = std::ldexp(m, 1 - bias - mantissa);
  } else {
    value = std::ldexp((1 << mantissa) + m, e - bias - mantissa);
  }
  return bits & 0x8000 ? -value : value;
}

TEST(all_halves_widen_exactly) {
  for (uint32_t bits = 0; bits < 65536; bits++) {
    const uint16_t b = static_cast<uint16_t>(bits);
    const double bf16 = value_of(b, 8, 7), f16 = value_of(b, 5, 10);
    const float got_bf16 = __bfloat162float(__ushort_as_bfloat16(b));
    const float got_f16 = __half2float(__ushort_as_half(b));
    CHECK(std::isnan(bf16) ? std::isnan(got_bf16) : got_bf16 == bf16, "bf16 %04x", bits);
    CHECK(std::isnan(f16) ? std::isnan(got_f16) : got_f16 == f16, "f16 %04x", bits);
    CHECK(std::signbit(got_bf16) == (bits >> 15) && std::signbit(got_f16) == (bits >> 15),
          "the sign of %04x", bits);
    // A widened value narrows to itself.
    if (!std::isnan(bf16)) {
      CHECK(__float2bfloat16_rn(got_bf16).bits == bits, "bf16 %04x does not round-trip", bits);
    }
    if (!std::isnan(f16)) CHECK(__float2half_rn(got_f16).bits == bits, "f16 %04x", bits);
  }
}

// The nearer of a float's two neighbours, or the even one if both are equally near. `infinity` is
// the first value too large to represent.
uint16_t nearest(float f, int exponent, int mantissa) {
  const uint16_t infinity = static_cast<uint16_t>(((1 << exponent) - 1) << mantissa);
  const auto magnitude = [&](uint16_t bits) {
    if (bits != infinity) return value_of(bits, exponent, mantissa);
    return std::ldexp(1.0, 1 << (exponent - 1));
  };
  const double wanted = std::fabs(static_cast<double>(f));
  uint16_t low = 0, high = infinity;
  while (high - low > 1) {
    const uint16_t middle = static_cast<uint16_t>((low + high) / 2);
    (magnitude(middle) <= wanted ? low : high) = middle;
  }
  const double below = wanted - magnitude(low), above = magnitude(high) - wanted;
  const uint16_t bits = below < above || (below == above && low % 2 == 0) ? low : high;
  return static_cast<uint16_t>(bits | (std::signbit(f) ? 0x8000 : 0));
}

TEST(floats_round_to_nearest_even) {
  // A step that is not a multiple of a power of two reaches every exponent and all kinds of
  // mantissas; the floats halfway between neighbours are tested separately.
  const uint64_t step = testing::UNDER_ASAN || testing::UNDER_TSAN ? 40009 : 4001;
  const auto check = [](uint32_t bits) {
    const float f = __uint_as_float(bits);
    const uint16_t bf16 = __float2bfloat16_rn(f).bits, f16 = __float2half_rn(f).bits;
    if (std::isnan(f)) {
      CHECK(bf16 == 0x7fff && f16 == 0x7fff, "NaN %08x", bits);
      return;
    }
    CHECK(bf16 == nearest(f, 8, 7), "%08x gives bf16 %04x", bits, bf16);
    CHECK(f16 == nearest(f, 5, 10), "%08x gives f16 %04x", bits, f16);
  };
  for (uint64_t bits = 0; bits < uint64_t{1} << 32; bits += step)
    check(static_cast<uint32_t>(bits));
  for (uint32_t half = 0; half < 65536; half += 7) {
    const uint32_t f16 =
        __float_as_uint(__half2float(__ushort_as_half(static_cast<uint16_t>(half))));
    for (int offset = -1; offset <= 1; offset++) {
      check((half << 16 | 0x8000u) + offset);
      check((f16 | 0x1000u) + offset);
    }
  }
}

TEST(bit_intrinsics) {
  CHECK(__brev(1) == 0x80000000u && __brev(0x0000ff00u) == 0x00ff0000u, "__brev");
  CHECK(__clz(0) == 32 && __clz(1) == 31 && __ffs(0) == 0 && __ffs(8) == 4, "__clz, __ffs");
  CHECK(__byte_perm(0x33221100u, 0x77665544u, 0x7531u) == 0x77553311u, "__byte_perm");
  CHECK(__funnelshift_l(0x80000000u, 1, 1) == 3 && __funnelshift_r(2, 1, 1) == 0x80000001u,
        "__funnelshift");
  CHECK(__float2int_rz(1e30f) == 2147483647 && __float2int_rn(2.5f) == 2, "__float2int");
  CHECK(__float2uint_rz(-1.0f) == 0 && __float2int_rz(NAN) == 0, "saturation");
  CHECK(min(3, 5u) == 3u && max(int64_t{1} << 40, 7) == int64_t{1} << 40, "min, max");
}

TEST(device_memory) {
  for (size_t bytes : {1u, 255u, 256u, 257u, 4096u, 100000u, 20u << 20}) {
    unsigned char* const p = static_cast<unsigned char*>(simt::device_alloc(bytes));
    CHECK(reinterpret_cast<uintptr_t>(p) % 256 == 0, "%zu bytes are not aligned", bytes);
    CHECK(p[0] == 0xff && p[bytes / 2] == 0xff && p[bytes - 1] == 0xff, "not poisoned");
    CHECK(simt::device_contains(p, bytes) && simt::device_contains(p + bytes, 0), "inside");
    CHECK(!simt::device_contains(p, bytes + 1) && !simt::device_contains(p - 1, 1), "outside");
    p[bytes - 1] = 1;
    simt::device_free(p);
    CHECK(!simt::device_contains(p, 1), "the freed allocation is still live");
  }
  CHECK(simt::take_memory_error() == nullptr, "damage reported without an overrun");
  if (testing::UNDER_ASAN) return;
  unsigned char* const p = static_cast<unsigned char*>(simt::device_alloc(100));
  p[102] = 7;
  simt::device_free(p);
  const char* const damage = simt::take_memory_error();
  CHECK(damage != nullptr && testing::contains(damage, "byte 2 past the end"), "%s", damage);
  CHECK(simt::take_memory_error() == nullptr, "reported twice");
}

// Far more than the machine has; only touched pages use memory.
TEST(large_allocations) {
  if (testing::UNDER_ASAN || testing::UNDER_TSAN) return;
  const size_t bytes = size_t{40} << 30;
  unsigned char* const p = static_cast<unsigned char*>(simt::device_alloc(bytes));
  CHECK(p != nullptr, "40 GiB");
  CHECK(p[0] == 0xff && p[bytes / 3] == 0xff && p[bytes - 1] == 0xff, "not poisoned");
  p[bytes / 2] = 1;
  CHECK(p[bytes / 2] == 1 && p[bytes / 2 + 1] == 0xff, "not writable");
  simt::device_free(p);
}

}  // namespace
