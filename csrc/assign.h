// The options of the assigners.
#pragma once

#include <cstdint>
#include <vector>

#include "head_levels.h"
#include "math/assign.h"
#include "math/simota.h"
#include "rows.h"

namespace focalops {

enum class FcosRule { kTorchvision, kMmdet };

struct FcosOptions {
  const std::vector<int64_t>& level_sizes;  // points of each level
  const std::vector<double>& strides;
  const std::vector<double>& least;  // the range of each level
  const std::vector<double>& most;
  double center_radius;
  int64_t rule;  // of FcosRule
};

// Calls f with the rule's formulas.
template <typename F>
void dispatch_fcos(const FcosOptions& options, const F& f) {
  if (options.rule == static_cast<int64_t>(FcosRule::kTorchvision)) {
    return f(TorchvisionFcos{});
  }
  return f(MmdetFcos{});
}

template <typename T>
std::vector<FcosLevel<T>> fcos_levels(const FcosOptions& options) {
  std::vector<FcosLevel<T>> levels;
  for (size_t i = 0; i < options.level_sizes.size(); ++i) {
    levels.push_back({T(options.center_radius) * T(options.strides[i]), T(options.least[i]),
                      T(options.most[i])});
  }
  return levels;
}

enum class TaskRule { kUltralytics, kMmyolo, kTood };

constexpr int64_t kMaxTopk = 32;  // a lane has one

struct TaskAlignedOptions {
  int64_t topk;
  double alpha, beta;
  int64_t rule;        // of TaskRule
  int64_t overlap;     // of IouKind, plain or complete
  double min_side;     // negative: none
  int64_t final_topk;  // 0: none
  double eps;

  TaskAligned formula() const {
    const auto of = static_cast<TaskRule>(rule);
    const bool is_tood = of == TaskRule::kTood;
    return {Power(alpha),
            Power(beta),
            is_tood ? 0.01f : 1e-9f,
            static_cast<float>(min_side),
            static_cast<float>(eps),
            is_tood,
            is_tood                   ? Rivals::kTakers
            : of == TaskRule::kMmyolo ? Rivals::kAll
                                      : Rivals::kHolders};
  }
};

// Calls f with an integral constant of the IouKind.
template <typename F>
void dispatch_task_overlap(int64_t overlap, const F& f) {
  if (overlap == static_cast<int64_t>(IouKind::kPlain)) {
    return f(std::integral_constant<IouKind, IouKind::kPlain>{});
  }
  return f(std::integral_constant<IouKind, IouKind::kComplete>{});
}

template <IouKind Kind>
FOCALOPS_HOST_DEVICE IouFormula<Kind, float> task_overlap() {
  const float eps = Kind == IouKind::kPlain ? 0.0f : 1e-7f;
  return {eps, eps};
}

// The scores of the classes, wherever and in whatever dtype they lie: told apart at run time, since
// few of them are read.
struct ClassScores {
  const void* data = nullptr;
  ScalarType dtype = ScalarType::Float;
  int64_t of_image = 0, of_anchor = 0, of_class = 0;  // strides
  int64_t num_classes = 1;

  ClassScores() = default;
  explicit ClassScores(const Tensor& scores)  // (B, N, K), or (B, N) of one class
      : data(scores.const_data_ptr()),
        dtype(scores.scalar_type()),
        of_image(scores.stride(0)),
        of_anchor(scores.stride(1)),
        of_class(scores.dim() == 3 ? scores.stride(2) : 0),
        num_classes(scores.dim() == 3 ? scores.size(2) : 1) {}

  FOCALOPS_HOST_DEVICE bool has(int64_t label) const { return label >= 0 && label < num_classes; }

  FOCALOPS_HOST_DEVICE int64_t index(int64_t image, int64_t anchor, int64_t label) const {
    return image * of_image + anchor * of_anchor + label * of_class;
  }

  FOCALOPS_HOST_DEVICE float at(int64_t image, int64_t anchor, int64_t label) const {
    const int64_t i = index(image, anchor, label);
    switch (dtype) {
      case ScalarType::Half:
        return static_cast<float>(static_cast<const Half*>(data)[i]);
      case ScalarType::BFloat16:
        return static_cast<float>(static_cast<const BFloat16*>(data)[i]);
      case ScalarType::Double:
        return static_cast<float>(static_cast<const double*>(data)[i]);
      default:
        return static_cast<const float*>(data)[i];
    }
  }

  // All classes of an anchor.
  void read(int64_t image, int64_t anchor, float* row) const {
    if (dtype == ScalarType::Float) {
      const float* logits = static_cast<const float*>(data) + index(image, anchor, 0);
      for (int64_t k = 0; k < num_classes; ++k) {
        row[k] = logits[k * of_class];
      }
      return;
    }
    for (int64_t k = 0; k < num_classes; ++k) {
      row[k] = at(image, anchor, k);
    }
  }

  void prefetch(int64_t image, int64_t anchor, int64_t label) const {
    const int64_t size = dtype == ScalarType::Double ? 8 : dtype == ScalarType::Float ? 4 : 2;
    __builtin_prefetch(static_cast<const char*>(data) + index(image, anchor, label) * size);
  }
};

// ---- ATSS

enum class AtssRule { kAtss, kMmyolo };

constexpr int64_t kMaxAtssTopk = 128;

struct AtssOptions {
  const std::vector<int64_t>& level_sizes;  // anchors of each level
  int64_t topk;
  int64_t rule;  // of AtssRule
  bool at_least_one;
};

// Calls f with the rule's formulas.
template <typename F>
void dispatch_atss(const AtssOptions& options, const F& f) {
  if (options.rule == static_cast<int64_t>(AtssRule::kAtss)) {
    return f(MmdetAtss{});
  }
  return f(MmyoloAtss{});
}

// ---- SimOTA

struct SimotaOptions {
  int64_t rule;  // of SimotaRule
  double center_radius;
  int64_t candidates;
};

// Calls f with the rule's formulas.
template <typename F>
void dispatch_simota(const SimotaOptions& options, const F& f) {
  const auto radius = static_cast<float>(options.center_radius);
  switch (static_cast<SimotaRule>(options.rule)) {
    case SimotaRule::kSimota:
      return f(Simota<SimotaRule::kSimota>{radius});
    case SimotaRule::kYolox:
      return f(Simota<SimotaRule::kYolox>{radius});
    default:
      return f(Simota<SimotaRule::kRtmdet>{radius});
  }
}

}  // namespace focalops
