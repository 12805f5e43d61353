// EXPORT_KERNEL: registers a kernel for find_kernel under its symbol, with the layout of its
// parameters and a function that unpacks a launch's `void**`.
#pragma once
#include <cstddef>
#include <tuple>
#include <type_traits>
#include <utility>

#include "runtime.h"

namespace simt {

using Entry = void (*)(void* arguments);

// Runs `entry` in every thread of the grid. Returns 0, or -1 and sets last_error().
int launch(const Kernel& kernel, const LaunchConfig& config, Entry entry, void* arguments);

// Adds a kernel to the table; static initialisers alone call it, before main.
void register_kernel(const Kernel* kernel);

// The offsets of a C struct with members of the given sizes and alignments.
template <class... P>
struct ParameterLayout {
  // One element more than needed: C++ has no array of length zero.
  Parameter at[sizeof...(P) + 1];
  constexpr ParameterLayout() : at() {
    constexpr size_t sizes[] = {sizeof(P)..., 1}, aligns[] = {alignof(P)..., 1};
    size_t end = 0;
    for (size_t i = 0; i <= sizeof...(P); i++) {
      at[i].offset = (end + aligns[i] - 1) / aligns[i] * aligns[i];
      at[i].size = sizes[i];
      end = at[i].offset + at[i].size;
    }
  }
};

template <auto function>
struct Exported;

template <class... P, void (*function)(P...)>
struct Exported<function> {
  static constexpr ParameterLayout<P...> layout{};
  static inline Kernel kernel{};

  static int run(const LaunchConfig& config, void** arguments) {
    return run(config, arguments, std::index_sequence_for<P...>{});
  }
  template <size_t... I>
  static int run(const LaunchConfig& config, void** arguments, std::index_sequence<I...>) {
    std::tuple<P...> values(*static_cast<std::remove_reference_t<P>*>(arguments[I])...);
    return launch(
        kernel, config, [](void* v) { std::apply(function, *static_cast<std::tuple<P...>*>(v)); },
        &values);
  }
};

template <auto function>
struct Registration {
  Registration(const char* symbol, unsigned max_threads) {
    using E = Exported<function>;
    constexpr unsigned parameters = sizeof(E::layout.at) / sizeof(Parameter) - 1;
    E::kernel = {symbol, max_threads, parameters, E::layout.at, &E::run};
    register_kernel(&E::kernel);
  }
};

}  // namespace simt

#define EXPORT_KERNEL(symbol, max_threads) \
  static const ::simt::Registration<&symbol> symbol##_registration(#symbol, max_threads);
