// The exponential and the logarithm. On the CPU those of floats are arithmetic that a loop is
// vectorised over: expf and logf are calls, which stop it.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "host_device.h"

namespace focalops {
namespace detail {

struct Exponential {
  float factor;  // exp(x) = factor * 2^power
  uint32_t power;
};

// A product and a sum that the compiler may contract to one operation; RoundedOnce in detect.h
// has those that it may not.
struct Contractible {
  FOCALOPS_HOST_DEVICE static float multiply_add(float a, float b, float c) { return a * b + c; }
  FOCALOPS_HOST_DEVICE static float multiply_subtract(float c, float a, float b) {
    return c - a * b;
  }
};

// exp(x) = 2^n e^r with |r| <= ln(2) / 2, within an ulp, for |x| of at most some hundreds. A NaN
// makes the factor NaN and the power any number, which is why the power is unsigned.
template <typename Arithmetic = Contractible>
FOCALOPS_HOST_DEVICE Exponential exponential_parts(float x) {
  const float round_to_int = 12582912.0f;  // 1.5 * 2^23
  const float shifted = Arithmetic::multiply_add(x, 1.44269504f, round_to_int);
  const float n = shifted - round_to_int;
  const float r = Arithmetic::multiply_add(n, 2.12194440e-4f,
                                           Arithmetic::multiply_subtract(x, n, 0.693359375f));
  // Estrin's scheme: pairs of terms wait for each other less than Horner's chain does.
  const float z = r * r;
  const float high = Arithmetic::multiply_add(0.0013836845755577087f, r, 0.008374815806746483f);
  const float middle = Arithmetic::multiply_add(0.04166822507977486f, r, 0.16666419804096222f);
  const float low = Arithmetic::multiply_add(0.49999991059303284f, r, 1.0f);
  float p = Arithmetic::multiply_add(Arithmetic::multiply_add(high, z, middle), z, low);
  p = Arithmetic::multiply_add(p, r, 1.0f);
  uint32_t bits;
  std::memcpy(&bits, &shifted, sizeof bits);
  return {p, bits - 0x4b400000u};  // the bits of round_to_int
}

// 2^power, which must be a normal number.
FOCALOPS_HOST_DEVICE float power_of_two(uint32_t power) {
  const uint32_t bits = (power + 127u) << 23;
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

}  // namespace detail

FOCALOPS_HOST_DEVICE double logarithm(double x) { return log(x); }

FOCALOPS_HOST_DEVICE float logarithm(float x) {
#ifdef __CUDA_ARCH__
  return logf(x);
#else
  // logf is a call that no loop is vectorised over. x = 2^n m with m in [sqrt(1 / 2), sqrt(2)), and
  // a minimax polynomial in m - 1 (Moshier, Cephes): within an ulp.
  const bool is_subnormal = x < 1.17549435e-38f;
  const float normal = is_subnormal ? x * 8388608.0f : x;
  uint32_t bits;
  std::memcpy(&bits, &normal, sizeof bits);
  const uint32_t shifted = bits - 0x3f3504f3u;  // sqrt(1 / 2)
  const int32_t n = static_cast<int32_t>(shifted) >> 23;
  const uint32_t m_bits = (shifted & 0x007fffffu) + 0x3f3504f3u;
  float m;
  std::memcpy(&m, &m_bits, sizeof m);
  const float exponent = static_cast<float>(is_subnormal ? n - 23 : n);
  const float r = m - 1.0f, z = r * r;
  float p = 7.0376836292e-2f;
  p = p * r - 1.1514610310e-1f;
  p = p * r + 1.1676998740e-1f;
  p = p * r - 1.2420140846e-1f;
  p = p * r + 1.4249322787e-1f;
  p = p * r - 1.6668057665e-1f;
  p = p * r + 2.0000714765e-1f;
  p = p * r - 2.4999993993e-1f;
  p = p * r + 3.3333331174e-1f;
  const float tail = p * r * z - 2.12194440e-4f * exponent - 0.5f * z;
  const float value = (r + tail) + 0.693359375f * exponent;
  const float infinity = __builtin_huge_valf();
  return x > 0 ? (x < infinity ? value : infinity) : x == 0 ? -infinity : __builtin_nanf("");
#endif
}

FOCALOPS_HOST_DEVICE double exponential(double x) { return exp(x); }

FOCALOPS_HOST_DEVICE float exponential(float x) {
#ifdef __CUDA_ARCH__
  return expf(x);
#else
  const float clamped = x > 89.0f ? 89.0f : x < -104.0f ? -104.0f : x;  // a NaN stays
  const detail::Exponential e = detail::exponential_parts(clamped);
  // Two factors, because the largest and the smallest powers have no exponent of their own.
  const auto half = static_cast<uint32_t>(static_cast<int32_t>(e.power) >> 1);
  return e.factor * detail::power_of_two(half) * detail::power_of_two(e.power - half);
#endif
}

}  // namespace focalops
