// Warp-wide operations: shuffles, votes, reductions, matches. Each is a rendezvous of the lanes of
// its mask, and reports an error if those lanes are not all at the same operation.
#pragma once
#include "thread.h"

namespace simt {

// These act for all lanes at once, which the race checker would see as one thread that reads the
// others' stacks.
#define SIMT_NO_TSAN __attribute__((no_sanitize("thread"), noinline))

template <class Op>
inline void rendezvous(uint32_t mask, Op& op, OrderMemory order, const char* kind, Site site) {
  warp_op(
      mask, &op, [](void** ops, uint32_t m) { Op::apply(reinterpret_cast<Op**>(ops), m); }, order,
      kind, site);
}

// Executes the statement with `lane` as the number of each lane of `mask`. A macro, since a lambda
// would not inherit SIMT_NO_TSAN.
#define SIMT_FOR_EACH_LANE(lane, mask)                                \
  for (uint32_t lane##_rest = mask, lane;                             \
       lane##_rest != 0 && (lane = __builtin_ctz(lane##_rest), true); \
       lane##_rest &= lane##_rest - 1)

template <class T>
struct Shuffle {
  T in, out;
  int source;
  SIMT_NO_TSAN static void apply(Shuffle** ops, uint32_t mask) {
    SIMT_FOR_EACH_LANE(lane, mask) {
      const int source = ops[lane]->source;
      if (mask >> source & 1) {
        ops[lane]->out = ops[source]->in;
      } else {  // undefined in CUDA
        std::memset(static_cast<void*>(&ops[lane]->out), 0xff, sizeof(T));
      }
    }
  }
};

enum class Reduction { Add, MinUnsigned, MaxUnsigned, MinSigned, MaxSigned, And, Or, Xor, Ballot };

struct Reduce {
  uint32_t in, out;
  Reduction kind;

  static uint32_t combine(Reduction kind, uint32_t a, uint32_t b) {
    const int sa = static_cast<int>(a), sb = static_cast<int>(b);
    switch (kind) {
      case Reduction::Add:
        return a + b;
      case Reduction::MinUnsigned:
        return a < b ? a : b;
      case Reduction::MaxUnsigned:
        return a > b ? a : b;
      case Reduction::MinSigned:
        return sa < sb ? a : b;
      case Reduction::MaxSigned:
        return sa > sb ? a : b;
      case Reduction::And:
        return a & b;
      case Reduction::Xor:
        return a ^ b;
      case Reduction::Or:
      case Reduction::Ballot:
        return a | b;
    }
    return 0;
  }

  SIMT_NO_TSAN static void apply(Reduce** ops, uint32_t mask) {
    const uint32_t first = __builtin_ctz(mask);
    const Reduction kind = ops[first]->kind;
    uint32_t result = 0;
    SIMT_FOR_EACH_LANE(lane, mask) {
      uint32_t in = ops[lane]->in;
      if (kind == Reduction::Ballot) in = in ? 1u << lane : 0u;
      result = lane == first ? in : combine(kind, result, in);
    }
    SIMT_FOR_EACH_LANE(lane, mask) ops[lane]->out = result;
  }
};

struct Match {
  uint64_t in;
  uint32_t out;
  SIMT_NO_TSAN static void apply(Match** ops, uint32_t mask) {
    SIMT_FOR_EACH_LANE(lane, mask) {
      uint32_t equal = 0;
      SIMT_FOR_EACH_LANE(other, mask) {
        if (ops[other]->in == ops[lane]->in) equal |= 1u << other;
      }
      ops[lane]->out = equal;
    }
  }
};

struct Nothing {
  static void apply(Nothing**, uint32_t) {}
};

inline uint32_t reduce(uint32_t mask, uint32_t in, Reduction reduction, const char* kind,
                       Site site) {
  Reduce op{in, 0, reduction};
  rendezvous(mask, op, OrderMemory::No, kind, site);
  return op.out;
}

// A source outside the caller's segment of `width` lanes means the caller itself.
template <class T>
inline T shuffle(uint32_t mask, T in, int source, int width, const char* kind, Site site) {
  if (width < 1 || width > 32 || (width & (width - 1)) != 0) {
    fail("%s at %s:%d: the width %d is not a power of two up to 32", kind, site.file, site.line,
         width);
  }
  const int lane = static_cast<int>(thread_vars->lane), first = lane & ~(width - 1);
  if (source < first || source >= first + width) source = lane;
  Shuffle<T> op{in, T(), source};
  rendezvous(mask, op, OrderMemory::No, kind, site);
  return op.out;
}

}  // namespace simt

inline void __syncwarp(uint32_t mask = 0xffffffffu, SIMT_SITE) {
  simt::Nothing op;
  simt::rendezvous(mask, op, simt::OrderMemory::Yes, "__syncwarp", site);
}
inline uint32_t __activemask(SIMT_SITE) {
  simt::fail("__activemask() at %s:%d is not emulated: pass an explicit mask", site.file,
             site.line);
}

template <class T>
inline T __shfl_sync(uint32_t mask, T value, int source, int width = 32, SIMT_SITE) {
  const int first = static_cast<int>(simt::thread_vars->lane) & ~(width - 1);
  return simt::shuffle(mask, value, first | (source & (width - 1)), width, "__shfl_sync", site);
}
// The source of shfl_xor may lie in a lower segment, but not in a higher one.
template <class T>
inline T __shfl_xor_sync(uint32_t mask, T value, int lane_mask, int width = 32, SIMT_SITE) {
  const int lane = static_cast<int>(simt::thread_vars->lane), source = lane ^ lane_mask;
  if (source < (lane & ~(width - 1)) && source >= 0) {
    return simt::shuffle(mask, value, source, 32, "__shfl_xor_sync", site);
  }
  return simt::shuffle(mask, value, source, width, "__shfl_xor_sync", site);
}
template <class T>
inline T __shfl_up_sync(uint32_t mask, T value, unsigned delta, int width = 32, SIMT_SITE) {
  const int source = static_cast<int>(simt::thread_vars->lane) - static_cast<int>(delta);
  return simt::shuffle(mask, value, source, width, "__shfl_up_sync", site);
}
template <class T>
inline T __shfl_down_sync(uint32_t mask, T value, unsigned delta, int width = 32, SIMT_SITE) {
  const int source = static_cast<int>(simt::thread_vars->lane) + static_cast<int>(delta);
  return simt::shuffle(mask, value, source, width, "__shfl_down_sync", site);
}

inline uint32_t __ballot_sync(uint32_t mask, int predicate, SIMT_SITE) {
  return simt::reduce(mask, predicate != 0, simt::Reduction::Ballot, "__ballot_sync", site);
}
inline int __any_sync(uint32_t mask, int predicate, SIMT_SITE) {
  return simt::reduce(mask, predicate != 0, simt::Reduction::Or, "__any_sync", site) != 0;
}
inline int __all_sync(uint32_t mask, int predicate, SIMT_SITE) {
  return simt::reduce(mask, predicate != 0, simt::Reduction::And, "__all_sync", site) != 0;
}
inline uint32_t __reduce_add_sync(uint32_t mask, uint32_t value, SIMT_SITE) {
  return simt::reduce(mask, value, simt::Reduction::Add, "__reduce_add_sync", site);
}
inline int __reduce_add_sync(uint32_t mask, int value, SIMT_SITE) {
  return static_cast<int>(simt::reduce(mask, static_cast<uint32_t>(value), simt::Reduction::Add,
                                       "__reduce_add_sync", site));
}
inline uint32_t __reduce_min_sync(uint32_t mask, uint32_t value, SIMT_SITE) {
  return simt::reduce(mask, value, simt::Reduction::MinUnsigned, "__reduce_min_sync", site);
}
inline uint32_t __reduce_max_sync(uint32_t mask, uint32_t value, SIMT_SITE) {
  return simt::reduce(mask, value, simt::Reduction::MaxUnsigned, "__reduce_max_sync", site);
}
inline int __reduce_min_sync(uint32_t mask, int value, SIMT_SITE) {
  return static_cast<int>(simt::reduce(mask, static_cast<uint32_t>(value),
                                       simt::Reduction::MinSigned, "__reduce_min_sync", site));
}
inline int __reduce_max_sync(uint32_t mask, int value, SIMT_SITE) {
  return static_cast<int>(simt::reduce(mask, static_cast<uint32_t>(value),
                                       simt::Reduction::MaxSigned, "__reduce_max_sync", site));
}
inline uint32_t __reduce_and_sync(uint32_t mask, uint32_t value, SIMT_SITE) {
  return simt::reduce(mask, value, simt::Reduction::And, "__reduce_and_sync", site);
}
inline uint32_t __reduce_or_sync(uint32_t mask, uint32_t value, SIMT_SITE) {
  return simt::reduce(mask, value, simt::Reduction::Or, "__reduce_or_sync", site);
}
inline uint32_t __reduce_xor_sync(uint32_t mask, uint32_t value, SIMT_SITE) {
  return simt::reduce(mask, value, simt::Reduction::Xor, "__reduce_xor_sync", site);
}
// Compares bits, as the instruction does: -0.0f does not match 0.0f.
template <class T>
inline uint32_t __match_any_sync(uint32_t mask, T value, SIMT_SITE) {
  static_assert(sizeof(T) == 4 || sizeof(T) == 8, "a 32-bit or 64-bit value");
  simt::Match op{0, 0};
  std::memcpy(&op.in, &value, sizeof value);
  simt::rendezvous(mask, op, simt::OrderMemory::No, "__match_any_sync", site);
  return op.out;
}
