// The focal losses of one logit, and their derivatives (Lin et al., "Focal Loss for Dense Object
// Detection", 2017).
//
// Everything comes from e = exp(-|x|): one exp, one log1p, one reciprocal, finite for every finite
// logit x. A loss is a struct that says what a row of logits with at most one true class costs:
// `negative(x)` for every other logit, `positive(x, score)` for that of the true class, `score`
// being the IoU or quality of the box, where the loss looks at it. FL and FL* also have `hard`,
// both in one formula of s = -x for a positive and s = x for a negative element, and `soft` for a
// target t in [0, 1], which equals `hard` where t is 0 or 1.
#pragma once

#include <cfloat>
#include <cmath>
#include <optional>
#include <type_traits>

#include "elementary.h"
#include "host_device.h"

namespace focalops {

template <typename T>
struct LossAndGrad {
  T loss;
  T grad;
};

// What the formulas are compiled for beside gamma = 2.
constexpr int kAnyGamma = -1;
constexpr int kThreeHalves = -2;  // the CPU's alone: the exponential is an instruction on a GPU

namespace detail {

FOCALOPS_HOST_DEVICE double exp_nonpositive(double x) { return exp(x); }
FOCALOPS_HOST_DEVICE double log1p_unit(double e) { return log1p(e); }
FOCALOPS_HOST_DEVICE double reciprocal(double x) { return 1 / x; }
FOCALOPS_HOST_DEVICE double smallest_normal(double) { return DBL_MIN; }
FOCALOPS_HOST_DEVICE double largest(double) { return DBL_MAX; }
FOCALOPS_HOST_DEVICE float smallest_normal(float) { return FLT_MIN; }
FOCALOPS_HOST_DEVICE float largest(float) { return FLT_MAX; }

// exp(x) for x <= 0. The relative error grows as |x| 2^-24: that of the rounded product x log2(e).
FOCALOPS_HOST_DEVICE float exp_nonpositive(float x) {
#ifdef __CUDA_ARCH__
  return __expf(x);
#else
  // The power of -88 is 2^-127, which has no exponent: power_of_two gives 0. A NaN stays.
  const Exponential e = exponential_parts(-88.0f > x ? -88.0f : x);
  return e.factor * power_of_two(e.power);
#endif
}

// log(1 + e) for 0 <= e <= 1: e times a minimax polynomial of degree 8 (relative error 2^-25 before
// rounding). Through log(1 + e) a small e, which is where the loss of an easy example lives, would
// lose all its digits.
FOCALOPS_HOST_DEVICE float log1p_unit(float e) {
  const float e2 = e * e, e4 = e2 * e2;
  const float low = (0.3331909775733948f * e - 0.4999949336051941f) +
                    e2 * (0.19106005132198334f * e - 0.2484298199415207f);
  const float high = (0.07822591811418533f * e - 0.13663242757320404f) +
                     e2 * (0.005232689902186394f * e - 0.02950521931052208f);
  const float p = (high * e4 + low) * e + 0.9999999403953552f;
  return p * e;
}

FOCALOPS_HOST_DEVICE float reciprocal(float x) {
#ifdef __CUDA_ARCH__
  return __fdividef(1.0f, x);  // within 2 ulp for the arguments here, which lie in [2^-126, 2]
#else
  return 1.0f / x;
#endif
}

// q^gamma, log_q = log(q): a product for the default, gamma = 2, a compile-time constant; a square
// root for EfficientDet's, 1.5; an exponential for any other.
template <int Gamma, typename T>
FOCALOPS_HOST_DEVICE T modulate(T q, T log_q, T gamma) {
  if constexpr (Gamma == 2) {
    return q * q;
  } else if constexpr (Gamma == kThreeHalves) {
    return q * std::sqrt(q);
  } else {
    const T most = largest(T());
    return exp_nonpositive(gamma * (log_q < -most ? -most : log_q));  // 0 * -inf would be a NaN
  }
}

}  // namespace detail

template <typename T>
struct AlphaBalance {
  T positive;  // both are 1 where alpha < 0
  T negative;

  explicit AlphaBalance(double alpha)
      : positive(T(alpha < 0 ? 1 : alpha)), negative(T(alpha < 0 ? 1 : 1 - alpha)) {}

  FOCALOPS_HOST_DEVICE T at(T t) const { return positive * t + negative * (1 - t); }
};

// With q = sigmoid(s) = 1 - p_t and a = alpha_t:
//     L(s)  = a q^gamma softplus(s)
//     dL/ds = a q^gamma (gamma (1 - q) softplus(s) + q)
template <typename T, int Gamma>
struct FocalLoss {
  AlphaBalance<T> alpha;
  T gamma;

  FOCALOPS_HOST_DEVICE LossAndGrad<T> hard(T s, T alpha_t) const {
    const T e = detail::exp_nonpositive(-std::fabs(s));
    const T r = detail::reciprocal(1 + e);
    const T l = detail::log1p_unit(e);
    const T er = e * r;
    const T q = s < 0 ? er : r;
    const T one_minus_q = s < 0 ? r : er;
    const T softplus = (s < 0 ? T(0) : s) + l;
    const T scale = alpha_t * detail::modulate<Gamma>(q, (s < 0 ? s : T(0)) - l, gamma);
    // At s = inf the product (1 - q) softplus is 0 * inf; its limit is 0.
    const T most = detail::largest(T());
    const T finite_softplus = softplus > most ? most : softplus;
    // So is that of the loss where alpha_t is 0.
    const T counted = alpha_t == 0 ? finite_softplus : softplus;
    return {scale * counted, scale * (gamma * one_minus_q * finite_softplus + q)};
  }

  // 1 - p_t = t (1 - p) + (1 - t) p, loss alpha_t (1 - p_t)^gamma BCE(x, t), alpha_t linear in t,
  // as torchvision means it. Mirrored so that |x| is the only logit: u = t and v = 1 - t for x >=
  // 0, the reverse below.
  FOCALOPS_HOST_DEVICE LossAndGrad<T> soft(T x, T t) const {
    const T magnitude = std::fabs(x);
    const T u = x < 0 ? 1 - t : t;
    const T v = x < 0 ? t : 1 - t;
    const T e = detail::exp_nonpositive(-magnitude);
    const T r = detail::reciprocal(1 + e);
    const T l = detail::log1p_unit(e);
    const T q_over_r = u * e + v;
    // v = 0 where the element is classified rightly with full confidence; v |x| is 0 there for an
    // infinite x too.
    const T cross_entropy = (v > 0 ? v * magnitude : T(0)) + l;
    T log_q = 0;
    if constexpr (Gamma == kAnyGamma) {
      // Where u = 1, q_over_r is e, whose logarithm is known also where e has underflowed.
      log_q = (v > 0 ? logarithm(q_over_r) : -magnitude) - l;
    }
    const T alpha_t = alpha.at(t);
    const T scale = alpha_t * detail::modulate<Gamma>(q_over_r * r, log_q, gamma);
    const T least = detail::smallest_normal(T()), most = detail::largest(T());
    const T finite_cross_entropy = cross_entropy > most ? most : cross_entropy;
    // p (1 - p) / q; the denominator underflows only together with e.
    const T slope = e * r * detail::reciprocal(q_over_r < least ? least : q_over_r);
    const T grad = scale * (gamma * slope * (1 - 2 * u) * finite_cross_entropy + r * (v - u * e));
    const T counted = alpha_t == 0 ? finite_cross_entropy : cross_entropy;
    return {scale * counted, x < 0 ? -grad : grad};
  }

  FOCALOPS_HOST_DEVICE LossAndGrad<T> negative(T x) const { return hard(x, alpha.negative); }

  FOCALOPS_HOST_DEVICE LossAndGrad<T> positive(T x, T) const {
    const LossAndGrad<T> value = hard(-x, alpha.positive);
    return {value.loss, -value.grad};
  }
};

// The loss of the logits of a class: of most losses the same for all.
template <typename Loss>
FOCALOPS_HOST_DEVICE const Loss& of_class(const Loss& formula, int64_t) {
  return formula;
}

// The focal loss whose gamma is of the class (Li et al., "Equalized Focal Loss for Dense
// Long-Tailed Object Detection", 2022).
template <typename T>
struct FocalLossByClass {
  AlphaBalance<T> alpha;
  const T* gamma;  // [K]
};

template <typename T>
FOCALOPS_HOST_DEVICE FocalLoss<T, kAnyGamma> of_class(const FocalLossByClass<T>& formula,
                                                      int64_t column) {
  return {formula.alpha, formula.gamma[column]};
}

// FL* of the paper's appendix, in x_t = -s: L = -a log(sigmoid(gamma x_t + beta)) / gamma. A soft
// target weights x_t = (2 t - 1) x, as in fvcore.
template <typename T>
struct FocalLossStar {
  AlphaBalance<T> alpha;
  T gamma;
  T beta;

  FOCALOPS_HOST_DEVICE LossAndGrad<T> hard(T s, T alpha_t) const {
    const T y = gamma * s - beta;
    const T e = detail::exp_nonpositive(-std::fabs(y));
    const T r = detail::reciprocal(1 + e);
    const T softplus = (y < 0 ? T(0) : y) + detail::log1p_unit(e), most = detail::largest(T());
    // Where alpha_t is 0 the limit of 0 * inf is 0.
    const T counted = alpha_t == 0 && softplus > most ? most : softplus;
    return {alpha_t * counted / gamma, alpha_t * (y < 0 ? e * r : r)};
  }

  FOCALOPS_HOST_DEVICE LossAndGrad<T> soft(T x, T t) const {
    const T sign = 1 - 2 * t;
    // At t = 0.5 the logit does not count, not even an infinite one.
    const LossAndGrad<T> value = hard(sign == 0 ? T(0) : sign * x, alpha.at(t));
    return {value.loss, sign * value.grad};
  }

  FOCALOPS_HOST_DEVICE LossAndGrad<T> negative(T x) const { return hard(x, alpha.negative); }

  FOCALOPS_HOST_DEVICE LossAndGrad<T> positive(T x, T) const {
    const LossAndGrad<T> value = hard(-x, alpha.positive);
    return {value.loss, -value.grad};
  }
};

// The focal loss whose cross entropy alone has the targets t (1 - smoothing) + smoothing / 2: each
// logit is a question of two answers. alpha_t and q^gamma look at the target itself, as in
// EfficientDet. With c = softplus(s) - smoothing / 2 s:
//     L(s)  = a q^gamma c
//     dL/ds = a q^gamma (gamma (1 - q) c + q - smoothing / 2)
template <typename T, int Gamma>
struct SmoothedFocalLoss {
  FocalLoss<T, Gamma> focal;
  T smoothing;

  FOCALOPS_HOST_DEVICE LossAndGrad<T> hard(T s, T alpha_t) const {
    const T half = smoothing / 2, magnitude = std::fabs(s);
    const T e = detail::exp_nonpositive(-magnitude);
    const T r = detail::reciprocal(1 + e);
    const T l = detail::log1p_unit(e);
    const T er = e * r;
    const T q = s < 0 ? er : r;
    const T one_minus_q = s < 0 ? r : er;
    const T slope = s < 0 ? half : 1 - half;  // of the cross entropy where |s| is large
    const T cross_entropy = (slope > 0 ? slope * magnitude : T(0)) + l;
    const T log_q = (s < 0 ? s : T(0)) - l;
    const T scale = alpha_t * detail::modulate<Gamma>(q, log_q, focal.gamma);
    // The products are 0 * inf at infinity; their limits are 0.
    const T most = detail::largest(T());
    const T counted = scale == 0 ? T(0) : cross_entropy;
    const T finite_counted = counted > most ? most : counted;
    return {scale * counted, scale * (focal.gamma * one_minus_q * finite_counted + q - half)};
  }

  FOCALOPS_HOST_DEVICE LossAndGrad<T> negative(T x) const { return hard(x, focal.alpha.negative); }

  FOCALOPS_HOST_DEVICE LossAndGrad<T> positive(T x, T) const {
    const LossAndGrad<T> value = hard(-x, focal.alpha.positive);
    return {value.loss, -value.grad};
  }
};

// Says whether a dense target is one: a rounding of half precision beyond [0, 1] is, a NaN is not.
template <typename T>
FOCALOPS_HOST_DEVICE bool is_dense_target(T t) {
  return t >= T(-0.01) && t <= T(1.01);
}

// The user passes these; the loss is FL, or FL* where there is a beta.
struct FocalParams {
  double alpha;
  double gamma;
  std::optional<double> beta;
};

inline const char* focal_loss_name(const FocalParams& params) {
  return params.beta.has_value() ? "sigmoid_focal_loss_star" : "sigmoid_focal_loss";
}

// Calls f with the number of gamma that the formulas are compiled for.
template <typename F>
void dispatch_gamma(double gamma, F&& f) {
  if (gamma == 2) {
    return f(std::integral_constant<int, 2>{});
  }
  return f(std::integral_constant<int, kAnyGamma>{});
}

// Calls f with the loss.
template <typename T, typename F>
void dispatch_focal_loss(double alpha, double gamma, F&& f) {
  dispatch_gamma(gamma, [&](auto gamma_tag) {
    f(FocalLoss<T, decltype(gamma_tag)::value>{AlphaBalance<T>(alpha), T(gamma)});
  });
}

template <typename T, typename F>
void dispatch_focal_loss(const FocalParams& params, F&& f) {
  if (params.beta.has_value()) {
    return f(FocalLossStar<T>{AlphaBalance<T>(params.alpha), T(params.gamma), T(*params.beta)});
  }
  dispatch_focal_loss<T>(params.alpha, params.gamma, f);
}

}  // namespace focalops
