// The IoU family, as matrices and as losses of pairs, and box coding on the CPU.
//
// A matrix is made in blocks of rows and columns, in parallel over blocks. The boxes of a block's
// columns (of its rows, for the gradient, which sums over columns) are laid out coordinate by
// coordinate, and the loop over them is vectorised.
#include <algorithm>
#include <tuple>
#include <vector>

#include "../math/box.h"
#include "../rows.h"
#include "memory.h"
#include "simd.h"

namespace focalops {
namespace {

constexpr int64_t kLanes = 256;  // boxes laid out side by side: they stay in the L1 cache
constexpr int64_t kRows = 64;    // rows that share one layout of their columns
constexpr int64_t kSplitColumns =
    4096;  // columns that one partial gradient sums over: fixed, and so is the sum's order
constexpr int64_t kCoderGrain = 4096;

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

template <typename T>
struct BoxLanes {
  alignas(64) T x1[kLanes], y1[kLanes], x2[kLanes], y2[kLanes], area[kLanes], angle[kLanes];

  FOCALOPS_HOST_DEVICE Box<T> box(int64_t i) const { return {x1[i], y1[i], x2[i], y2[i]}; }
  FOCALOPS_HOST_DEVICE IouTerms<T> terms(int64_t i) const { return {area[i], angle[i]}; }
};

template <IouKind Kind, typename T>
FOCALOPS_SIMD void lay_out(const T* boxes, int64_t n, BoxLanes<T>& lanes) {
  for (int64_t i = 0; i < n; ++i) {
    const Box<T> box = load_box(boxes + 4 * i);
    lanes.x1[i] = box.x1;
    lanes.y1[i] = box.y1;
    lanes.x2[i] = box.x2;
    lanes.y2[i] = box.y2;
  }
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) {
    const IouTerms<T> terms = iou_terms<Kind>(lanes.box(i));
    lanes.area[i] = terms.area;
    lanes.angle[i] = terms.angle;
  }
}

template <IouKind Kind, typename T>
FOCALOPS_SIMD void iou_of_row(IouFormula<Kind, T> formula, const Box<T>& row, IouTerms<T> of_row,
                              const BoxLanes<T>& columns, int64_t n, T* out) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) {
    out[i] = formula.value(row, columns.box(i), of_row, columns.terms(i));
  }
}

// Adds one column's part to the gradients of n rows.
template <IouKind Kind, typename T>
FOCALOPS_SIMD void add_iou_gradient(IouFormula<Kind, T> formula, const BoxLanes<T>& rows,
                                    const Box<T>& column, IouTerms<T> of_column, const T* upstream,
                                    int64_t n, BoxLanes<T>& grad) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) {
    const Box<T> part = formula.gradient(rows.box(i), column, rows.terms(i), of_column);
    grad.x1[i] += upstream[i] * part.x1;
    grad.y1[i] += upstream[i] * part.y1;
    grad.x2[i] += upstream[i] * part.x2;
    grad.y2[i] += upstream[i] * part.y2;
  }
}

template <IouKind Kind, typename T>
IouTerms<T> terms_of(const IouFormula<Kind, T>&, const Box<T>& box) {
  return iou_terms<Kind>(box);
}

template <IouKind Kind, typename T>
void lay_out_for(const IouFormula<Kind, T>&, const T* boxes, int64_t n, BoxLanes<T>& lanes) {
  lay_out<Kind>(boxes, n, lanes);
}

Tensor box_iou_cpu(const Tensor& boxes1_, const Tensor& boxes2_, int64_t kind, double eps) {
  check_box_iou(boxes1_, boxes2_, kind);
  const Tensor boxes1 = torch::stable::contiguous(boxes1_),
               boxes2 = torch::stable::contiguous(boxes2_);
  const int64_t dim = boxes1.dim();
  const int64_t batch = dim == 3 ? boxes1.size(0) : 1;
  const int64_t num_rows = boxes1.size(dim - 2), num_columns = boxes2.size(dim - 2);
  Tensor output =
      on_huge_pages(new_matrix(boxes1, boxes2), boxes1.scalar_type() == ScalarType::Double ? 8 : 4);

  dispatch_iou(boxes1.scalar_type(), kind, 0, eps, [&](auto tag, const auto& formula) {
    using T = tag_t<decltype(tag)>;
    const auto* rows = static_cast<const T*>(boxes1.const_data_ptr());
    const auto* columns = static_cast<const T*>(boxes2.const_data_ptr());
    auto* out = static_cast<T*>(output.mutable_data_ptr());
    const int64_t row_blocks = ceil_div(num_rows, kRows),
                  column_blocks = ceil_div(num_columns, kLanes);
    torch::stable::parallel_for(
        0, batch * row_blocks * column_blocks, 1, [&](int64_t begin, int64_t end) {
          BoxLanes<T> lanes;
          for (int64_t block = begin; block < end; ++block) {
            const int64_t image = block / (row_blocks * column_blocks);
            const int64_t first_row = block / column_blocks % row_blocks * kRows;
            const int64_t first_column = block % column_blocks * kLanes;
            const int64_t last_row = std::min(first_row + kRows, num_rows);
            const int64_t n = std::min(kLanes, num_columns - first_column);
            lay_out_for(formula, columns + 4 * (image * num_columns + first_column), n, lanes);
            for (int64_t i = image * num_rows + first_row; i < image * num_rows + last_row; ++i) {
              const Box<T> row = load_box(rows + 4 * i);
              iou_of_row(formula, row, terms_of(formula, row), lanes, n,
                         out + i * num_columns + first_column);
            }
          }
        });
  });
  return output;
}

Tensor box_iou_backward_cpu(const Tensor& grad_output, const Tensor& boxes1_, const Tensor& boxes2_,
                            int64_t kind, double eps) {
  check_box_iou_backward(grad_output, boxes1_, boxes2_, kind);
  const Tensor boxes1 = torch::stable::contiguous(boxes1_),
               boxes2 = torch::stable::contiguous(boxes2_);
  const int64_t dim = boxes1.dim();
  const int64_t batch = dim == 3 ? boxes1.size(0) : 1;
  const int64_t num_rows = boxes1.size(dim - 2), num_columns = boxes2.size(dim - 2);
  const int64_t batch_stride = dim == 3 ? grad_output.stride(0) : 0;
  const int64_t row_stride = grad_output.stride(dim - 2),
                column_stride = grad_output.stride(dim - 1);
  Tensor grad_boxes1 = torch::stable::empty_like(boxes1);

  dispatch_iou(boxes1.scalar_type(), kind, 0, eps, [&](auto tag, const auto& formula) {
    using T = tag_t<decltype(tag)>;
    const auto* rows = static_cast<const T*>(boxes1.const_data_ptr());
    const auto* columns = static_cast<const T*>(boxes2.const_data_ptr());
    const auto* upstream = static_cast<const T*>(grad_output.const_data_ptr());
    const int64_t row_blocks = ceil_div(num_rows, kLanes);
    const int64_t splits = std::max<int64_t>(ceil_div(num_columns, kSplitColumns), 1);
    std::vector<Box<T>> partials(splits * batch * num_rows);
    torch::stable::parallel_for(0, batch * row_blocks * splits, 1, [&](int64_t begin, int64_t end) {
      BoxLanes<T> lanes, grad;
      alignas(64) T lane_upstream[kLanes];
      for (int64_t block = begin; block < end; ++block) {
        const int64_t image = block / (row_blocks * splits);
        const int64_t first_row = block / splits % row_blocks * kLanes;
        const int64_t split = block % splits;
        const int64_t n = std::min(kLanes, num_rows - first_row);
        const int64_t last_column = std::min((split + 1) * kSplitColumns, num_columns);
        lay_out_for(formula, rows + 4 * (image * num_rows + first_row), n, lanes);
        grad = {};
        for (int64_t column = split * kSplitColumns; column < last_column; ++column) {
          const Box<T> box = load_box(columns + 4 * (image * num_columns + column));
          const T* from =
              upstream + image * batch_stride + first_row * row_stride + column * column_stride;
          for (int64_t i = 0; i < n; ++i) {
            lane_upstream[i] = from[i * row_stride];
          }
          add_iou_gradient(formula, lanes, box, terms_of(formula, box), lane_upstream, n, grad);
        }
        Box<T>* out = &partials[split * batch * num_rows + image * num_rows + first_row];
        for (int64_t i = 0; i < n; ++i) {
          out[i] = grad.box(i);
        }
      }
    });
    auto* out = static_cast<T*>(grad_boxes1.mutable_data_ptr());
    const T* parts = &partials.data()->x1;
    const int64_t numel = batch * num_rows * 4;
    for (int64_t i = 0; i < numel; ++i) {
      double sum = 0;
      for (int64_t split = 0; split < splits; ++split) {
        sum += parts[split * numel + i];
      }
      out[i] = static_cast<T>(sum);
    }
  });
  return grad_boxes1;
}

// ---- losses of pairs ----------------------------------------------------------------------------

template <IouKind Kind, typename T>
FOCALOPS_SIMD void pair_losses(IouFormula<Kind, T> formula, const BoxLanes<T>& first,
                               const BoxLanes<T>& second, int64_t n, T* out) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) {
    out[i] = 1 - formula.value(first.box(i), second.box(i), first.terms(i), second.terms(i));
  }
}

// By the boxes of `first`; `stride` of the upstream gradient is 0 or 1.
template <IouKind Kind, typename T>
FOCALOPS_SIMD void pair_loss_gradients(IouFormula<Kind, T> formula, const T* upstream,
                                       int64_t stride, const BoxLanes<T>& first,
                                       const BoxLanes<T>& second, int64_t n, BoxLanes<T>& grad,
                                       T* out) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) {
    const Box<T> part =
        formula.gradient(first.box(i), second.box(i), first.terms(i), second.terms(i));
    const T factor = -upstream[i * stride];
    grad.x1[i] = factor * part.x1;
    grad.y1[i] = factor * part.y1;
    grad.x2[i] = factor * part.x2;
    grad.y2[i] = factor * part.y2;
  }
  for (int64_t i = 0; i < n; ++i) {
    out[4 * i] = grad.x1[i];
    out[4 * i + 1] = grad.y1[i];
    out[4 * i + 2] = grad.x2[i];
    out[4 * i + 3] = grad.y2[i];
  }
}

// Calls f(begin, n, first, second) for each block of pairs, in parallel.
template <IouKind Kind, typename T, typename F>
void for_each_block(const IouFormula<Kind, T>& formula, const Tensor& boxes1, const Tensor& boxes2,
                    const F& f) {
  const auto* data1 = static_cast<const T*>(boxes1.const_data_ptr());
  const auto* data2 = static_cast<const T*>(boxes2.const_data_ptr());
  const int64_t num_pairs = boxes1.numel() / 4;
  torch::stable::parallel_for(
      0, ceil_div(num_pairs, kLanes), kCoderGrain / kLanes, [&](int64_t block, int64_t last) {
        BoxLanes<T> first, second;
        for (; block < last; ++block) {
          const int64_t begin = block * kLanes, n = std::min(kLanes, num_pairs - begin);
          lay_out_for(formula, data1 + 4 * begin, n, first);
          lay_out_for(formula, data2 + 4 * begin, n, second);
          f(begin, n, first, second);
        }
      });
}

Tensor box_pair_loss_cpu(const Tensor& boxes1_, const Tensor& boxes2_, int64_t kind, double eps) {
  check_box_pair_loss(boxes1_, boxes2_, kind);
  const Tensor boxes1 = torch::stable::contiguous(boxes1_),
               boxes2 = torch::stable::contiguous(boxes2_);
  Tensor output = new_pairs(boxes1);
  dispatch_iou(boxes1.scalar_type(), kind, eps, eps, [&](auto tag, const auto& formula) {
    using T = tag_t<decltype(tag)>;
    auto* out = static_cast<T*>(output.mutable_data_ptr());
    for_each_block(formula, boxes1, boxes2,
                   [&](int64_t begin, int64_t n, const auto& first, const auto& second) {
                     pair_losses(formula, first, second, n, out + begin);
                   });
  });
  return output;
}

std::tuple<Tensor, Tensor> box_pair_loss_backward_cpu(const Tensor& grad_output_,
                                                      const Tensor& boxes1_, const Tensor& boxes2_,
                                                      int64_t kind, double eps, bool compute_grad1,
                                                      bool compute_grad2) {
  check_box_pair_loss_backward(grad_output_, boxes1_, boxes2_, kind);
  const Tensor boxes1 = torch::stable::contiguous(boxes1_),
               boxes2 = torch::stable::contiguous(boxes2_);
  const PairUpstream upstream(grad_output_);
  Tensor grad1 = new_gradient(boxes1, compute_grad1), grad2 = new_gradient(boxes2, compute_grad2);
  dispatch_iou(boxes1.scalar_type(), kind, eps, eps, [&](auto tag, const auto& formula) {
    using T = tag_t<decltype(tag)>;
    const auto* from = static_cast<const T*>(upstream.tensor.const_data_ptr());
    auto* out1 = static_cast<T*>(grad1.mutable_data_ptr());
    auto* out2 = static_cast<T*>(grad2.mutable_data_ptr());
    for_each_block(formula, boxes1, boxes2,
                   [&](int64_t begin, int64_t n, const auto& first, const auto& second) {
                     BoxLanes<T> grad;
                     const T* of_block = from + begin * upstream.stride;
                     if (compute_grad1) {
                       pair_loss_gradients(formula, of_block, upstream.stride, first, second, n,
                                           grad, out1 + 4 * begin);
                     }
                     if (compute_grad2) {
                       pair_loss_gradients(formula, of_block, upstream.stride, second, first, n,
                                           grad, out2 + 4 * begin);
                     }
                   });
  });
  return {grad1, grad2};
}

// ---- box coding
// ----------------------------------------------------------------------------------------------------

// Calls f(i, outer, inner) for each row of the layout, in parallel.
template <size_t N, typename F>
void for_each_row(const RowLayout<N>& layout, const F& f) {
  torch::stable::parallel_for(0, layout.num_rows, kCoderGrain, [&](int64_t begin, int64_t end) {
    int64_t outer = begin / layout.num_inner, inner = begin % layout.num_inner;
    for (int64_t i = begin; i < end; ++i) {
      f(i, outer, inner);
      if (++inner == layout.num_inner) {
        inner = 0;
        ++outer;
      }
    }
  });
}

// Along one axis of n boxes and anchors: the deltas of the centers and of the sizes.
template <typename T>
FOCALOPS_SIMD void encode_axis(const T* low, const T* high, const T* anchor_low,
                               const T* anchor_high, T offset_weight, T ratio_weight, int64_t n,
                               T* offsets, T* ratios) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) {
    const T size = high[i] - low[i], anchor_size = anchor_high[i] - anchor_low[i];
    const T center = low[i] + T(0.5) * size;
    const T anchor_center = anchor_low[i] + T(0.5) * anchor_size;
    offsets[i] = BoxCoder<T>::encode_offset(offset_weight, center, anchor_center, anchor_size);
    ratios[i] = BoxCoder<T>::encode_ratio(ratio_weight, size, anchor_size);
  }
}

template <typename T>
FOCALOPS_SIMD void decode_axis(const BoxCoder<T>& coder, const T* offsets, const T* ratios,
                               const T* anchor_low, const T* anchor_high, T offset_weight,
                               T ratio_weight, T image_size, int64_t n, T* low, T* high) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) {
    const T size = anchor_high[i] - anchor_low[i], anchor_center = anchor_low[i] + T(0.5) * size;
    const T center = BoxCoder<T>::decode_center(offsets[i], offset_weight, anchor_center, size);
    const T half = coder.decode_half_size(ratios[i], ratio_weight, size);
    low[i] = center - half;
    high[i] = center + half;
  }
  for (int64_t i = 0; coder.clip_to_image && i < n; ++i) {
    low[i] = BoxCoder<T>::clamp(low[i], image_size);
    high[i] = BoxCoder<T>::clamp(high[i], image_size);
  }
}

template <typename T, typename Row>
FOCALOPS_SIMD void interleave(const BoxLanes<T>& lanes, int64_t n, Row* out) {
  for (int64_t i = 0; i < n; ++i) {
    out[i] = {lanes.x1[i], lanes.y1[i], lanes.x2[i], lanes.y2[i]};
  }
}

// Calls f(begin, n, first, second) with the lanes of up to kLanes rows of two tensors, in parallel;
// load_first(outer, inner) and load_second return a row as four numbers.
template <typename T, typename LoadFirst, typename LoadSecond, typename F>
void for_each_lanes(const RowLayout<2>& layout, const LoadFirst& load_first,
                    const LoadSecond& load_second, const F& f) {
  torch::stable::parallel_for(0, layout.num_rows, kCoderGrain, [&](int64_t begin, int64_t end) {
    BoxLanes<T> first, second;
    const auto put = [](const auto& row, int64_t i, BoxLanes<T>& lanes) {
      std::tie(lanes.x1[i], lanes.y1[i], lanes.x2[i], lanes.y2[i]) = row;
    };
    int64_t outer = begin / layout.num_inner, inner = begin % layout.num_inner;
    for (; begin < end; begin += kLanes) {
      const int64_t n = std::min(kLanes, end - begin);
      for (int64_t i = 0; i < n; ++i) {
        put(load_first(outer, inner), i, first);
        put(load_second(outer, inner), i, second);
        if (++inner == layout.num_inner) {
          inner = 0;
          ++outer;
        }
      }
      f(begin, n, first, second);
    }
  });
}

template <typename T>
std::tuple<T, T, T, T> numbers_of(const Box<T>& box) {
  return {box.x1, box.y1, box.x2, box.y2};
}

template <typename T>
std::tuple<T, T, T, T> numbers_of(const Deltas<T>& deltas) {
  return {deltas.x, deltas.y, deltas.w, deltas.h};
}

Tensor encode_boxes_cpu(const Tensor& boxes, const Tensor& anchors,
                        const std::vector<double>& weights) {
  check_encode_boxes(boxes, anchors, weights);
  Tensor output = new_rows(boxes, boxes.scalar_type());
  std::array<Tensor, 2> inputs{boxes, anchors};
  const auto layout = row_layout(inputs);
  dispatch_compute(boxes.scalar_type(), [&](auto tag) {
    using T = tag_t<decltype(tag)>;
    const auto coder = box_coder<T>(weights);
    const Rows<Box<T>, T> box_rows(inputs[0], layout.strides[0]),
        anchor_rows(inputs[1], layout.strides[1]);
    auto* out = static_cast<Deltas<T>*>(output.mutable_data_ptr());
    for_each_lanes<T>(
        layout,
        [&](int64_t outer, int64_t inner) { return numbers_of(box_rows.load(outer, inner)); },
        [&](int64_t outer, int64_t inner) { return numbers_of(anchor_rows.load(outer, inner)); },
        [&](int64_t begin, int64_t n, const BoxLanes<T>& b, const BoxLanes<T>& a) {
          BoxLanes<T> deltas;
          encode_axis(b.x1, b.x2, a.x1, a.x2, coder.weights.x, coder.weights.w, n, deltas.x1,
                      deltas.x2);
          encode_axis(b.y1, b.y2, a.y1, a.y2, coder.weights.y, coder.weights.h, n, deltas.y1,
                      deltas.y2);
          interleave(deltas, n, out + begin);
        });
  });
  return output;
}

std::tuple<Tensor, Tensor> encode_boxes_backward_cpu(const Tensor& grad_output, const Tensor& boxes,
                                                     const Tensor& anchors,
                                                     const std::vector<double>& weights) {
  check_encode_boxes(boxes, anchors, weights);
  check_coder_gradient("encode_boxes", grad_output, anchors);
  Tensor grad_boxes = new_rows(boxes, boxes.scalar_type()),
         grad_anchors = new_rows(boxes, boxes.scalar_type());
  std::array<Tensor, 3> inputs{grad_output, boxes, anchors};
  const auto layout = row_layout(inputs);
  dispatch_compute(boxes.scalar_type(), [&](auto tag) {
    using T = tag_t<decltype(tag)>;
    const auto coder = box_coder<T>(weights);
    const Rows<Deltas<T>, T> grad_rows(inputs[0], layout.strides[0]);
    const Rows<Box<T>, T> box_rows(inputs[1], layout.strides[1]),
        anchor_rows(inputs[2], layout.strides[2]);
    auto* out_boxes = static_cast<Box<T>*>(grad_boxes.mutable_data_ptr());
    auto* out_anchors = static_cast<Box<T>*>(grad_anchors.mutable_data_ptr());
    for_each_row(layout, [&](int64_t i, int64_t outer, int64_t inner) {
      const auto grad = grad_rows.load(outer, inner);
      const auto box = box_rows.load(outer, inner), anchor = anchor_rows.load(outer, inner);
      out_boxes[i] = coder.encode_gradient_of_box(grad, box, anchor);
      out_anchors[i] = coder.encode_gradient_of_anchor(grad, box, anchor);
    });
  });
  return {grad_boxes, grad_anchors};
}

Tensor decode_boxes_cpu(const Tensor& deltas, const Tensor& anchors,
                        const std::vector<double>& weights, double clip,
                        const std::vector<double>& image_size) {
  check_decode_boxes(deltas, anchors, weights, image_size);
  Tensor output = new_rows(deltas, anchors.scalar_type());
  std::array<Tensor, 2> inputs{deltas, anchors};
  const auto layout = row_layout(inputs);
  dispatch_floating(deltas.scalar_type(), [&](auto tag) {
    using scalar_t = tag_t<decltype(tag)>;
    using T = compute_t<scalar_t>;
    const auto coder = box_coder<T>(weights, clip, image_size);
    const Rows<Deltas<scalar_t>, scalar_t> delta_rows(inputs[0], layout.strides[0]);
    const Rows<Box<T>, T> anchor_rows(inputs[1], layout.strides[1]);
    auto* out = static_cast<Box<T>*>(output.mutable_data_ptr());
    for_each_lanes<T>(
        layout,
        [&](int64_t outer, int64_t inner) {
          return numbers_of(deltas_cast<T>(delta_rows.load(outer, inner)));
        },
        [&](int64_t outer, int64_t inner) { return numbers_of(anchor_rows.load(outer, inner)); },
        [&](int64_t begin, int64_t n, const BoxLanes<T>& d, const BoxLanes<T>& a) {
          BoxLanes<T> boxes;
          decode_axis(coder, d.x1, d.x2, a.x1, a.x2, coder.weights.x, coder.weights.w,
                      coder.image_width, n, boxes.x1, boxes.x2);
          decode_axis(coder, d.y1, d.y2, a.y1, a.y2, coder.weights.y, coder.weights.h,
                      coder.image_height, n, boxes.y1, boxes.y2);
          interleave(boxes, n, out + begin);
        });
  });
  return output;
}

std::tuple<Tensor, Tensor> decode_boxes_backward_cpu(const Tensor& grad_output,
                                                     const Tensor& deltas, const Tensor& anchors,
                                                     const std::vector<double>& weights,
                                                     double clip,
                                                     const std::vector<double>& image_size,
                                                     bool compute_grad_anchors) {
  check_decode_boxes(deltas, anchors, weights, image_size);
  check_coder_gradient("decode_boxes", grad_output, anchors);
  Tensor grad_deltas = new_rows(deltas, deltas.scalar_type());
  Tensor grad_anchors = compute_grad_anchors ? new_rows(deltas, anchors.scalar_type())
                                             : torch::stable::new_empty(anchors, {0});
  std::array<Tensor, 3> inputs{grad_output, deltas, anchors};
  const auto layout = row_layout(inputs);
  dispatch_floating(deltas.scalar_type(), [&](auto tag) {
    using scalar_t = tag_t<decltype(tag)>;
    using T = compute_t<scalar_t>;
    const auto coder = box_coder<T>(weights, clip, image_size);
    const Rows<Box<T>, T> grad_rows(inputs[0], layout.strides[0]),
        anchor_rows(inputs[2], layout.strides[2]);
    const Rows<Deltas<scalar_t>, scalar_t> delta_rows(inputs[1], layout.strides[1]);
    auto* out_deltas = static_cast<Deltas<scalar_t>*>(grad_deltas.mutable_data_ptr());
    auto* out_anchors = static_cast<Box<T>*>(grad_anchors.mutable_data_ptr());
    for_each_row(layout, [&](int64_t i, int64_t outer, int64_t inner) {
      const auto grad = grad_rows.load(outer, inner), anchor = anchor_rows.load(outer, inner);
      const auto delta = deltas_cast<T>(delta_rows.load(outer, inner));
      out_deltas[i] = deltas_cast<scalar_t>(coder.decode_gradient_of_deltas(grad, delta, anchor));
      if (compute_grad_anchors) {
        out_anchors[i] = coder.decode_gradient_of_anchor(grad, delta, anchor);
      }
    });
  });
  return {grad_deltas, grad_anchors};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(focalops, CPU, m) {
  m.impl("box_iou", TORCH_BOX(&box_iou_cpu));
  m.impl("_box_iou_backward", TORCH_BOX(&box_iou_backward_cpu));
  m.impl("box_pair_loss", TORCH_BOX(&box_pair_loss_cpu));
  m.impl("_box_pair_loss_backward", TORCH_BOX(&box_pair_loss_backward_cpu));
  m.impl("encode_boxes", TORCH_BOX(&encode_boxes_cpu));
  m.impl("_encode_boxes_backward", TORCH_BOX(&encode_boxes_backward_cpu));
  m.impl("decode_boxes", TORCH_BOX(&decode_boxes_cpu));
  m.impl("_decode_boxes_backward", TORCH_BOX(&decode_boxes_backward_cpu));
}

}  // namespace focalops
