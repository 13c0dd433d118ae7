// The IoU family, as matrices and as losses of pairs, and box coding on the CPU.
//
// A matrix is made in blocks of rows and columns, in parallel over blocks. The boxes of a block's
// columns (of its rows, for the gradient, which sums over columns) are laid out coordinate by
// coordinate, and the loop over them is vectorised.
#include <algorithm>
#include <tuple>
#include <vector>

#include "../checks/boxes.h"
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

// Boxes, or the deltas of boxes, coordinate by coordinate, and what IoUs need of each.
template <typename T>
struct BoxLanes {
  alignas(64) T x1[kLanes], y1[kLanes], x2[kLanes], y2[kLanes], area[kLanes], angle[kLanes];

  FOCALOPS_HOST_DEVICE Box<T> box(int64_t i) const { return {x1[i], y1[i], x2[i], y2[i]}; }
  FOCALOPS_HOST_DEVICE Deltas<T> deltas(int64_t i) const { return {x1[i], y1[i], x2[i], y2[i]}; }
  FOCALOPS_HOST_DEVICE IouTerms<T> terms(int64_t i) const { return {area[i], angle[i]}; }

  FOCALOPS_HOST_DEVICE void put(int64_t i, const Box<T>& box) {
    x1[i] = box.x1;
    y1[i] = box.y1;
    x2[i] = box.x2;
    y2[i] = box.y2;
  }
  FOCALOPS_HOST_DEVICE void put(int64_t i, const Deltas<T>& deltas) {
    x1[i] = deltas.x;
    y1[i] = deltas.y;
    x2[i] = deltas.w;
    y2[i] = deltas.h;
  }
};

template <IouKind Kind, typename T>
FOCALOPS_SIMD void lay_out(const T* boxes, int64_t n, BoxLanes<T>& lanes) {
  for (int64_t i = 0; i < n; ++i) {
    lanes.put(i, load_box(boxes + 4 * i));
  }
  FOCALOPS_INDEPENDENT
  for (int64_t i = 0; i < n; ++i) {
    const IouTerms<T> terms = iou_terms<Kind>(lanes.box(i));
    lanes.area[i] = terms.area;
    lanes.angle[i] = terms.angle;
  }
}

template <typename T>
FOCALOPS_SIMD void interleave(const BoxLanes<T>& lanes, int64_t n, Box<T>* out) {
  for (int64_t i = 0; i < n; ++i) {
    out[i] = lanes.box(i);
  }
}

template <typename T, typename scalar_t>
FOCALOPS_SIMD void interleave(const BoxLanes<T>& lanes, int64_t n, Deltas<scalar_t>* out) {
  for (int64_t i = 0; i < n; ++i) {
    out[i] = deltas_cast<scalar_t>(lanes.deltas(i));
  }
}

template <IouKind Kind, typename T>
FOCALOPS_SIMD void iou_of_row(IouFormula<Kind, T> formula, const Box<T>& row, IouTerms<T> of_row,
                              const BoxLanes<T>& columns, int64_t n, T* out) {
  FOCALOPS_INDEPENDENT
  for (int64_t i = 0; i < n; ++i) {
    out[i] = formula.value(row, columns.box(i), of_row, columns.terms(i));
  }
}

// Adds one column's part to the gradients of n rows.
template <IouKind Kind, typename T>
FOCALOPS_SIMD void add_iou_gradient(IouFormula<Kind, T> formula, const BoxLanes<T>& rows,
                                    const Box<T>& column, IouTerms<T> of_column, const T* upstream,
                                    int64_t n, BoxLanes<T>& grad) {
  FOCALOPS_INDEPENDENT
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

  dispatch_iou_matrix(boxes1.scalar_type(), kind, eps, [&](auto tag, const auto& formula) {
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
  FOCALOPS_INDEPENDENT
  for (int64_t i = 0; i < n; ++i) {
    out[i] = 1 - formula.value(first.box(i), second.box(i), first.terms(i), second.terms(i));
  }
}

// By the boxes of `first`; `stride` of the upstream gradient is 0 or 1.
template <IouKind Kind, typename T>
FOCALOPS_SIMD void pair_loss_gradients(IouFormula<Kind, T> formula, const T* upstream,
                                       int64_t stride, const BoxLanes<T>& first,
                                       const BoxLanes<T>& second, int64_t n, BoxLanes<T>& grad,
                                       Box<T>* out) {
  FOCALOPS_INDEPENDENT
  for (int64_t i = 0; i < n; ++i) {
    const Box<T> part =
        formula.gradient(first.box(i), second.box(i), first.terms(i), second.terms(i));
    const T factor = -upstream[i * stride];
    grad.put(i, Box<T>{factor * part.x1, factor * part.y1, factor * part.x2, factor * part.y2});
  }
  interleave(grad, n, out);
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
    auto* out1 = static_cast<Box<T>*>(grad1.mutable_data_ptr());
    auto* out2 = static_cast<Box<T>*>(grad2.mutable_data_ptr());
    for_each_block(formula, boxes1, boxes2,
                   [&](int64_t begin, int64_t n, const auto& first, const auto& second) {
                     BoxLanes<T> grad;
                     const T* of_block = from + begin * upstream.stride;
                     if (compute_grad1) {
                       pair_loss_gradients(formula, of_block, upstream.stride, first, second, n,
                                           grad, out1 + begin);
                     }
                     if (compute_grad2) {
                       pair_loss_gradients(formula, of_block, upstream.stride, second, first, n,
                                           grad, out2 + begin);
                     }
                   });
  });
  return {grad1, grad2};
}

// ---- box coding ---------------------------------------------------------------------------------

// out[i] = formula(lanes, i) for n rows.
template <typename T, typename F>
FOCALOPS_SIMD void evaluate_rows(F formula, const BoxLanes<T>* lanes, int64_t n, BoxLanes<T>& out) {
  FOCALOPS_INDEPENDENT
  for (int64_t i = 0; i < n; ++i) {
    out.put(i, formula(lanes, i));
  }
}

// Lays out blocks of the rows that load(outer, inner)... return, and calls f(begin, n, lanes), with
// the lanes of each, in parallel over blocks.
template <typename T, size_t N, typename F, typename... Load>
void for_each_lanes(const RowLayout<N>& layout, const F& f, const Load&... load) {
  static_assert(sizeof...(Load) == N);
  torch::stable::parallel_for(0, layout.num_rows, kCoderGrain, [&](int64_t begin, int64_t end) {
    BoxLanes<T> lanes[N];
    int64_t outer = begin / layout.num_inner, inner = begin % layout.num_inner;
    for (; begin < end; begin += kLanes) {
      const int64_t n = std::min(kLanes, end - begin);
      for (int64_t i = 0; i < n; ++i) {
        BoxLanes<T>* next = lanes;
        ((next++)->put(i, load(outer, inner)), ...);
        if (++inner == layout.num_inner) {
          inner = 0;
          ++outer;
        }
      }
      f(begin, n, lanes);
    }
  });
}

// The rows of a tensor as for_each_lanes loads them, in the type that is computed in.
template <typename T>
auto boxes_of(const Tensor& tensor, const RowStrides& strides) {
  return [rows = Rows<Box<T>, T>(tensor, strides)](int64_t outer, int64_t inner) {
    return rows.load(outer, inner);
  };
}

template <typename T, typename scalar_t>
auto deltas_of(const Tensor& tensor, const RowStrides& strides) {
  return [rows = Rows<Deltas<scalar_t>, scalar_t>(tensor, strides)](int64_t outer, int64_t inner) {
    return deltas_cast<T>(rows.load(outer, inner));
  };
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
    auto* out = static_cast<Deltas<T>*>(output.mutable_data_ptr());
    const auto encode = [coder](const BoxLanes<T>* lanes, int64_t i) FOCALOPS_INLINE {
      return coder.encode(lanes[0].box(i), lanes[1].box(i));
    };
    for_each_lanes<T>(
        layout,
        [&](int64_t begin, int64_t n, const BoxLanes<T>* lanes) {
          BoxLanes<T> deltas;
          evaluate_rows(encode, lanes, n, deltas);
          interleave(deltas, n, out + begin);
        },
        boxes_of<T>(inputs[0], layout.strides[0]), boxes_of<T>(inputs[1], layout.strides[1]));
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
    auto* out_boxes = static_cast<Box<T>*>(grad_boxes.mutable_data_ptr());
    auto* out_anchors = static_cast<Box<T>*>(grad_anchors.mutable_data_ptr());
    const auto of_box = [coder](const BoxLanes<T>* lanes, int64_t i) FOCALOPS_INLINE {
      return coder.encode_gradient_of_box(lanes[0].deltas(i), lanes[1].box(i), lanes[2].box(i));
    };
    const auto of_anchor = [coder](const BoxLanes<T>* lanes, int64_t i) FOCALOPS_INLINE {
      return coder.encode_gradient_of_anchor(lanes[0].deltas(i), lanes[1].box(i), lanes[2].box(i));
    };
    for_each_lanes<T>(
        layout,
        [&](int64_t begin, int64_t n, const BoxLanes<T>* lanes) {
          BoxLanes<T> grad;
          evaluate_rows(of_box, lanes, n, grad);
          interleave(grad, n, out_boxes + begin);
          evaluate_rows(of_anchor, lanes, n, grad);
          interleave(grad, n, out_anchors + begin);
        },
        deltas_of<T, T>(inputs[0], layout.strides[0]), boxes_of<T>(inputs[1], layout.strides[1]),
        boxes_of<T>(inputs[2], layout.strides[2]));
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
    auto* out = static_cast<Box<T>*>(output.mutable_data_ptr());
    const auto decode = [coder](const BoxLanes<T>* lanes, int64_t i) FOCALOPS_INLINE {
      return coder.decode(lanes[0].deltas(i), lanes[1].box(i));
    };
    for_each_lanes<T>(
        layout,
        [&](int64_t begin, int64_t n, const BoxLanes<T>* lanes) {
          BoxLanes<T> boxes;
          evaluate_rows(decode, lanes, n, boxes);
          interleave(boxes, n, out + begin);
        },
        deltas_of<T, scalar_t>(inputs[0], layout.strides[0]),
        boxes_of<T>(inputs[1], layout.strides[1]));
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
    auto* out_deltas = static_cast<Deltas<scalar_t>*>(grad_deltas.mutable_data_ptr());
    auto* out_anchors = static_cast<Box<T>*>(grad_anchors.mutable_data_ptr());
    const auto of_deltas = [coder](const BoxLanes<T>* lanes, int64_t i) FOCALOPS_INLINE {
      return coder.decode_gradient_of_deltas(lanes[0].box(i), lanes[1].deltas(i), lanes[2].box(i));
    };
    const auto of_anchor = [coder](const BoxLanes<T>* lanes, int64_t i) FOCALOPS_INLINE {
      return coder.decode_gradient_of_anchor(lanes[0].box(i), lanes[1].deltas(i), lanes[2].box(i));
    };
    for_each_lanes<T>(
        layout,
        [&](int64_t begin, int64_t n, const BoxLanes<T>* lanes) {
          BoxLanes<T> grad;
          evaluate_rows(of_deltas, lanes, n, grad);
          interleave(grad, n, out_deltas + begin);
          if (compute_grad_anchors) {
            evaluate_rows(of_anchor, lanes, n, grad);
            interleave(grad, n, out_anchors + begin);
          }
        },
        boxes_of<T>(inputs[0], layout.strides[0]),
        deltas_of<T, scalar_t>(inputs[1], layout.strides[1]),
        boxes_of<T>(inputs[2], layout.strides[2]));
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
