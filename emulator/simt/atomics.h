// Atomic operations. Blocks may run on several operating system threads, so these are real atomics.
#pragma once
#include <type_traits>

#include "thread.h"

namespace simt {

// Replaces *p by f(*p) atomically and returns the old value.
template <class T, class F>
inline T atomic_update(T* p, F f) {
  using Word = std::conditional_t<sizeof(T) == 8, uint64_t,
                                  std::conditional_t<sizeof(T) == 4, uint32_t, uint16_t>>;
  static_assert(sizeof(T) == sizeof(Word), "2, 4 or 8 bytes");
  Word* const word = reinterpret_cast<Word*>(p);
  // One atomic load, then the attempts: counting/accesses.cpp counts the load as the whole
  // operation.
  Word before = __atomic_load_n(word, __ATOMIC_RELAXED);
  for (;;) {
    const Word after = bit_cast<Word>(f(bit_cast<T>(before)));
    if (__atomic_compare_exchange_n(word, &before, after, false, __ATOMIC_RELAXED,
                                    __ATOMIC_RELAXED)) {
      return bit_cast<T>(before);
    }
  }
}

// The operand converts to the type of the memory, as with CUDA's overloads.
template <class T>
struct Same {
  using type = T;
};
template <class T>
using Operand = typename Same<T>::type;

}  // namespace simt

template <class T>
inline T atomicAdd(T* p, simt::Operand<T> v) {
  return simt::atomic_update(p, [=](T old) { return static_cast<T>(old + v); });
}
inline __nv_bfloat162 atomicAdd(__nv_bfloat162* p, __nv_bfloat162 v) {
  return simt::atomic_update(p, [=](__nv_bfloat162 old) { return __hadd2(old, v); });
}
inline __half2 atomicAdd(__half2* p, __half2 v) {
  return simt::atomic_update(p, [=](__half2 old) { return __hadd2(old, v); });
}
template <class T>
inline T atomicSub(T* p, simt::Operand<T> v) {
  return simt::atomic_update(p, [=](T old) { return static_cast<T>(old - v); });
}
template <class T>
inline T atomicMax(T* p, simt::Operand<T> v) {
  return simt::atomic_update(p, [=](T old) { return old > v ? old : v; });
}
template <class T>
inline T atomicMin(T* p, simt::Operand<T> v) {
  return simt::atomic_update(p, [=](T old) { return old < v ? old : v; });
}
template <class T>
inline T atomicAnd(T* p, simt::Operand<T> v) {
  return simt::atomic_update(p, [=](T old) { return old & v; });
}
template <class T>
inline T atomicOr(T* p, simt::Operand<T> v) {
  return simt::atomic_update(p, [=](T old) { return old | v; });
}
template <class T>
inline T atomicXor(T* p, simt::Operand<T> v) {
  return simt::atomic_update(p, [=](T old) { return old ^ v; });
}
template <class T>
inline T atomicExch(T* p, simt::Operand<T> v) {
  return simt::atomic_update(p, [=](T) { return v; });
}
template <class T>
inline T atomicCAS(T* p, simt::Operand<T> compare, simt::Operand<T> v) {
  return simt::atomic_update(p, [=](T old) { return old == compare ? v : old; });
}
// Counts up to `limit`, then wraps to zero.
inline unsigned atomicInc(unsigned* p, unsigned limit) {
  return simt::atomic_update(p, [=](unsigned old) { return old >= limit ? 0 : old + 1; });
}
