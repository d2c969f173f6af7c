// Random integers on the CPU: spreads the keys over threads. Arguments as in npu_rec.ops.random.random_integers.
#include "ops.h"

namespace npu_rec {

Tensor random_integers(const Tensor& all_keys, int64_t count, int64_t high, const std::string& isa) {
  const Kernels kernels = kernels_of(isa);
  const Tensor keys = all_keys.contiguous();
  std::vector<int64_t> sizes = keys.sizes().vec();
  sizes.push_back(count);
  Tensor out = at::empty(sizes, keys.options());
  RandomTask task{};
  task.width = count, task.high = uint64_t(high);
  task.keys = keys.const_data_ptr<int64_t>(), task.out = out.mutable_data_ptr<int64_t>();
  for_rows(keys.numel(), count, [&](int64_t begin, int64_t end) {
    RandomTask t = task;
    t.begin = begin, t.end = end;
    kernels.random_integers(t);
  });
  return out;
}

}  // namespace npu_rec
