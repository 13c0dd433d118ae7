// The distribution focal loss on the CPU. Rows are lanes: the logits of some rows are laid out bin
// by bin in the L1 cache, where loops over the rows make exponentials, losses and gradients of
// them.
#include <algorithm>
#include <vector>

#include "../checks/distances.h"
#include "bins.h"
#include "memory.h"

namespace focalops {
namespace {

constexpr int64_t kLanes = 64;
constexpr int64_t kGrain = 16;  // blocks of as many rows

template <typename T>
struct RowLanes {
  alignas(64) T largest[kLanes], sum[kLanes], log_sum[kLanes], per_sum[kLanes];
};

template <typename T>
FOCALOPS_SIMD void logarithms(const T* x, int64_t n, T* out) {
  FOCALOPS_INDEPENDENT
  for (int64_t i = 0; i < n; ++i) {
    out[i] = logarithm(x[i]);
  }
}

template <typename T>
FOCALOPS_SIMD void multiply(T* x, const T* factor, int64_t n) {
  FOCALOPS_INDEPENDENT
  for (int64_t i = 0; i < n; ++i) {
    x[i] *= factor[i];
  }
}

std::tuple<Tensor, Tensor> distribution_focal_loss_cpu(const Tensor& inputs_,
                                                       const Tensor& targets_, bool compute_grad) {
  const int64_t bins = check_distribution_focal_loss(inputs_, targets_);
  const Tensor inputs = torch::stable::contiguous(inputs_);
  const Tensor targets = torch::stable::contiguous(targets_);
  const int64_t num_rows = targets.numel();
  Tensor losses = torch::stable::empty_like(targets);
  Tensor grad = compute_grad
                    ? on_huge_pages(torch::stable::empty_like(inputs), inputs.element_size())
                    : torch::stable::new_empty(inputs, {0});
  dispatch_floating(inputs.scalar_type(), [&](auto tag) {
    using scalar_t = tag_t<decltype(tag)>;
    using T = compute_t<scalar_t>;
    const auto* logits = static_cast<const scalar_t*>(inputs.const_data_ptr());
    const auto* target = static_cast<const T*>(targets.const_data_ptr());
    T* loss = data_of<T>(losses);
    scalar_t* out = compute_grad ? data_of<scalar_t>(grad) : nullptr;
    const int64_t blocks = (num_rows + kLanes - 1) / kLanes;
    torch::stable::parallel_for(0, blocks, kGrain, [&](int64_t block, int64_t last) {
      std::vector<T> x(bins * kLanes);
      RowLanes<T> rows;
      for (; block < last; ++block) {
        const int64_t first = block * kLanes, n = std::min(kLanes, num_rows - first);
        const scalar_t* from = logits + first * bins;
        std::fill_n(rows.largest, n, least_logit<T>());
        std::fill_n(rows.sum, n, T(0));
        for (int64_t bin = 0; bin < bins; ++bin) {
          lay_out_bin(from + bin, bins, n, x.data() + bin * kLanes, rows.largest);
        }
        for (int64_t bin = 0; bin < bins; ++bin) {
          add_exponentials(x.data() + bin * kLanes, rows.largest, n, rows.sum);
        }
        logarithms(rows.sum, n, rows.log_sum);
        for (int64_t i = 0; i < n; ++i) {
          const auto between = between_bins(target[first + i], static_cast<int>(bins));
          const scalar_t* row = from + i * bins;
          const T left = static_cast<T>(row[between.left]);
          const T right = static_cast<T>(row[between.left + 1]);
          loss[first + i] = between.loss(rows.log_sum[i] + (rows.largest[i] - left),
                                         rows.log_sum[i] + (rows.largest[i] - right));
          rows.per_sum[i] = 1 / rows.sum[i] + (between.share - between.share);  // NaN of a NaN
        }
        if (out == nullptr) {
          continue;
        }
        for (int64_t bin = 0; bin < bins; ++bin) {
          multiply(x.data() + bin * kLanes, rows.per_sum, n);
        }
        // Probabilities are the gradients of all but the two bins of the target.
        for (int64_t i = 0; i < n; ++i) {
          scalar_t* row = out + (first + i) * bins;
          const T* probability = x.data() + i;
          for (int64_t bin = 0; bin < bins; ++bin) {
            row[bin] = static_cast<scalar_t>(probability[bin * kLanes]);
          }
          const auto between = between_bins(target[first + i], static_cast<int>(bins));
          for (const int bin : {between.left, between.left + 1}) {
            row[bin] = static_cast<scalar_t>(between.gradient(bin, probability[bin * kLanes]));
          }
        }
      }
    });
  });
  return {losses, grad};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(focalops, CPU, m) {
  m.impl("distribution_focal_loss", TORCH_BOX(&distribution_focal_loss_cpu));
}

}  // namespace focalops
