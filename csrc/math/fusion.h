// A node of a BiFPN (Tan et al., "EfficientDet", arXiv 1911.09070): maps resampled to one size,
// weighted and added, then an activation. Here is what is computed of the weights, and of one
// number.
#pragma once

#include <type_traits>

#include "elementary.h"
#include "host_device.h"

namespace focalops {

constexpr int kMaxFeatures = 8;

enum class FusionMode { kFast, kSoftmax, kSum, kUnbounded };
enum class FusionActivation { kNone, kSilu, kRelu6 };

// A feature x contributes x * factor[i] / divisor.
template <typename T>
struct FusionWeights {
  T factor[kMaxFeatures];
  T divisor;
};

template <typename T>
FOCALOPS_HOST_DEVICE void fusion_weights(FusionMode mode, const T* weights, int count, T eps,
                                         FusionWeights<T>& result) {
  T largest = mode == FusionMode::kSoftmax ? weights[0] : T(0);
  for (int i = 1; i < count && mode == FusionMode::kSoftmax; ++i) {
    largest = weights[i] > largest || weights[i] != weights[i] ? weights[i] : largest;
  }
  T sum = 0;
  for (int i = 0; i < count; ++i) {
    const T weight = mode == FusionMode::kSum ? T(1) : weights[i];
    result.factor[i] = mode == FusionMode::kFast      ? (weight < 0 ? T(0) : weight)
                       : mode == FusionMode::kSoftmax ? exponential(weight - largest)
                                                      : weight;
    sum += result.factor[i];
  }
  result.divisor = mode == FusionMode::kFast ? sum + eps : T(1);
  for (int i = 0; i < count && mode == FusionMode::kSoftmax; ++i) {
    result.factor[i] /= sum;
  }
}

// The gradient by the weights, of which `fusion` was made; sums[i] is that by factor[i] / divisor.
template <typename T>
FOCALOPS_HOST_DEVICE void fusion_weights_gradient(FusionMode mode, const T* weights, int count,
                                                  T eps, const FusionWeights<T>& fusion,
                                                  const double* sums, T* grad) {
  double total = mode == FusionMode::kFast ? static_cast<double>(eps) : 0.0;
  for (int i = 0; i < count; ++i) {
    total += fusion.factor[i];
  }
  for (int i = 0; i < count; ++i) {
    double value = sums[i];
    if (mode == FusionMode::kFast || mode == FusionMode::kSoftmax) {
      // sums[i] less the weighted mean of all, as differences: one map alone has nearly none.
      value = mode == FusionMode::kFast ? sums[i] * eps : 0.0;
      for (int j = 0; j < count; ++j) {
        value += fusion.factor[j] * (sums[i] - sums[j]);
      }
      value = mode == FusionMode::kSoftmax ? value * fusion.factor[i]
              : weights[i] <= 0            ? 0
                                           : value / total / total;
    }
    grad[i] = static_cast<T>(value);
  }
}

template <FusionActivation Activation, typename T>
FOCALOPS_HOST_DEVICE T activate(T x) {
  if constexpr (Activation == FusionActivation::kSilu) {
    return x / (1 + exponential(-x));
  } else if constexpr (Activation == FusionActivation::kRelu6) {
    return x < 0 ? T(0) : x > 6 ? T(6) : x;
  } else {
    return x;
  }
}

template <FusionActivation Activation, typename T>
FOCALOPS_HOST_DEVICE T activation_derivative(T x) {
  if constexpr (Activation == FusionActivation::kSilu) {
    const T sigmoid = 1 / (1 + exponential(-x));
    return sigmoid * (1 + x * (1 - sigmoid));
  } else if constexpr (Activation == FusionActivation::kRelu6) {
    return x <= 0 || x >= 6 ? T(0) : T(1);
  } else {
    return T(1);
  }
}

template <typename F>
void dispatch_activation(int64_t activation, F&& f) {
  switch (static_cast<FusionActivation>(activation)) {
    case FusionActivation::kNone:
      return f(std::integral_constant<FusionActivation, FusionActivation::kNone>{});
    case FusionActivation::kSilu:
      return f(std::integral_constant<FusionActivation, FusionActivation::kSilu>{});
    default:
      return f(std::integral_constant<FusionActivation, FusionActivation::kRelu6>{});
  }
}

}  // namespace focalops
