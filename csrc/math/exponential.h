// The exponential on the CPU as arithmetic that a loop is vectorised over: expf is a call, which
// stops it.
#pragma once

#include <cstdint>
#include <cstring>

#include "host_device.h"

namespace focalops::detail {

struct Exponential {
  float factor;  // exp(x) = factor * 2^power
  uint32_t power;
};

// By e^r with |r| <= ln(2) / 2; within an ulp. For |x| of at most some hundreds, and NaN, which
// makes the factor NaN and any power, hence an unsigned one.
FOCALOPS_HOST_DEVICE Exponential exponential_parts(float x) {
  const float round_to_int = 12582912.0f;  // 1.5 * 2^23
  const float shifted = x * 1.44269504f + round_to_int;
  const float n = shifted - round_to_int;
  const float r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
  float p = 0.0013836845755577087f;
  p = p * r + 0.008374815806746483f;
  p = p * r + 0.04166822507977486f;
  p = p * r + 0.16666419804096222f;
  p = p * r + 0.49999991059303284f;
  p = p * r + 1.0f;
  p = p * r + 1.0f;
  uint32_t bits;
  std::memcpy(&bits, &shifted, sizeof bits);
  return {p, bits - 0x4b400000u};  // the bits of round_to_int
}

// 2^power, of a normal number.
FOCALOPS_HOST_DEVICE float power_of_two(uint32_t power) {
  const uint32_t bits = (power + 127u) << 23;
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

}  // namespace focalops::detail
