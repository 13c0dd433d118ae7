// The losses of rows: class indices, and what else a row may have, a score of its true class, a
// weight, weights of the columns, smoothed targets. First the formulas, each a struct as in
// focal.h, then the table of the family, from which checks and kernels of both backends take all
// that they know of a member.
#pragma once

#include <string>
#include <type_traits>
#include <vector>

#include "focal.h"

namespace focalops {

namespace detail {

// The losses below are made of BCE(x, t), its derivative p - t and, with p = sigmoid(x), p (1 - p).
template <typename T>
struct CrossEntropy {
  T loss;
  T error;   // p - t
  T spread;  // p (1 - p)

  FOCALOPS_HOST_DEVICE CrossEntropy(T x, T t) {
    const T magnitude = std::fabs(x);
    const T v = x < 0 ? t : 1 - t;
    const T e = exp_nonpositive(-magnitude);
    const T r = reciprocal(1 + e);
    const T er = e * r;
    loss = (v > 0 ? v * magnitude : T(0)) + log1p_unit(e);
    error = x < 0 ? er - v : v - er;
    spread = er * r;
  }
};

template <typename T>
FOCALOPS_HOST_DEVICE T log_sigmoid(T x) {
  return (x < 0 ? x : T(0)) - log1p_unit(exp_nonpositive(-std::fabs(x)));
}

}  // namespace detail

// Quality focal loss (Li et al., "Generalized Focal Loss", 2020): |y - p|^gamma BCE(x, y), y =
// score for the true class, 0 for the others.
template <typename T, int Gamma>
struct QualityFocalLoss {
  FocalLoss<T, Gamma> focal;  // alpha < 0

  FOCALOPS_HOST_DEVICE LossAndGrad<T> negative(T x) const { return focal.hard(x, T(1)); }

  FOCALOPS_HOST_DEVICE LossAndGrad<T> positive(T x, T score) const {
    const detail::CrossEntropy<T> cross_entropy(x, score);
    const T d = std::fabs(cross_entropy.error);
    const T least = detail::smallest_normal(T()), most = detail::largest(T());
    const T modulation = detail::modulate<Gamma>(d, logarithm(d), focal.gamma);
    const T finite_loss = cross_entropy.loss > most ? most : cross_entropy.loss;
    const T slope = focal.gamma * modulation / (d < least ? least : d) * cross_entropy.spread;
    const T grad = modulation * d + slope * finite_loss;
    return {modulation * cross_entropy.loss, cross_entropy.error < 0 ? -grad : grad};
  }
};

// Linear between the losses of a positive and of a negative (Li et al., "Learning from Noisy
// Anchors for One-stage Object Detection", 2020): score FL+ + (1 - score) FL- for the true class.
template <typename T, int Gamma>
struct SoftFocalLoss {
  FocalLoss<T, Gamma> focal;

  FOCALOPS_HOST_DEVICE LossAndGrad<T> negative(T x) const { return focal.negative(x); }

  FOCALOPS_HOST_DEVICE LossAndGrad<T> positive(T x, T score) const {
    const LossAndGrad<T> as_positive = focal.positive(x, T(1)), as_negative = focal.negative(x);
    // A loss that does not count may be infinite.
    return {(score == 0 ? T(0) : score * as_positive.loss) +
                (score == 1 ? T(0) : (1 - score) * as_negative.loss),
            score * as_positive.grad + (1 - score) * as_negative.grad};
  }
};

// The negatives of the varifocal loss: alpha p^gamma BCE(x, 0).
template <typename T, int Gamma>
struct VarifocalNegatives {
  FocalLoss<T, Gamma> focal;
  T alpha;

  FOCALOPS_HOST_DEVICE LossAndGrad<T> negative(T x) const { return focal.hard(x, alpha); }
};

// Matchability-aware loss (Huang et al., "DEIM", 2024): BCE(x, score^gamma) for the true class,
// alpha p^gamma BCE(x, 0) for the others, whose weight p^gamma is a constant to the gradient.
template <typename T>
struct MatchabilityAwareLoss {
  T alpha;
  T gamma;

  FOCALOPS_HOST_DEVICE LossAndGrad<T> negative(T x) const {
    const T e = detail::exp_nonpositive(-std::fabs(x));
    const T r = detail::reciprocal(1 + e);
    const T l = detail::log1p_unit(e);
    const T p = x < 0 ? e * r : r;
    const T scale = alpha * detail::modulate<kAnyGamma>(p, (x < 0 ? x : T(0)) - l, gamma);
    const T softplus = (x < 0 ? T(0) : x) + l, most = detail::largest(T());
    // Where alpha is 0 the limit of 0 * inf is 0.
    const T counted = alpha == 0 && softplus > most ? most : softplus;
    return {scale * counted, scale * p};
  }

  FOCALOPS_HOST_DEVICE LossAndGrad<T> positive(T x, T score) const {
    const T t = detail::modulate<kAnyGamma>(score, logarithm(score), gamma);
    const detail::CrossEntropy<T> cross_entropy(x, t);
    return {cross_entropy.loss, cross_entropy.error};
  }
};

// Varifocal loss (Zhang et al., "VarifocalNet", 2021): score BCE(x, score) for the true class of a
// score > 0, and for all else its negatives, or those of the matchability-aware loss, whose weight
// p^gamma is a constant to the gradient.
template <typename T, typename Negatives>
struct VarifocalLoss {
  Negatives negatives;
  bool iou_weighted;

  FOCALOPS_HOST_DEVICE LossAndGrad<T> negative(T x) const { return negatives.negative(x); }

  FOCALOPS_HOST_DEVICE LossAndGrad<T> positive(T x, T score) const {
    if (score <= 0) {
      return negative(x);
    }
    const detail::CrossEntropy<T> cross_entropy(x, score);
    const T weight = iou_weighted ? score : T(1);
    return {weight * cross_entropy.loss, weight * cross_entropy.error};
  }
};

// IoU-aware BCE (Cai et al., "Align-DETR", 2023): BCE(x, t) with t = max(p^alpha score^(1 - alpha),
// 0.01), a constant to the gradient, for the true class, p^gamma BCE(x, 0) for the others.
template <typename T, int Gamma>
struct IouAwareCrossEntropy {
  FocalLoss<T, Gamma> focal;  // alpha < 0
  T alpha;

  FOCALOPS_HOST_DEVICE LossAndGrad<T> negative(T x) const { return focal.hard(x, T(1)); }

  FOCALOPS_HOST_DEVICE LossAndGrad<T> positive(T x, T score) const {
    const T of_p = detail::modulate<kAnyGamma>(T(0), detail::log_sigmoid(x), alpha);
    const T of_score = detail::modulate<kAnyGamma>(score, logarithm(score), 1 - alpha);
    const T given = of_p * of_score, least = T(0.01);
    const detail::CrossEntropy<T> cross_entropy(x, given < least ? least : given);
    return {cross_entropy.loss, cross_entropy.error};
  }
};

// The softmax focal loss of a row, -alpha q^gamma log(p), where p is the probability of the true
// class and q = 1 - p that of all others.
template <typename T>
struct SoftmaxFocalLoss {
  T alpha;  // 1 where there is none
  T gamma;

  struct Value {
    T loss;
    T grad_true;    // by the logit of the true class
    T grad_factor;  // by another one: times its exponential
  };

  // All logits are taken minus the largest of the row: x is that of the true class, others the sum
  // of the exponentials of the other classes. q comes from that sum, not from 1 - p, which would
  // leave an easy example no digits.
  FOCALOPS_HOST_DEVICE Value evaluate(T x, T others) const {
    const T e = detail::exp_nonpositive(x);
    const T inverse = 1 / (e + others);
    const T p = e * inverse, q = others * inverse;
    const T log_p = q < T(0.5) ? std::log1p(-q) : x + std::log(inverse);
    const T factor =
        alpha * (gamma == 2 ? q * q : detail::modulate<kAnyGamma>(q, std::log(q), gamma));
    // Where p = 0 the product p log(p) is 0 * inf; its limit is 0.
    const T least = -detail::largest(T());
    const T finite_log_p = log_p < least ? least : log_p;
    const T by_log_p = factor * (gamma * p * (q == 0 ? T(-1) : finite_log_p / q) - 1);
    return {-factor * log_p, by_log_p * q, -by_log_p * inverse};
  }
};

// A parameter takes numbers of one of these domains.
enum class Domain {
  kAny,          // a flag, or any size
  kNonNegative,  // >= 0
  kUnit,         // in [0, 1]
  kUnitOrNone,   // in [0, 1], or negative for none
};

struct Parameter {
  const char* name;
  Domain domain;
};

// A member of the family has the name of its function in Python, which begins each of its
// sentences; the options of that function that the formula takes, in their order; whether the
// classes of a row exclude each other (softmax: no background, one loss a row, kernels of its own);
// and dispatch(), which calls f with the formula.
namespace row_losses {

struct Sigmoid {
  static constexpr bool kIsSoftmax = false;
};

struct Focal : Sigmoid {
  static constexpr const char* kName = "sigmoid_focal_loss";
  static constexpr Parameter kParameters[] = {{"alpha", Domain::kUnitOrNone},
                                              {"gamma", Domain::kNonNegative},
                                              {"label_smoothing", Domain::kUnit}};

  template <typename T, typename F>
  static void dispatch(const std::vector<double>& p, F&& f) {
    dispatch_gamma(p[1], [&](auto gamma) {
      const FocalLoss<T, decltype(gamma)::value> focal{AlphaBalance<T>(p[0]), T(p[1])};
      if (p[2] == 0) {
        return f(focal);
      }
      return f(SmoothedFocalLoss<T, decltype(gamma)::value>{focal, T(p[2])});
    });
  }
};

struct SoftFocal : Sigmoid {
  static constexpr const char* kName = "soft_focal_loss";
  static constexpr Parameter kParameters[] = {{"alpha", Domain::kUnitOrNone},
                                              {"gamma", Domain::kNonNegative}};

  template <typename T, typename F>
  static void dispatch(const std::vector<double>& p, F&& f) {
    dispatch_gamma(p[1], [&](auto gamma) {
      f(SoftFocalLoss<T, decltype(gamma)::value>{{AlphaBalance<T>(p[0]), T(p[1])}});
    });
  }
};

struct Quality : Sigmoid {
  static constexpr const char* kName = "quality_focal_loss";
  static constexpr Parameter kParameters[] = {{"beta", Domain::kNonNegative}};

  template <typename T, typename F>
  static void dispatch(const std::vector<double>& p, F&& f) {
    dispatch_gamma(p[0], [&](auto gamma) {
      f(QualityFocalLoss<T, decltype(gamma)::value>{{AlphaBalance<T>(-1), T(p[0])}});
    });
  }
};

struct Varifocal : Sigmoid {
  static constexpr const char* kName = "varifocal_loss";
  static constexpr Parameter kParameters[] = {{"alpha", Domain::kNonNegative},
                                              {"gamma", Domain::kNonNegative},
                                              {"iou_weighted", Domain::kAny},
                                              {"detach_weight", Domain::kAny}};

  template <typename T, typename F>
  static void dispatch(const std::vector<double>& p, F&& f) {
    const bool iou_weighted = p[2] != 0;
    if (p[3] != 0) {
      return f(VarifocalLoss<T, MatchabilityAwareLoss<T>>{{T(p[0]), T(p[1])}, iou_weighted});
    }
    dispatch_gamma(p[1], [&](auto gamma) {
      using Negatives = VarifocalNegatives<T, decltype(gamma)::value>;
      f(VarifocalLoss<T, Negatives>{{{AlphaBalance<T>(-1), T(p[1])}, T(p[0])}, iou_weighted});
    });
  }
};

struct MatchabilityAware : Sigmoid {
  static constexpr const char* kName = "matchability_aware_loss";
  static constexpr Parameter kParameters[] = {{"gamma", Domain::kNonNegative},
                                              {"alpha", Domain::kNonNegative}};

  template <typename T, typename F>
  static void dispatch(const std::vector<double>& p, F&& f) {
    f(MatchabilityAwareLoss<T>{T(p[1]), T(p[0])});
  }
};

struct IouAware : Sigmoid {
  static constexpr const char* kName = "ia_bce_loss";
  static constexpr Parameter kParameters[] = {{"alpha", Domain::kUnit},
                                              {"gamma", Domain::kNonNegative}};

  template <typename T, typename F>
  static void dispatch(const std::vector<double>& p, F&& f) {
    dispatch_gamma(p[1], [&](auto gamma) {
      f(IouAwareCrossEntropy<T, decltype(gamma)::value>{{AlphaBalance<T>(-1), T(p[1])}, T(p[0])});
    });
  }
};

struct SoftmaxFocal {
  static constexpr bool kIsSoftmax = true;
  static constexpr const char* kName = "softmax_focal_loss";
  static constexpr Parameter kParameters[] = {{"alpha", Domain::kAny},
                                              {"gamma", Domain::kNonNegative}};

  template <typename T, typename F>
  static void dispatch(const std::vector<double>& p, F&& f) {
    f(SoftmaxFocalLoss<T>{T(p[0] < 0 ? 1 : p[0]), T(p[1])});
  }
};

template <typename... Losses>
struct Table {
  // Calls f with the member of that name; says whether there is one.
  template <typename F>
  static bool find(const std::string& name, F&& f) {
    return ((name == Losses::kName && (f(Losses{}), true)) || ...);
  }

  static std::string names() {  // 'a', 'b', 'c'
    std::string list;
    ((list += (list.empty() ? "'" : ", '") + std::string(Losses::kName) + "'"), ...);
    return list;
  }
};

using All = Table<Focal, SoftFocal, Quality, Varifocal, MatchabilityAware, IouAware, SoftmaxFocal>;

}  // namespace row_losses

}  // namespace focalops
