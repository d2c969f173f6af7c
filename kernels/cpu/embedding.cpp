// Embedding lookup on the CPU: gathers rows; groups occurrences by id for the gradient or the update of the table.
// Arguments as in npu_rec.ops.embedding_lookup.
#include <ATen/Parallel.h>

#include <algorithm>
#include <cstring>
#include <memory>
#include <utility>

#include "ops.h"

namespace npu_rec {
namespace {

constexpr int64_t ROWS_FOR_A_THREAD = 1 << 12;  // fewer are not worth waking one
constexpr int64_t IDS_FOR_A_THREAD = 1 << 15;   // the same for sorting
constexpr int64_t AHEAD = 8;                    // rows whose memory is asked for before their turn

int64_t pieces_of(int64_t work, int64_t for_a_thread) {
  return std::max<int64_t>(1, std::min<int64_t>(at::get_num_threads(), work / for_a_thread + 1));
}

// body(piece, begin, end) for equal pieces of 0..total.
template <typename Body>
void in_pieces(int64_t total, int64_t pieces, const Body& body) {
  at::parallel_for(0, pieces, 1, [&](int64_t first, int64_t last) {
    for (int64_t piece = first; piece < last; ++piece)
      body(piece, total * piece / pieces, total * (piece + 1) / pieces);
  });
}

// The occurrences of ids sorted by id, equal ones by place: a radix sort from the lowest digit up.
class Occurrences {
 public:
  Occurrences(const Tensor& tensor, int64_t rows)
      : count(tensor.numel()), sorted(new Occurrence[count]), other(new Occurrence[count]) {
    const Tensor ids = tensor.contiguous();
    const int64_t* id = ids.const_data_ptr<int64_t>();
    in_pieces(count, pieces_of(count, IDS_FOR_A_THREAD), [&](int64_t, int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        TORCH_CHECK_INDEX(id[i] >= 0 && id[i] < rows, "id ", id[i], " is out of range of a table of ", rows, " rows");
        sorted[i] = {id[i], i};
      }
    });
    int bits = 1;
    while (bits < 63 && rows > int64_t(1) << bits) ++bits;
    const int digits = (bits + 11) / 12, width = (bits + digits - 1) / digits;
    for (int digit = 0; digit < digits; ++digit) sort_by(digit * width, width);
  }

  const Occurrence* begin() const { return sorted.get(); }

  // The first occurrence of `id` or of a later one.
  int64_t find(int64_t id) const {
    const auto before = [](const Occurrence& a, int64_t b) { return a.id < b; };
    return std::lower_bound(sorted.get(), sorted.get() + count, id, before) - sorted.get();
  }

  const int64_t count;

 private:
  std::unique_ptr<Occurrence[]> sorted, other;

  void sort_by(int shift, int width) {
    const int64_t pieces = pieces_of(count, IDS_FOR_A_THREAD), values = int64_t(1) << width;
    const auto value = [&](const Occurrence& x) { return x.id >> shift & (values - 1); };
    std::vector<int64_t> places(pieces * values);  // of a piece and a value: first how many, then where the next goes
    in_pieces(count, pieces, [&](int64_t piece, int64_t begin, int64_t end) {
      int64_t* counts = places.data() + piece * values;
      for (int64_t i = begin; i < end; ++i) ++counts[value(sorted[i])];
    });
    int64_t next = 0;
    for (int64_t v = 0; v < values; ++v)
      for (int64_t piece = 0; piece < pieces; ++piece) next += std::exchange(places[piece * values + v], next);
    in_pieces(count, pieces, [&](int64_t piece, int64_t begin, int64_t end) {
      int64_t* to = places.data() + piece * values;
      for (int64_t i = begin; i < end; ++i) other[to[value(sorted[i])]++] = sorted[i];
    });
    sorted.swap(other);
  }
};

RowsTask task_of(const Tensor& grad, const Tensor& table, const Occurrences& occurrences) {
  TORCH_CHECK(
      grad.size(0) == occurrences.count && grad.size(1) == table.size(1) && grad.scalar_type() == table.scalar_type(),
      "grad and table do not fit");
  RowsTask task{};
  task.occurrences = occurrences.begin();
  task.width = table.size(1);
  task.dtype = dtype_of(table);
  task.grad = grad.const_data_ptr();
  task.stride_grad = grad.stride(0);
  return task;
}

// kernel(task) for pieces of the occurrences, cut where an id ends. So each row of the table belongs to one thread,
// and the bits do not depend on their number.
void run_pieces(
    const RowsTask& task, const Occurrences& occurrences, void (*kernel)(const RowsTask&), int vector) {
  const auto cut = [&](int64_t at) {
    return at == occurrences.count ? at : occurrences.find(occurrences.begin()[at].id);
  };
  const int64_t pieces = pieces_of(occurrences.count, ROWS_FOR_A_THREAD);
  in_pieces(occurrences.count, pieces, [&](int64_t, int64_t begin, int64_t end) {
    std::unique_ptr<float[]> scratch(new float[task.width + vector]);
    RowsTask t = task;
    t.first = cut(begin), t.last = cut(end);
    t.scratch = scratch.get();
    kernel(t);
  });
}

}  // namespace

Tensor embedding_forward(const Tensor& table, const Tensor& ids) {
  const Tensor index = ids.contiguous();
  const int64_t total = index.numel(), bytes = table.size(1) * table.element_size();
  Tensor out = at::empty({total, table.size(1)}, table.options());
  const int64_t* id = index.const_data_ptr<int64_t>();
  const char* from = static_cast<const char*>(table.const_data_ptr());
  char* to = static_cast<char*>(out.mutable_data_ptr());
  in_pieces(total, pieces_of(total, ROWS_FOR_A_THREAD), [&](int64_t, int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      if (i + AHEAD < end)
        for (int64_t b = 0; b < bytes && b < 512; b += 64) __builtin_prefetch(from + id[i + AHEAD] * bytes + b);
      std::memcpy(to + i * bytes, from + id[i] * bytes, bytes);
    }
  });
  return out;
}

Tensor embedding_backward(const Tensor& grad, const Tensor& table, const Tensor& ids, const std::string& isa) {
  const Kernels kernels = kernels_of(isa);
  const Tensor g = with_whole_rows(grad.to(table.scalar_type()));
  const Occurrences occurrences(ids, table.size(0));
  RowsTask task = task_of(g, table, occurrences);
  Tensor d_table = at::zeros(table.sizes(), table.options());
  task.d_table = d_table.mutable_data_ptr();
  run_pieces(task, occurrences, kernels.row_gradients, kernels.vector);
  return d_table;
}

void embedding_update(
    const Tensor& grad, const Tensor& table, const Tensor& ids, const OptionalTensor& square,
    const OptionalTensor& momentum, double lr, double beta1, double beta2, double rest2, double correction2, double eps,
    double max_norm, const std::string& isa) {
  const Kernels kernels = kernels_of(isa);
  const Tensor g = with_whole_rows(grad.to(table.scalar_type()));
  const Occurrences occurrences(ids, table.size(0));
  RowsTask task = task_of(g, table, occurrences);
  task.table = table.mutable_data_ptr();
  if (square) task.square = square->mutable_data_ptr<float>();
  if (momentum) task.momentum = momentum->mutable_data_ptr<float>();
  task.lr = float(lr), task.eps = float(eps), task.max_norm = float(max_norm);
  task.beta1 = float(beta1), task.rest1 = float(1.0 - beta1);
  task.beta2 = float(beta2), task.rest2 = float(rest2), task.correction2 = float(correction2);
  run_pieces(task, occurrences, kernels.update_rows, kernels.vector);
}

}  // namespace npu_rec
