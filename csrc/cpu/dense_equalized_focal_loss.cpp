// The focal loss of a head's levels with a gamma of each class, and the sums of the gradients of
// each class, on the CPU. A bundle of pieces, whose number does not depend on the threads, has sums
// of its own, in float64; within it they are added up in the type of the computation for a while.
#include "../checks/dense_equalized_focal_loss.h"

#include "dense_head.h"

namespace focalops {
namespace {

constexpr int64_t kBundles = 128;     // at most
constexpr int64_t kLeastPeriod = 64;  // numbers that fill vectors

// A negative gradient raises its logit, a positive one lowers it. A NaN is in both sums.
template <typename T>
FOCALOPS_SIMD void add_by_sign(const T* grad, int64_t n, T* raised, T* lowered) {
  FOCALOPS_INDEPENDENT
  for (int64_t i = 0; i < n; ++i) {
    raised[i] += grad[i] > 0 ? T(0) : -grad[i];
    lowered[i] += grad[i] < 0 ? T(0) : grad[i];
  }
}

template <typename T>
FOCALOPS_SIMD void sum_by_sign(const T* grad, int64_t n, T* raised, T* lowered) {
  T negative = 0, positive = 0;
#pragma omp simd reduction(+ : negative, positive)
  for (int64_t i = 0; i < n; ++i) {
    negative += grad[i] > 0 ? T(0) : -grad[i];
    positive += grad[i] < 0 ? T(0) : grad[i];
  }
  *raised = negative;
  *lowered = positive;
}

template <typename T>
FOCALOPS_SIMD void add_to(const T* from, double* to, int64_t n) {
  FOCALOPS_INDEPENDENT
  for (int64_t i = 0; i < n; ++i) {
    to[i] += static_cast<double>(from[i]);
  }
}

// Of one bundle. Rows are added up as if they were as wide as a multiple of K, so that short ones
// fill vectors too.
template <typename T>
class GradientSums {
 public:
  GradientSums(int64_t num_classes, double* sums)
      : num_classes_(num_classes),
        period_((kLeastPeriod + num_classes - 1) / num_classes * num_classes),
        places_(2 * period_),
        sums_(sums) {}

  // n gradients; `begin` is counted from the level's first.
  void take(const HeadLevel& level, const T* grad, int64_t begin, int64_t n) {
    if (!level.has_rows) {
      T raised, lowered;
      sum_by_sign(grad, n, &raised, &lowered);
      const int64_t column = begin / level.positions % num_classes_;
      sums_[column] += raised;
      sums_[num_classes_ + column] += lowered;
      return;
    }
    int64_t at = begin % period_;
    for (int64_t i = 0; i < n; at = 0) {
      const int64_t count = std::min(n - i, period_ - at);
      add_by_sign(grad + i, count, &places_[at], &places_[period_ + at]);
      i += count;
    }
    filled_ += n;
    if (filled_ >= std::max(kLogitsPerChunk, 8 * period_)) {
      flush();
    }
  }

  void flush() {
    for (int64_t first = 0; filled_ > 0 && first < period_; first += num_classes_) {
      add_to(&places_[first], sums_, num_classes_);
      add_to(&places_[period_ + first], sums_ + num_classes_, num_classes_);
    }
    std::fill(places_.begin(), places_.end(), T(0));
    filled_ = 0;
  }

 private:
  int64_t num_classes_;
  int64_t period_;         // a multiple of K
  std::vector<T> places_;  // [2, period], since the last flush
  double* sums_;           // [2, K]
  int64_t filled_ = 0;     // logits since then
};

std::tuple<Tensor, Tensor, std::vector<Tensor>> dense_equalized_focal_loss_cpu(
    const std::vector<Tensor>& cls_logits, const Tensor& labels_, const Tensor& gamma_,
    double alpha, const std::optional<Tensor>& weight_, const std::optional<Tensor>& class_weight_,
    int64_t ignore_index, const std::optional<Tensor>& normalizer_, double min_normalizer,
    bool compute_grad) {
  const HeadShape shape = check_dense_equalized_focal_loss(cls_logits, labels_, gamma_, alpha,
                                                           weight_, class_weight_, normalizer_);
  const auto levels = head_levels(cls_logits, shape);
  const Tensor labels = torch::stable::contiguous(labels_);
  const Tensor gamma = torch::stable::contiguous(gamma_);
  const auto weight = contiguous(weight_), class_weight = contiguous(class_weight_),
             given = contiguous(normalizer_);
  const Tensor& like = levels[0].tensor;
  const int64_t num_classes = gamma.size(0);
  Tensor loss = torch::stable::new_empty(like, {}, compute_dtype(like.scalar_type()));
  Tensor gradient_sums = torch::stable::new_zeros(like, {2, num_classes}, ScalarType::Double);
  std::vector<Tensor> grads;
  for (size_t l = 0; compute_grad && l < levels.size(); ++l) {
    grads.push_back(new_like(levels[l].tensor));
  }
  const Cut cut(levels, shape, kLogitsPerChunk);
  const int64_t num_bundles = std::min(cut.num_pieces, kBundles);
  std::vector<double> losses(cut.num_pieces), of_bundles(num_bundles * 2 * num_classes);

  const auto run = [&](auto scalar_tag, auto index_tag) {
    using scalar_t = tag_t<decltype(scalar_tag)>;
    using index_t = tag_t<decltype(index_tag)>;
    using T = compute_t<scalar_t>;
    const auto normalizer = normalizer_of<T>(given, min_normalizer);
    DenseHead<scalar_t, index_t> head{levels,
                                      shape,
                                      cut,
                                      static_cast<const index_t*>(labels.const_data_ptr()),
                                      {data_of<T>(weight), class_weights_of<T>(class_weight)},
                                      ignore_index};
    std::vector<T> gammas(num_classes + kBlock);  // of a block from any column on
    for (size_t i = 0; num_classes > 0 && i < gammas.size(); ++i) {
      gammas[i] = static_cast<const T*>(gamma.const_data_ptr())[i % num_classes];
    }
    const FocalLossByClass<T> formula{AlphaBalance<T>(alpha), gammas.data()};
    torch::stable::parallel_for(0, num_bundles, 1, [&](int64_t bundle, int64_t end) {
      Block<T> block;
      for (; bundle < end; ++bundle) {
        GradientSums<T> sums(num_classes, &of_bundles[bundle * 2 * num_classes]);
        int64_t number = cut.num_pieces * bundle / num_bundles;
        const int64_t last = cut.num_pieces * (bundle + 1) / num_bundles;
        for (; number < last; ++number) {
          const Piece piece = piece_of(cut, number);
          const HeadLevel& level = levels[piece.level];
          const T divisor = normalizer.divisor(piece.image);
          const T scale = gradient_scale<scalar_t>(divisor);
          double sum = 0;
          head.template evaluate<true>(
              piece, formula, block, [&](int64_t begin, int64_t n, const auto& values) {
                sum += sum_of(values.loss, n);
                sums.take(level, values.grad, begin, n);
                if (compute_grad) {
                  auto* grad = static_cast<scalar_t*>(grads[piece.level].mutable_data_ptr());
                  scale_and_convert(values.grad, scale, grad + begin, n);
                }
              });
          losses[number] = sum / divisor;
        }
        sums.flush();
      }
    });
    head.invalid.check("dense_equalized_focal_loss", "labels", shape.classes, ignore_index);
    double sum = 0;
    for (const double of_piece : losses) {
      sum += of_piece;
    }
    *static_cast<T*>(loss.mutable_data_ptr()) = static_cast<T>(sum);
    for (int64_t bundle = 0; bundle < num_bundles; ++bundle) {
      add_to(&of_bundles[bundle * 2 * num_classes], data_of<double>(gradient_sums),
             2 * num_classes);
    }
  };
  dispatch_floating(like.scalar_type(), [&](auto scalar_tag) {
    dispatch_index(labels.scalar_type(), [&](auto index_tag) { run(scalar_tag, index_tag); });
  });
  return {loss, gradient_sums, grads};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(focalops, CPU, m) {
  m.impl("dense_equalized_focal_loss", TORCH_BOX(&dense_equalized_focal_loss_cpu));
}

}  // namespace focalops
