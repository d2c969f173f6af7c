// The same memory seen as a CPU tensor.
#include "fake_npu.h"

namespace fake_npu {

at::Tensor cpu_alias(const at::Tensor& tensor) {
  if (!tensor.defined() || !tensor.is_privateuseone()) return tensor;
  const auto& owner = tensor.storage();
  // The alias may be resized (an `out=` tensor): its storage then gets CPU memory of its own.
  auto* context = new c10::Storage(owner);
  c10::Storage storage(
      c10::Storage::use_byte_size_t(), owner.nbytes(),
      at::DataPtr(const_cast<void*>(owner.data()), context, [](void* kept) { delete static_cast<c10::Storage*>(kept); },
                  c10::kCPU),
      c10::GetAllocator(c10::kCPU), /*resizable=*/true);
  auto alias = at::detail::make_tensor<c10::TensorImpl>(
      std::move(storage), c10::DispatchKeySet(c10::DispatchKey::CPU), tensor.dtype());
  alias.unsafeGetTensorImpl()->set_sizes_and_strides(tensor.sizes(), tensor.strides(), tensor.storage_offset());
  return alias;
}

at::Tensor copy_to_npu(const at::Tensor& cpu, c10::Device device) {
  const auto options = cpu.options().device(device).pinned_memory(false);
  auto out = cpu.is_non_overlapping_and_dense() ? at::empty_strided(cpu.sizes(), cpu.strides(), options)
                                                : at::empty(cpu.sizes(), options);
  cpu_alias(out).copy_(cpu);
  return out;
}

}  // namespace fake_npu
