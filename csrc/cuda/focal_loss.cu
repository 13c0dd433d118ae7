// Sigmoid focal loss on CUDA: the logits are read once, 16 bytes at a time, and the loss or the
// gradient is written once.
//
// A block takes chunks of kThreads x kUnroll vectors, strided by the grid; a thread's vectors in a
// chunk lie kThreads vectors apart, so that a warp's access is contiguous, and all are loaded
// before the first is used. K need not be a multiple of anything: a vector knows the row and column
// of its first logit, one division by multiplication, and from the targets of the rows it touches
// makes three bit masks (positive, ignored, invalid). They are almost always empty, and then every
// logit of the vector is the same formula of a negative.
//
// Bytes moved, s = size of the logits: loss 2s, loss summed 1s, loss summed with its gradient 2s;
// class-index targets add 4 or 8 bytes a row, dense ones their own size.
#include "../checks/focal_loss.h"
#include "focal_loss.cuh"

namespace focalops {
namespace {

template <typename scalar_t_, typename target_t>
struct DenseTargets {
  using scalar_t = scalar_t_;
  using T = compute_t<scalar_t>;
  static constexpr int N = kVectorSize<scalar_t>;
  static constexpr int kBlocks = 3;

  const target_t* targets;
  bool aligned;

  struct Chunk {};

  __device__ __forceinline__ Chunk begin_chunk(int64_t) const { return {}; }

  template <typename Loss>
  __device__ __forceinline__ Values<T, N> evaluate(const Chunk&, int64_t i, int64_t size, uint32_t,
                                                   const Vector<scalar_t, N>& logits,
                                                   const Loss& formula) const {
    const auto t = load_vector<N>(targets, i, size, aligned);
    Values<T, N> values;
#pragma unroll
    for (int j = 0; j < N; ++j) {
      const T target = static_cast<T>(t.data[j]);
      const T x = is_dense_target(target) ? static_cast<T>(logits.data[j]) : quiet_nan<T>();
      const auto value = formula.soft(x, target);
      values.loss[j] = value.loss;
      values.grad[j] = value.grad;
    }
    return values;
  }
};

// ---- what becomes of the values -----------------------------------------------------------------

template <typename scalar_t>
struct StoreLoss {
  using T = compute_t<scalar_t>;
  static constexpr int N = kVectorSize<scalar_t>;

  scalar_t* loss;

  __device__ __forceinline__ void take(const Values<T, N>& values, int64_t i, int64_t size) {
    Vector<scalar_t, N> out;
#pragma unroll
    for (int j = 0; j < N; ++j) {
      out.data[j] = static_cast<scalar_t>(values.loss[j]);
    }
    store_vector(loss, i, size, true, out);
  }

  __device__ __forceinline__ void begin() {}
  __device__ __forceinline__ void finish() {}
};

template <typename scalar_t>
struct StoreGradient {
  using T = compute_t<scalar_t>;
  static constexpr int N = kVectorSize<scalar_t>;

  const scalar_t* grad_output;
  bool aligned;
  scalar_t* grad_inputs;

  __device__ __forceinline__ void take(const Values<T, N>& values, int64_t i, int64_t size) {
    const auto upstream = load_vector<N>(grad_output, i, size, aligned);
    Vector<scalar_t, N> out;
#pragma unroll
    for (int j = 0; j < N; ++j) {
      out.data[j] = static_cast<scalar_t>(static_cast<T>(upstream.data[j]) * values.grad[j]);
    }
    store_vector(grad_inputs, i, size, true, out);
  }

  __device__ __forceinline__ void begin() {}
  __device__ __forceinline__ void finish() {}
};

// Multiplies in place by a number on the device, or one for each of `count` slices of `size`
// elements. It is 1 in most training loops: then nothing is read or written. Blocks take the slices
// in turn.
template <typename scalar_t>
__global__ void __launch_bounds__(kThreads)
    scale_kernel(scalar_t* data, int64_t size, bool aligned, const compute_t<scalar_t>* scale,
                 int64_t count) {
  using T = compute_t<scalar_t>;
  constexpr int N = kVectorSize<scalar_t>;
  const int64_t block = blockIdx.x / count, slice = blockIdx.x - block * count;
  const T factor = scale[slice];
  if (factor == 1) {
    return;
  }
  data += slice * size;
  const int64_t stride = gridDim.x / count * kThreads * N;
  for (int64_t i = (block * kThreads + threadIdx.x) * N; i < size; i += stride) {
    auto vector = load_vector<N>(data, i, size, aligned);
#pragma unroll
    for (int j = 0; j < N; ++j) {
      vector.data[j] = static_cast<scalar_t>(factor * static_cast<T>(vector.data[j]));
    }
    store_vector(data, i, size, aligned, vector);
  }
}

// ---- host ---------------------------------------------------------------------------------------

// Calls f(targets) with the DenseTargets or ClassIndexTargets of these tensors, which are
// contiguous.
template <typename F>
void dispatch_targets(const Tensor& inputs, const Tensor& targets, int64_t ignore_index, F&& f) {
  dispatch_floating(inputs.scalar_type(), [&](auto tag) {
    using scalar_t = tag_t<decltype(tag)>;
    using T = compute_t<scalar_t>;
    const void* data = targets.const_data_ptr();
    if (!targets_are_dense(inputs, targets)) {
      const int64_t num_classes = inputs.size(inputs.dim() - 1);
      f(ClassIndexTargets<scalar_t>{{data, targets.scalar_type() == ScalarType::Long},
                                    targets.numel(),
                                    static_cast<int>(num_classes),
                                    ignore_index,
                                    FastDivisor(num_classes)});
    } else if (targets.scalar_type() == inputs.scalar_type()) {
      f(DenseTargets<scalar_t, scalar_t>{static_cast<const scalar_t*>(data), is_aligned(data)});
    } else {
      f(DenseTargets<scalar_t, T>{static_cast<const T*>(data), is_aligned(data)});
    }
  });
}

Tensor sigmoid_focal_loss_cuda(const Tensor& inputs_, const Tensor& targets_, double alpha,
                               double gamma, std::optional<double> beta, int64_t ignore_index) {
  const FocalParams params{alpha, gamma, beta};
  check_focal_loss(inputs_, targets_, params);
  const LaunchScope scope(inputs_);
  const Tensor inputs = torch::stable::contiguous(inputs_),
               targets = torch::stable::contiguous(targets_);
  Tensor loss = torch::stable::empty_like(inputs);
  if (inputs.numel() == 0) {
    return loss;
  }
  dispatch_targets(inputs, targets, ignore_index, [&](const auto& evaluator) {
    using scalar_t = typename std::decay_t<decltype(evaluator)>::scalar_t;
    auto* out = static_cast<scalar_t*>(loss.mutable_data_ptr());
    dispatch_focal_loss<compute_t<scalar_t>>(params, [&](const auto& formula) {
      launch_focal_loss(inputs, evaluator, formula, scope,
                        [&](int64_t) { return StoreLoss<scalar_t>{out}; });
    });
  });
  return loss;
}

Tensor sigmoid_focal_loss_backward_cuda(const Tensor& grad_output_, const Tensor& inputs_,
                                        const Tensor& targets_, double alpha, double gamma,
                                        std::optional<double> beta, int64_t ignore_index) {
  const FocalParams params{alpha, gamma, beta};
  check_focal_loss_backward(grad_output_, inputs_, targets_, params);
  const LaunchScope scope(inputs_);
  const Tensor inputs = torch::stable::contiguous(inputs_),
               targets = torch::stable::contiguous(targets_);
  const Tensor grad_output = torch::stable::contiguous(grad_output_);
  Tensor grad_inputs = torch::stable::empty_like(inputs);
  if (inputs.numel() == 0) {
    return grad_inputs;
  }
  dispatch_targets(inputs, targets, ignore_index, [&](const auto& evaluator) {
    using scalar_t = typename std::decay_t<decltype(evaluator)>::scalar_t;
    const auto* upstream = static_cast<const scalar_t*>(grad_output.const_data_ptr());
    auto* out = static_cast<scalar_t*>(grad_inputs.mutable_data_ptr());
    dispatch_focal_loss<compute_t<scalar_t>>(params, [&](const auto& formula) {
      launch_focal_loss(inputs, evaluator, formula, scope, [&](int64_t) {
        return StoreGradient<scalar_t>{upstream, is_aligned(upstream), out};
      });
    });
  });
  return grad_inputs;
}

Tensor focal_loss_sum(const Tensor& inputs, const Tensor& targets_, const FocalParams& params,
                      int64_t ignore_index, const std::optional<Tensor>& normalizer,
                      double min_normalizer, const std::optional<Tensor>& grad,
                      const LaunchScope& scope) {
  const Tensor targets = torch::stable::contiguous(targets_);
  Tensor loss = torch::stable::new_empty(inputs, {}, compute_dtype(inputs.scalar_type()));
  if (inputs.numel() == 0) {
    return torch::stable::zero_(loss);
  }
  dispatch_targets(inputs, targets, ignore_index, [&](const auto& evaluator) {
    using T = typename std::decay_t<decltype(evaluator)>::T;
    dispatch_focal_loss<T>(params, [&](const auto& formula) {
      launch_sum(inputs, evaluator, formula, normalizer, min_normalizer, grad, scope, loss);
    });
  });
  return loss;
}

std::tuple<Tensor, Tensor> sigmoid_focal_loss_sum_cuda(const Tensor& inputs_, const Tensor& targets,
                                                       double alpha, double gamma,
                                                       std::optional<double> beta,
                                                       int64_t ignore_index,
                                                       const std::optional<Tensor>& normalizer,
                                                       double min_normalizer, bool compute_grad) {
  const FocalParams params{alpha, gamma, beta};
  check_focal_loss_sum(inputs_, targets, params, normalizer);
  const LaunchScope scope(inputs_);
  const Tensor inputs = torch::stable::contiguous(inputs_);
  std::optional<Tensor> grad;
  if (compute_grad) {
    grad = torch::stable::empty_like(inputs);
  }
  Tensor loss = focal_loss_sum(inputs, targets, params, ignore_index, normalizer, min_normalizer,
                               grad, scope);
  return {loss, compute_grad ? *grad : torch::stable::new_empty(inputs, {0})};
}

Tensor sigmoid_focal_loss_sum_inplace_cuda(const Tensor& inputs, const Tensor& targets,
                                           double alpha, double gamma, std::optional<double> beta,
                                           int64_t ignore_index,
                                           const std::optional<Tensor>& normalizer,
                                           double min_normalizer) {
  const FocalParams params{alpha, gamma, beta};
  check_focal_loss_sum(inputs, targets, params, normalizer);
  check_overwritten_rows(focal_loss_name(params), inputs);
  return focal_loss_sum(inputs, targets, params, ignore_index, normalizer, min_normalizer, inputs,
                        LaunchScope(inputs));
}

void scale_cuda(const Tensor& tensor, const Tensor& scale) {
  check_scale(tensor, scale);
  if (tensor.numel() == 0) {
    return;
  }
  const LaunchScope scope(tensor);
  dispatch_floating(tensor.scalar_type(), [&](auto tag) {
    using scalar_t = tag_t<decltype(tag)>;
    auto* kernel = &scale_kernel<scalar_t>;
    auto* data = static_cast<scalar_t*>(tensor.mutable_data_ptr());
    const int64_t count = scale.numel(), size = tensor.numel() / count;
    const int64_t blocks = ceil_div(size, kThreads * kVectorSize<scalar_t>);
    const int64_t resident = resident_grid(kernel, kThreads, 0, blocks * count, scope);
    launch(kernel, ceil_div(resident, count) * count, kThreads, 0, scope.stream(), data, size,
           is_aligned(data) && (count == 1 || size % kVectorSize<scalar_t> == 0),
           static_cast<const compute_t<scalar_t>*>(scale.const_data_ptr()), count);
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(focalops, CUDA, m) {
  m.impl("sigmoid_focal_loss", TORCH_BOX(&sigmoid_focal_loss_cuda));
  m.impl("_sigmoid_focal_loss_backward", TORCH_BOX(&sigmoid_focal_loss_backward_cuda));
  m.impl("sigmoid_focal_loss_sum", TORCH_BOX(&sigmoid_focal_loss_sum_cuda));
  m.impl("_sigmoid_focal_loss_sum_", TORCH_BOX(&sigmoid_focal_loss_sum_inplace_cuda));
  m.impl("_scale_", TORCH_BOX(&scale_cuda));
}

}  // namespace focalops
