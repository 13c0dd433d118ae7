// The instructions that the PTX manual defines by a bound on their error. A machine has one error
// for one operand; here the seed chooses it, at the edge of the bound.
#pragma once

#include <cmath>
#include <limits>

#include "program.h"

namespace ptx {

extern uint64_t approximation_seed;

namespace detail {

enum class Side { kNearest, kLow, kHigh };

inline Side side(uint64_t operand) {
  if (approximation_seed <= 2) {
    return static_cast<Side>(approximation_seed);
  }
  uint64_t hash = (operand ^ approximation_seed * 0x9e3779b97f4a7c15u) * 0xbf58476d1ce4e5b9u;
  hash = (hash ^ hash >> 31) * 0x94d049bb133111ebu;
  return hash >> 63 ? Side::kHigh : Side::kLow;
}

// The float that is furthest from `exact` on its side, and no further than `error`.
inline float at_edge(double exact, double error, uint64_t operand) {
  if (exact == 0 || !std::isfinite(exact) || side(operand) == Side::kNearest) {
    return static_cast<float>(exact);
  }
  const double edge = side(operand) == Side::kLow ? exact - error : exact + error;
  const auto rounded = static_cast<float>(edge);
  return std::fabs(rounded - exact) > error ? std::nextafter(rounded, static_cast<float>(exact))
                                            : rounded;
}

// The distance of the floats around `exact`.
inline double ulp(double exact) {
  const double least = std::numeric_limits<float>::denorm_min();
  return std::max(std::ldexp(1.0, std::ilogb(exact) - 23), least);
}

inline float flush(float x) {
  return std::fabs(x) < std::numeric_limits<float>::min() ? std::copysign(0.0f, x) : x;
}

}  // namespace detail

// 2 ulp from the correctly rounded result; 2^0 is 1, and what rounds to 0 is 0.
template <bool Ftz>
float ex2_approx(float x) {
  const float in = Ftz ? detail::flush(x) : x;
  float out = static_cast<float>(std::exp2(static_cast<double>(in)));
  const detail::Side side = detail::side(bits_of(in));
  if (in != 0 && out != 0 && std::isfinite(in) && std::isfinite(out) &&
      side != detail::Side::kNearest) {
    const float edge = side == detail::Side::kLow ? 0 : std::numeric_limits<float>::infinity();
    out = std::nextafter(std::nextafter(out, edge), edge);
  }
  return Ftz ? detail::flush(out) : out;
}

// 2 ulp for |b| in [2^-126, 2^126]; beyond that 0, or of an infinity NaN.
template <bool Ftz>
float div_approx(float a_, float b_) {
  const float a = Ftz ? detail::flush(a_) : a_, b = Ftz ? detail::flush(b_) : b_;
  if (std::fabs(b) > 0x1p126f && !std::isinf(b) && !std::isnan(a)) {
    return std::isinf(a) ? std::numeric_limits<float>::quiet_NaN() : std::copysign(0.0f, a * b);
  }
  const double exact = static_cast<double>(a) / static_cast<double>(b);
  const float out = detail::at_edge(exact, 2 * detail::ulp(exact), bits_of(a) << 32 | bits_of(b));
  return Ftz ? detail::flush(out) : out;
}

// 2 ulp everywhere.
template <bool Ftz>
float div_full(float a_, float b_) {
  const float a = Ftz ? detail::flush(a_) : a_, b = Ftz ? detail::flush(b_) : b_;
  const double exact = static_cast<double>(a) / static_cast<double>(b);
  const float out = detail::at_edge(exact, 2 * detail::ulp(exact), bits_of(a) << 32 | bits_of(b));
  return Ftz ? detail::flush(out) : out;
}

// 1 ulp.
template <bool Ftz>
float rcp_approx(float x_) {
  const float x = Ftz ? detail::flush(x_) : x_;
  const double exact = 1 / static_cast<double>(x);
  const float out = detail::at_edge(exact, detail::ulp(exact), bits_of(x));
  return Ftz ? detail::flush(out) : out;
}

// Absolute error 2^-22 for x in (1/2, 2), relative error 2^-22 elsewhere.
template <bool Ftz>
float lg2_approx(float x_) {
  const float x = Ftz ? detail::flush(x_) : x_;
  const double exact = std::log2(static_cast<double>(x));
  const bool is_near_one = x > 0.5f && x < 2;
  return detail::at_edge(exact, is_near_one ? 0x1p-22 : std::fabs(exact) * 0x1p-22, bits_of(x));
}

// Relative error 2^-23.
template <bool Ftz>
float sqrt_approx(float x_) {
  const float x = Ftz ? detail::flush(x_) : x_;
  const double exact = std::sqrt(static_cast<double>(x));
  return detail::at_edge(exact, exact * 0x1p-23, bits_of(x));
}

// Relative error 2^-22.9.
template <bool Ftz>
float rsqrt_approx(float x_) {
  const float x = Ftz ? detail::flush(x_) : x_;
  const double exact = 1 / std::sqrt(static_cast<double>(x));
  return detail::at_edge(exact, exact * 0x1.125fbep-23, bits_of(x));
}

// Of the upper half of the operand, into the upper half of the result: 20 bits of mantissa, taken
// here as within one unit of the last of them.
inline double rcp_approx(double x) {
  const auto flush = [](double v) {
    return std::fabs(v) < std::numeric_limits<double>::min() ? std::copysign(0.0, v) : v;
  };
  const auto upper = [](double v) { return value_of<double>(bits_of(v) >> 32 << 32); };
  const double in = flush(std::isfinite(x) ? upper(x) : x);
  const double out = flush(1 / in);
  if (out == 0 || !std::isfinite(out)) {
    return out;
  }
  const uint64_t unit = uint64_t{1} << 32, bits = bits_of(out) >> 32 << 32;
  switch (detail::side(bits_of(in))) {
    case detail::Side::kNearest:
      return value_of<double>(bits);
    case detail::Side::kLow:
      return value_of<double>(bits - unit);
    case detail::Side::kHigh:
      return value_of<double>(bits + unit);
  }
  return out;
}

}  // namespace ptx
