// Which instruction sets this machine has.
#include <torch/extension.h>

#include "kernels.h"

namespace npu_rec {
namespace {

bool has(const std::string& isa) {
#if defined(__x86_64__) && defined(__GNUC__)
  if (isa == "avx512")
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") &&
           __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512bw");
  if (isa == "avx2") return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
#endif
  return isa == "plain";
}

Kernels built(const std::string& isa) {
  if (isa == "avx512") return kernels_avx512();
  if (isa == "avx2") return kernels_avx2();
  return kernels_plain();
}

}  // namespace

std::vector<std::string> instruction_sets() {
  std::vector<std::string> usable;
  for (const char* isa : {"avx512", "avx2", "plain"})
    if (has(isa) && built(isa).vector) usable.push_back(isa);
  return usable;
}

Kernels kernels_of(const std::string& isa) {
  TORCH_CHECK(has(isa) && built(isa).vector, "this machine does not run ", isa, " kernels");
  return built(isa);
}

}  // namespace npu_rec
