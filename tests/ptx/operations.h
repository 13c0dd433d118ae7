// How the table of instructions is written.
#pragma once

#include <algorithm>
#include <cmath>
#include <limits>
#include <type_traits>
#include <utility>

#include "machine.h"

namespace ptx {

using Table = std::unordered_map<std::string, Operation>;
void add_arithmetic(Table& table);
void add_memory(Table& table);
void add_meetings(Table& table);

namespace types {
using f32 = float;
using f64 = double;
using s8 = int8_t;
using s16 = int16_t;
using s32 = int32_t;
using s64 = int64_t;
using u8 = uint8_t;
using u16 = uint16_t;
using u32 = uint32_t;
using u64 = uint64_t;
}  // namespace types

template <class F>
void for_integers(F f) {
  f(int8_t(), ".s8");
  f(int16_t(), ".s16");
  f(int32_t(), ".s32");
  f(int64_t(), ".s64");
  f(uint8_t(), ".u8");
  f(uint16_t(), ".u16");
  f(uint32_t(), ".u32");
  f(uint64_t(), ".u64");
}

// A register is wider than a small type: signed values are extended by their sign.
template <class T>
uint64_t to_register(T value) {
  if constexpr (std::is_integral_v<T> && std::is_signed_v<T>) {
    return static_cast<uint64_t>(static_cast<int64_t>(value));
  } else {
    return bits_of(value);
  }
}

// An operation of one result that each lane computes from its own operands.
template <auto F, class Signature = decltype(&decltype(F)::operator())>
struct PerLane;
template <auto F, class Lambda, class Result, class... Operands>
struct PerLane<F, Result (Lambda::*)(Operands...) const> {
  static void run(Warp& warp, const Instruction& i, Mask lanes) {
    run(warp, i, lanes, std::index_sequence_for<Operands...>());
  }
  template <size_t... K>
  static void run(Warp& warp, const Instruction& i, Mask lanes, std::index_sequence<K...>) {
    uint64_t* const to = warp.to(i.to[0]);
    const uint64_t* const from[] = {warp.from(i.from[K])...};
    for_lanes(lanes, [&](int lane) {
      to[lane] = to_register<Result>(F(value_of<Operands>(from[K][lane])...));
    });
  }
};
template <auto F>
Operation per_lane() {
  return {&PerLane<F>::run};
}

// Of a number and a NaN the number; -0 is below +0.
template <class T>
T least(T a, T b) {
  if constexpr (std::is_floating_point_v<T>) {
    if (std::isnan(a) || std::isnan(b)) {
      return !std::isnan(a) ? a : !std::isnan(b) ? b : std::numeric_limits<T>::quiet_NaN();
    }
    if (a == b) {
      return std::signbit(a) ? a : b;
    }
  }
  return b < a ? b : a;
}
template <class T>
T greatest(T a, T b) {
  if constexpr (std::is_floating_point_v<T>) {
    if (std::isnan(a) || std::isnan(b)) {
      return !std::isnan(a) ? a : !std::isnan(b) ? b : std::numeric_limits<T>::quiet_NaN();
    }
    if (a == b) {
      return std::signbit(a) ? b : a;
    }
  }
  return a < b ? b : a;
}

}  // namespace ptx
