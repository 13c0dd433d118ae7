// The formulas of csrc/math over rows of floats from the standard input, to the standard output:
// `math exact` those that promise the same bits everywhere, `math losses` the losses and their
// gradients, in float and then in double, whose differences the reader judges.
#include <cstdio>
#include <cstring>
#include <vector>

#include "../../csrc/math/box.h"
#include "../../csrc/math/row_losses.h"

namespace focalops {
namespace {

constexpr int kColumns = 8;  // of a row: two boxes, or a logit and what is not looked at

// A column of results a formula.
template <typename T>
class Table {
 public:
  explicit Table(std::vector<float> inputs) : inputs_(std::move(inputs)) {}

  int64_t rows() const { return static_cast<int64_t>(inputs_.size()) / kColumns; }

  template <typename F>
  void add(const F& formula) {
    const float* inputs = inputs_.data();
    std::vector<T> column(rows());
    for (int64_t row = 0; row < rows(); ++row) {
      column[row] = formula(inputs + kColumns * row);
    }
    std::fwrite(column.data(), sizeof(T), column.size(), stdout);
  }

 private:
  std::vector<float> inputs_;
};

template <IouKind Kind>
void add_iou(Table<float>& table) {
  constexpr IouFormula<Kind, float> formula{0.0f, 1e-7f};
  table.add([&](const float* row) {
    const Box<float> a = load_box(row), b = load_box(row + 4);
    return formula.value(a, b, iou_terms<Kind>(a), iou_terms<Kind>(b));
  });
}

void add_exact(Table<float>& table) {
  table.add([](const float* row) { return exponential(row[0]); });
  table.add([](const float* row) { return logarithm(row[0]); });
  table.add([](const float* row) { return arctangent(row[0]); });
  add_iou<IouKind::kPlain>(table);
  add_iou<IouKind::kForeground>(table);
  add_iou<IouKind::kGeneralized>(table);
  add_iou<IouKind::kDistance>(table);
  add_iou<IouKind::kComplete>(table);
}

template <typename T, typename Loss>
void add_loss(Table<T>& table, const Loss& loss) {
  table.add([&](const float* row) { return loss.negative(static_cast<T>(row[0])).loss; });
  table.add([&](const float* row) { return loss.negative(static_cast<T>(row[0])).grad; });
  table.add([&](const float* row) { return loss.positive(static_cast<T>(row[0]), T(1)).loss; });
  table.add([&](const float* row) { return loss.positive(static_cast<T>(row[0]), T(1)).grad; });
}

template <typename T>
void add_losses(const std::vector<float>& inputs) {
  Table<T> table(inputs);
  const AlphaBalance<T> alpha(0.25);
  add_loss(table, FocalLoss<T, 2>{alpha, T(2)});
  add_loss(table, FocalLoss<T, kThreeHalves>{alpha, T(1.5)});
  add_loss(table, FocalLoss<T, kAnyGamma>{alpha, T(0.5)});
  add_loss(table, QualityFocalLoss<T, 2>{{AlphaBalance<T>(-1), T(2)}});
}

std::vector<float> read_all() {
  std::vector<float> values;
  float buffer[1024];
  while (const size_t n = std::fread(buffer, sizeof(float), 1024, stdin)) {
    values.insert(values.end(), buffer, buffer + n);
  }
  return values;
}

}  // namespace
}  // namespace focalops

int main(int count, char** arguments) {
  using namespace focalops;
  const std::vector<float> inputs = read_all();
  if (count == 2 && std::strcmp(arguments[1], "exact") == 0) {
    Table<float> table(inputs);
    add_exact(table);
  } else if (count == 2 && std::strcmp(arguments[1], "losses") == 0) {
    add_losses<float>(inputs);
    add_losses<double>(inputs);
  } else {
    return 2;
  }
}
