// The IoU family, as matrices and as losses of pairs, and box coding on CUDA.
//
// box_iou: a thread keeps 16 bytes' worth of columns, their boxes and areas, in registers and walks
// down some rows, so that a row's stores are contiguous across the threads. 4 N M bytes are written
// (8 N M for float64), and the boxes are read once a tile: nothing else moves.
//
// Its gradient sums over the columns: a block owns 32 rows, a thread one of them and every eighth
// column. The upstream gradient is read once, in tiles through shared memory, because it comes as
// often transposed as not. Rows with very many columns are split among blocks at fixed places and
// added up in a second kernel, in a fixed order.
//
// Losses of pairs, box coding: a thread for each; every row of 4 is one access. A loss moves 36
// bytes a pair, its gradient 52 for each set that wants one.
#include "../checks/boxes.h"
#include "../math/box.h"
#include "../rows.h"
#include "launch.cuh"

namespace focalops {
namespace {

constexpr int kThreads = 256;

// ---- pairwise IoU -------------------------------------------------------------------------------

constexpr int kRowsPerThread = 16;

struct Matrix {
  int64_t num_rows, num_columns;
  int lanes;  // threads side by side, each with N columns: a power of two, few where there are few
              // columns
  int64_t row_tiles, column_tiles;
};

// The j-th column of a thread. Where rows begin at 16-byte boundaries its columns are neighbours
// and stored at once; elsewhere they lie `lanes` apart, so that each of its stores is contiguous
// across the threads.
template <int N, bool Vectorised>
__device__ __forceinline__ int64_t column_of(int64_t first, int lane, int lanes, int j) {
  return Vectorised ? first + lane * N + j : first + j * lanes + lane;
}

template <IouKind Kind, typename T, bool Vectorised>
__global__ void __launch_bounds__(kThreads, kMinBlocks<T>)
    box_iou_kernel(IouFormula<Kind, T> formula, Rows<Box<T>, T> boxes1,  // [B, N, 4]
                   Rows<Box<T>, T> boxes2,                               // [B, M, 4]
                   Matrix matrix,
                   T* output) {  // [B, N, M]
  constexpr int N = kVectorSize<T>;
  const int lane = threadIdx.x % matrix.lanes;
  const int rows_at_once = kThreads / matrix.lanes;
  const int64_t tile = blockIdx.x / matrix.column_tiles;
  const int64_t image = tile / matrix.row_tiles;
  const int64_t first_column = (blockIdx.x - tile * matrix.column_tiles) * matrix.lanes * N;
  const int64_t first_row = (tile - image * matrix.row_tiles) * rows_at_once * kRowsPerThread +
                            threadIdx.x / matrix.lanes;

  Box<T> columns[N];
  IouTerms<T> of_columns[N];
#pragma unroll
  for (int j = 0; j < N; ++j) {
    const int64_t column = column_of<N, Vectorised>(first_column, lane, matrix.lanes, j);
    columns[j] = column < matrix.num_columns ? boxes2.load(image, column) : Box<T>{0, 0, 0, 0};
    of_columns[j] = iou_terms<Kind>(columns[j]);
  }
  for (int k = 0; k < kRowsPerThread; ++k) {
    const int64_t row = first_row + k * rows_at_once;
    if (row >= matrix.num_rows) {
      return;
    }
    const Box<T> box = boxes1.load(image, row);
    const IouTerms<T> of_box = iou_terms<Kind>(box);
    Vector<T, N> values;
#pragma unroll
    for (int j = 0; j < N; ++j) {
      values.data[j] = formula.value(box, columns[j], of_box, of_columns[j]);
    }
    T* out = output + (image * matrix.num_rows + row) * matrix.num_columns;
    if constexpr (Vectorised) {
      const int64_t column = first_column + lane * N;
      if (column < matrix.num_columns) {
        // In this form nvcc stores one word; the copy of a Vector it splits.
        reinterpret_cast<uint4*>(out)[column / N] = *reinterpret_cast<const uint4*>(values.data);
      }
    } else {
#pragma unroll
      for (int j = 0; j < N; ++j) {
        const int64_t column = column_of<N, Vectorised>(first_column, lane, matrix.lanes, j);
        if (column < matrix.num_columns) {
          out[column] = values.data[j];
        }
      }
    }
  }
}

constexpr int kTile = 32;  // rows, and columns, of the upstream gradient in shared memory
constexpr int kSlots = kThreads / kTile;  // threads that share a row
constexpr int64_t kSplitColumns = 4096;   // columns of a block: fixed, so that the sum's order is

struct Upstream {
  int64_t image_stride, row_stride, column_stride;
};

template <IouKind Kind, typename T>
__global__ void __launch_bounds__(kThreads, kMinBlocks<T>)
    box_iou_backward_kernel(IouFormula<Kind, T> formula, const T* grad_output,
                            Upstream strides,        // [B, N, M]
                            Rows<Box<T>, T> boxes1,  // [B, N, 4]
                            Rows<Box<T>, T> boxes2,  // [B, M, 4]
                            int64_t num_images, int64_t num_rows, int64_t num_columns,
                            int64_t row_tiles, int64_t splits,
                            T* partials) {  // [splits, B, N, 4]
  __shared__ T upstream[kTile][kTile + 1];
  __shared__ Box<T> columns[kTile];
  __shared__ Box<T> slot_sums[kSlots][kTile];
  const int lane = threadIdx.x % kTile, slot = threadIdx.x / kTile;
  const int64_t block = blockIdx.x / splits;
  const int64_t split = blockIdx.x - block * splits;
  const int64_t image = block / row_tiles;
  const int64_t first_row = (block - image * row_tiles) * kTile;
  const int64_t row = first_row + lane;
  const bool columns_are_neighbours = strides.column_stride <= strides.row_stride;

  const Box<T> box = row < num_rows ? boxes1.load(image, row) : Box<T>{0, 0, 0, 0};
  const IouTerms<T> of_box = iou_terms<Kind>(box);
  Box<T> sum{0, 0, 0, 0};
  const int64_t end =
      num_columns < (split + 1) * kSplitColumns ? num_columns : (split + 1) * kSplitColumns;
  for (int64_t first_column = split * kSplitColumns; first_column < end; first_column += kTile) {
    __syncthreads();  // the previous tile has been used
#pragma unroll
    for (int k = slot; k < kTile; k += kSlots) {
      const int r = columns_are_neighbours ? k : lane, c = columns_are_neighbours ? lane : k;
      if (first_row + r < num_rows && first_column + c < end) {
        upstream[r][c] =
            grad_output[image * strides.image_stride + (first_row + r) * strides.row_stride +
                        (first_column + c) * strides.column_stride];
      }
    }
    if (slot == 0 && first_column + lane < end) {
      columns[lane] = boxes2.load(image, first_column + lane);
    }
    __syncthreads();
    const int n = end - first_column < kTile ? static_cast<int>(end - first_column) : kTile;
    for (int c = slot; c < n && row < num_rows; c += kSlots) {
      const Box<T> column = columns[c];
      const Box<T> part = formula.gradient(box, column, of_box, iou_terms<Kind>(column));
      const T factor = upstream[lane][c];
      sum.x1 += factor * part.x1;
      sum.y1 += factor * part.y1;
      sum.x2 += factor * part.x2;
      sum.y2 += factor * part.y2;
    }
  }
  slot_sums[slot][lane] = sum;
  __syncthreads();
  if (slot == 0 && row < num_rows) {
    for (int k = 1; k < kSlots; ++k) {
      const Box<T> other = slot_sums[k][lane];
      sum.x1 += other.x1;
      sum.y1 += other.y1;
      sum.x2 += other.x2;
      sum.y2 += other.y2;
    }
    reinterpret_cast<Box<T>*>(partials)[(split * num_images + image) * num_rows + row] = sum;
  }
}

template <typename T>
__global__ void __launch_bounds__(kThreads)
    sum_splits_kernel(const T* partials, int64_t splits, int64_t size, T* output) {
  const int64_t i = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (i < size) {
    double sum = 0;
    for (int64_t split = 0; split < splits; ++split) {
      sum += partials[split * size + i];
    }
    output[i] = static_cast<T>(sum);
  }
}

// ---- losses of pairs ----------------------------------------------------------------------------

template <IouKind Kind, typename T>
__global__ void __launch_bounds__(kThreads)
    box_pair_loss_kernel(IouFormula<Kind, T> formula, Rows<Box<T>, T> boxes1,
                         Rows<Box<T>, T> boxes2, int64_t num_pairs, T* output) {
  const int64_t i = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (i < num_pairs) {
    const Box<T> a = boxes1.load(0, i), b = boxes2.load(0, i);
    output[i] = 1 - formula.value(a, b, iou_terms<Kind>(a), iou_terms<Kind>(b));
  }
}

// By the first set; the family is symmetric.
template <IouKind Kind, typename T>
__global__ void __launch_bounds__(kThreads)
    box_pair_loss_backward_kernel(IouFormula<Kind, T> formula, const T* grad_output, int64_t stride,
                                  Rows<Box<T>, T> boxes1, Rows<Box<T>, T> boxes2, int64_t num_pairs,
                                  Box<T>* grad) {
  const int64_t i = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (i < num_pairs) {
    const Box<T> a = boxes1.load(0, i), b = boxes2.load(0, i);
    const Box<T> part = formula.gradient(a, b, iou_terms<Kind>(a), iou_terms<Kind>(b));
    const T factor = -grad_output[i * stride];
    grad[i] = {factor * part.x1, factor * part.y1, factor * part.x2, factor * part.y2};
  }
}

// ---- box coding ---------------------------------------------------------------------------------

// What row i of a broadcast layout is; the division is spared where nothing is broadcast.
struct RowIndex {
  int64_t outer, inner;

  __device__ __forceinline__ RowIndex(int64_t i, int64_t num_rows, int64_t num_inner)
      : outer(num_rows == num_inner ? 0 : i / num_inner), inner(i - outer * num_inner) {}
};

template <typename T>
__global__ void __launch_bounds__(kThreads)
    encode_boxes_kernel(Rows<Box<T>, T> boxes, Rows<Box<T>, T> anchors, int64_t num_rows,
                        int64_t num_inner, BoxCoder<T> coder, Deltas<T>* output) {
  const int64_t i = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (i < num_rows) {
    const RowIndex row(i, num_rows, num_inner);
    output[i] = coder.encode(boxes.load(row.outer, row.inner), anchors.load(row.outer, row.inner));
  }
}

template <typename T>
__global__ void __launch_bounds__(kThreads)
    encode_boxes_backward_kernel(Rows<Deltas<T>, T> grad_output, Rows<Box<T>, T> boxes,
                                 Rows<Box<T>, T> anchors, int64_t num_rows, int64_t num_inner,
                                 BoxCoder<T> coder, Box<T>* grad_boxes, Box<T>* grad_anchors) {
  const int64_t i = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (i < num_rows) {
    const RowIndex row(i, num_rows, num_inner);
    const Deltas<T> grad = grad_output.load(row.outer, row.inner);
    const Box<T> box = boxes.load(row.outer, row.inner),
                 anchor = anchors.load(row.outer, row.inner);
    grad_boxes[i] = coder.encode_gradient_of_box(grad, box, anchor);
    grad_anchors[i] = coder.encode_gradient_of_anchor(grad, box, anchor);
  }
}

template <typename scalar_t, typename T = compute_t<scalar_t>>
__global__ void __launch_bounds__(kThreads)
    decode_boxes_kernel(Rows<Deltas<scalar_t>, scalar_t> deltas, Rows<Box<T>, T> anchors,
                        int64_t num_rows, int64_t num_inner, BoxCoder<T> coder, Box<T>* output) {
  const int64_t i = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (i < num_rows) {
    const RowIndex row(i, num_rows, num_inner);
    output[i] = coder.decode(deltas_cast<T>(deltas.load(row.outer, row.inner)),
                             anchors.load(row.outer, row.inner));
  }
}

template <typename scalar_t, typename T = compute_t<scalar_t>>
__global__ void __launch_bounds__(kThreads)
    decode_boxes_backward_kernel(Rows<Box<T>, T> grad_output,
                                 Rows<Deltas<scalar_t>, scalar_t> deltas, Rows<Box<T>, T> anchors,
                                 int64_t num_rows, int64_t num_inner, BoxCoder<T> coder,
                                 Deltas<scalar_t>* grad_deltas,
                                 Box<T>* grad_anchors) {  // null: not asked for
  const int64_t i = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (i < num_rows) {
    const RowIndex row(i, num_rows, num_inner);
    const Box<T> grad = grad_output.load(row.outer, row.inner),
                 anchor = anchors.load(row.outer, row.inner);
    const Deltas<T> delta = deltas_cast<T>(deltas.load(row.outer, row.inner));
    grad_deltas[i] = deltas_cast<scalar_t>(coder.decode_gradient_of_deltas(grad, delta, anchor));
    if (grad_anchors != nullptr) {
      grad_anchors[i] = coder.decode_gradient_of_anchor(grad, delta, anchor);
    }
  }
}

// ---- host ---------------------------------------------------------------------------------------

// The boxes of a contiguous (N, 4) or (B, N, 4).
template <typename T>
Rows<Box<T>, T> batched_boxes(const Tensor& boxes) {
  return {boxes, {4 * boxes.size(boxes.dim() - 2), 4}};
}

template <IouKind Kind, typename T>
auto* box_iou_kernel_of(const IouFormula<Kind, T>&, bool vectorised) {
  return vectorised ? &box_iou_kernel<Kind, T, true> : &box_iou_kernel<Kind, T, false>;
}

template <IouKind Kind, typename T>
auto* box_iou_backward_kernel_of(const IouFormula<Kind, T>&) {
  return &box_iou_backward_kernel<Kind, T>;
}

template <IouKind Kind, typename T>
auto* box_pair_loss_kernel_of(const IouFormula<Kind, T>&) {
  return &box_pair_loss_kernel<Kind, T>;
}

template <IouKind Kind, typename T>
auto* box_pair_loss_backward_kernel_of(const IouFormula<Kind, T>&) {
  return &box_pair_loss_backward_kernel<Kind, T>;
}

Tensor box_iou_cuda(const Tensor& boxes1_, const Tensor& boxes2_, int64_t kind, double eps) {
  check_box_iou(boxes1_, boxes2_, kind);
  const LaunchScope scope(boxes1_);
  const Tensor boxes1 = torch::stable::contiguous(boxes1_),
               boxes2 = torch::stable::contiguous(boxes2_);
  Tensor output = new_matrix(boxes1, boxes2);
  if (output.numel() == 0) {
    return output;
  }
  const int64_t dim = boxes1.dim();
  const int64_t num_images = dim == 3 ? boxes1.size(0) : 1;
  dispatch_iou_matrix(boxes1.scalar_type(), kind, eps, [&](auto tag, const auto& formula) {
    using T = tag_t<decltype(tag)>;
    constexpr int N = kVectorSize<T>;
    Matrix matrix{boxes1.size(dim - 2), boxes2.size(dim - 2), 1, 0, 0};
    while (matrix.lanes < kThreads / 2 && matrix.lanes * N < matrix.num_columns) {
      matrix.lanes *= 2;
    }
    matrix.row_tiles = ceil_div(matrix.num_rows, kThreads / matrix.lanes * kRowsPerThread);
    matrix.column_tiles = ceil_div(matrix.num_columns, matrix.lanes * N);
    launch(box_iou_kernel_of(formula, matrix.num_columns % N == 0),
           num_images * matrix.row_tiles * matrix.column_tiles, kThreads, 0, scope.stream(),
           formula, batched_boxes<T>(boxes1), batched_boxes<T>(boxes2), matrix,
           static_cast<T*>(output.mutable_data_ptr()));
  });
  return output;
}

Tensor box_iou_backward_cuda(const Tensor& grad_output, const Tensor& boxes1_,
                             const Tensor& boxes2_, int64_t kind, double eps) {
  check_box_iou_backward(grad_output, boxes1_, boxes2_, kind);
  const LaunchScope scope(boxes1_);
  const Tensor boxes1 = torch::stable::contiguous(boxes1_),
               boxes2 = torch::stable::contiguous(boxes2_);
  Tensor grad_boxes1 = torch::stable::empty_like(boxes1);
  if (boxes1.numel() == 0) {
    return grad_boxes1;
  }
  if (boxes2.numel() == 0) {
    return torch::stable::zero_(grad_boxes1);
  }
  const int64_t dim = boxes1.dim();
  const int64_t num_images = dim == 3 ? boxes1.size(0) : 1;
  const int64_t num_rows = boxes1.size(dim - 2), num_columns = boxes2.size(dim - 2);
  const Upstream strides{dim == 3 ? grad_output.stride(0) : 0, grad_output.stride(dim - 2),
                         grad_output.stride(dim - 1)};
  const int64_t row_tiles = ceil_div(num_rows, kTile),
                splits = ceil_div(num_columns, kSplitColumns);
  Tensor partials =
      splits == 1 ? grad_boxes1 : torch::stable::new_empty(boxes1, {splits, boxes1.numel()});
  dispatch_iou(boxes1.scalar_type(), kind, 0, eps, [&](auto tag, const auto& formula) {
    using T = tag_t<decltype(tag)>;
    auto* parts = static_cast<T*>(partials.mutable_data_ptr());
    launch(box_iou_backward_kernel_of(formula), num_images * row_tiles * splits, kThreads, 0,
           scope.stream(), formula, static_cast<const T*>(grad_output.const_data_ptr()), strides,
           batched_boxes<T>(boxes1), batched_boxes<T>(boxes2), num_images, num_rows, num_columns,
           row_tiles, splits, parts);
    if (splits > 1) {
      launch(&sum_splits_kernel<T>, ceil_div(boxes1.numel(), kThreads), kThreads, 0, scope.stream(),
             parts, splits, boxes1.numel(), static_cast<T*>(grad_boxes1.mutable_data_ptr()));
    }
  });
  return grad_boxes1;
}

Tensor box_pair_loss_cuda(const Tensor& boxes1_, const Tensor& boxes2_, int64_t kind, double eps) {
  check_box_pair_loss(boxes1_, boxes2_, kind);
  const LaunchScope scope(boxes1_);
  const Tensor boxes1 = torch::stable::contiguous(boxes1_),
               boxes2 = torch::stable::contiguous(boxes2_);
  Tensor output = new_pairs(boxes1);
  const int64_t num_pairs = output.numel();
  if (num_pairs == 0) {
    return output;
  }
  dispatch_iou(boxes1.scalar_type(), kind, eps, eps, [&](auto tag, const auto& formula) {
    using T = tag_t<decltype(tag)>;
    launch(box_pair_loss_kernel_of(formula), ceil_div(num_pairs, kThreads), kThreads, 0,
           scope.stream(), formula, Rows<Box<T>, T>(boxes1, {0, 4}),
           Rows<Box<T>, T>(boxes2, {0, 4}), num_pairs, static_cast<T*>(output.mutable_data_ptr()));
  });
  return output;
}

std::tuple<Tensor, Tensor> box_pair_loss_backward_cuda(const Tensor& grad_output,
                                                       const Tensor& boxes1_, const Tensor& boxes2_,
                                                       int64_t kind, double eps, bool compute_grad1,
                                                       bool compute_grad2) {
  check_box_pair_loss_backward(grad_output, boxes1_, boxes2_, kind);
  const LaunchScope scope(boxes1_);
  const Tensor boxes1 = torch::stable::contiguous(boxes1_),
               boxes2 = torch::stable::contiguous(boxes2_);
  const PairUpstream upstream(grad_output);
  Tensor grad1 = new_gradient(boxes1, compute_grad1), grad2 = new_gradient(boxes2, compute_grad2);
  const int64_t num_pairs = boxes1.numel() / 4;
  if (num_pairs == 0) {
    return {grad1, grad2};
  }
  dispatch_iou(boxes1.scalar_type(), kind, eps, eps, [&](auto tag, const auto& formula) {
    using T = tag_t<decltype(tag)>;
    const auto run = [&](const Tensor& of, const Tensor& other, Tensor& grad) {
      launch(box_pair_loss_backward_kernel_of(formula), ceil_div(num_pairs, kThreads), kThreads, 0,
             scope.stream(), formula, static_cast<const T*>(upstream.tensor.const_data_ptr()),
             upstream.stride, Rows<Box<T>, T>(of, {0, 4}), Rows<Box<T>, T>(other, {0, 4}),
             num_pairs, static_cast<Box<T>*>(grad.mutable_data_ptr()));
    };
    if (compute_grad1) {
      run(boxes1, boxes2, grad1);
    }
    if (compute_grad2) {
      run(boxes2, boxes1, grad2);
    }
  });
  return {grad1, grad2};
}

Tensor encode_boxes_cuda(const Tensor& boxes, const Tensor& anchors,
                         const std::vector<double>& weights) {
  check_encode_boxes(boxes, anchors, weights);
  const LaunchScope scope(boxes);
  Tensor output = new_rows(boxes, boxes.scalar_type());
  if (output.numel() == 0) {
    return output;
  }
  std::array<Tensor, 2> inputs{boxes, anchors};
  const auto layout = row_layout(inputs);
  dispatch_compute(boxes.scalar_type(), [&](auto tag) {
    using T = tag_t<decltype(tag)>;
    launch(&encode_boxes_kernel<T>, ceil_div(layout.num_rows, kThreads), kThreads, 0,
           scope.stream(), Rows<Box<T>, T>(inputs[0], layout.strides[0]),
           Rows<Box<T>, T>(inputs[1], layout.strides[1]), layout.num_rows, layout.num_inner,
           box_coder<T>(weights), static_cast<Deltas<T>*>(output.mutable_data_ptr()));
  });
  return output;
}

std::tuple<Tensor, Tensor> encode_boxes_backward_cuda(const Tensor& grad_output,
                                                      const Tensor& boxes, const Tensor& anchors,
                                                      const std::vector<double>& weights) {
  check_encode_boxes(boxes, anchors, weights);
  check_coder_gradient("encode_boxes", grad_output, anchors);
  const LaunchScope scope(boxes);
  Tensor grad_boxes = new_rows(boxes, boxes.scalar_type()),
         grad_anchors = new_rows(boxes, boxes.scalar_type());
  if (boxes.numel() == 0) {
    return {grad_boxes, grad_anchors};
  }
  std::array<Tensor, 3> inputs{grad_output, boxes, anchors};
  const auto layout = row_layout(inputs);
  dispatch_compute(boxes.scalar_type(), [&](auto tag) {
    using T = tag_t<decltype(tag)>;
    launch(&encode_boxes_backward_kernel<T>, ceil_div(layout.num_rows, kThreads), kThreads, 0,
           scope.stream(), Rows<Deltas<T>, T>(inputs[0], layout.strides[0]),
           Rows<Box<T>, T>(inputs[1], layout.strides[1]),
           Rows<Box<T>, T>(inputs[2], layout.strides[2]), layout.num_rows, layout.num_inner,
           box_coder<T>(weights), static_cast<Box<T>*>(grad_boxes.mutable_data_ptr()),
           static_cast<Box<T>*>(grad_anchors.mutable_data_ptr()));
  });
  return {grad_boxes, grad_anchors};
}

Tensor decode_boxes_cuda(const Tensor& deltas, const Tensor& anchors,
                         const std::vector<double>& weights, double clip,
                         const std::vector<double>& image_size) {
  check_decode_boxes(deltas, anchors, weights, image_size);
  const LaunchScope scope(deltas);
  Tensor output = new_rows(deltas, anchors.scalar_type());
  if (output.numel() == 0) {
    return output;
  }
  std::array<Tensor, 2> inputs{deltas, anchors};
  const auto layout = row_layout(inputs);
  dispatch_floating(deltas.scalar_type(), [&](auto tag) {
    using scalar_t = tag_t<decltype(tag)>;
    using T = compute_t<scalar_t>;
    launch(&decode_boxes_kernel<scalar_t>, ceil_div(layout.num_rows, kThreads), kThreads, 0,
           scope.stream(), Rows<Deltas<scalar_t>, scalar_t>(inputs[0], layout.strides[0]),
           Rows<Box<T>, T>(inputs[1], layout.strides[1]), layout.num_rows, layout.num_inner,
           box_coder<T>(weights, clip, image_size),
           static_cast<Box<T>*>(output.mutable_data_ptr()));
  });
  return output;
}

std::tuple<Tensor, Tensor> decode_boxes_backward_cuda(const Tensor& grad_output,
                                                      const Tensor& deltas, const Tensor& anchors,
                                                      const std::vector<double>& weights,
                                                      double clip,
                                                      const std::vector<double>& image_size,
                                                      bool compute_grad_anchors) {
  check_decode_boxes(deltas, anchors, weights, image_size);
  check_coder_gradient("decode_boxes", grad_output, anchors);
  const LaunchScope scope(deltas);
  Tensor grad_deltas = new_rows(deltas, deltas.scalar_type());
  Tensor grad_anchors = compute_grad_anchors ? new_rows(deltas, anchors.scalar_type())
                                             : torch::stable::new_empty(anchors, {0});
  if (deltas.numel() == 0) {
    return {grad_deltas, grad_anchors};
  }
  std::array<Tensor, 3> inputs{grad_output, deltas, anchors};
  const auto layout = row_layout(inputs);
  dispatch_floating(deltas.scalar_type(), [&](auto tag) {
    using scalar_t = tag_t<decltype(tag)>;
    using T = compute_t<scalar_t>;
    launch(&decode_boxes_backward_kernel<scalar_t>, ceil_div(layout.num_rows, kThreads), kThreads,
           0, scope.stream(), Rows<Box<T>, T>(inputs[0], layout.strides[0]),
           Rows<Deltas<scalar_t>, scalar_t>(inputs[1], layout.strides[1]),
           Rows<Box<T>, T>(inputs[2], layout.strides[2]), layout.num_rows, layout.num_inner,
           box_coder<T>(weights, clip, image_size),
           static_cast<Deltas<scalar_t>*>(grad_deltas.mutable_data_ptr()),
           compute_grad_anchors ? static_cast<Box<T>*>(grad_anchors.mutable_data_ptr()) : nullptr);
  });
  return {grad_deltas, grad_anchors};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(focalops, CUDA, m) {
  m.impl("box_iou", TORCH_BOX(&box_iou_cuda));
  m.impl("_box_iou_backward", TORCH_BOX(&box_iou_backward_cuda));
  m.impl("box_pair_loss", TORCH_BOX(&box_pair_loss_cuda));
  m.impl("_box_pair_loss_backward", TORCH_BOX(&box_pair_loss_backward_cuda));
  m.impl("encode_boxes", TORCH_BOX(&encode_boxes_cuda));
  m.impl("_encode_boxes_backward", TORCH_BOX(&encode_boxes_backward_cuda));
  m.impl("decode_boxes", TORCH_BOX(&decode_boxes_cuda));
  m.impl("_decode_boxes_backward", TORCH_BOX(&decode_boxes_backward_cuda));
}

}  // namespace focalops
