// The losses of rows refuse these arguments; the table says what the numbers of each loss must be.
#pragma once

#include <iterator>
#include <optional>
#include <string>
#include <vector>

#include "../math/row_losses.h"
#include "focal_loss.h"

namespace focalops {

inline void check_parameter(const char* op, const Parameter& parameter, double given) {
  switch (parameter.domain) {
    case Domain::kAny:
      return;
    case Domain::kNonNegative:
      return check_non_negative(op, parameter.name, given);
    case Domain::kUnit:
      return check_unit(op, parameter.name, given);
    case Domain::kUnitOrNone:
      return check_unit_or_none(op, parameter.name, given);
  }
}

// Calls f with the member of row_losses::All that `loss` names.
template <typename F>
void with_row_loss(const char* op, const std::string& loss, F&& f) {
  if (!row_losses::All::find(loss, f)) {
    fail(op, ": loss must be one of ", row_losses::All::names(), ", got '", loss, "'");
  }
}

// `op` takes the parameters, `name` has the sentences about each.
template <typename Loss>
void check_parameters(const char* op, const char* name, const std::vector<double>& given) {
  if (given.size() != std::size(Loss::kParameters)) {
    std::string names;
    for (const Parameter& parameter : Loss::kParameters) {
      names += (names.empty() ? "" : ", ") + std::string(parameter.name);
    }
    fail(op, ": parameters must be those of ", Loss::kName, ", (", names, "), got ", given.size(),
         " numbers");
  }
  for (size_t i = 0; i < given.size(); ++i) {
    check_parameter(name, Loss::kParameters[i], given[i]);
  }
}

// Says whether the classes of a row exclude each other.
inline bool check_class_indices(const Tensor& targets, const std::string& loss) {
  bool is_softmax = false;
  with_row_loss("_class_indices", loss,
                [&](auto member) { is_softmax = decltype(member)::kIsSoftmax; });
  if (!is_index(targets.scalar_type())) {
    fail(loss, ": class-index targets must be int32 or int64, got ", dtype_of(targets));
  }
  return is_softmax;
}

inline void check_row_loss(const std::string& loss, const Tensor& inputs, const Tensor& targets,
                           const std::optional<Tensor>& scores,
                           const std::vector<double>& parameters,
                           const std::optional<Tensor>& weight,
                           const std::optional<Tensor>& class_weight,
                           const std::optional<Tensor>& normalizer) {
  with_row_loss("row_loss_sum", loss, [&](auto member) {
    using Loss = decltype(member);
    const char* op = Loss::kName;
    check_parameters<Loss>("row_loss_sum", op, parameters);
    check_targets(op, inputs, targets, false);
    if constexpr (Loss::kIsSoftmax) {
      check_classes(op, inputs);
    }
    const ScalarType dtype = compute_dtype(inputs.scalar_type());
    check_row_numbers(op, "scores", scores, "targets", targets, dtype);
    check_row_numbers(op, "weight", weight, "targets", targets, dtype);
    check_class_weight(op, class_weight, inputs, inputs.size(inputs.dim() - 1), !Loss::kIsSoftmax);
    check_normalizer(op, inputs, normalizer);
  });
}

}  // namespace focalops
