// Every operator without a kernel of its own: run the CPU's on aliases of the arguments, in place, and copy new
// results to the device. Unlike PyTorch's cpu_fallback it copies no inputs, draws from the device's generators, and
// refuses arguments of different devices.
#include "fake_npu.h"

#include <torch/library.h>

namespace fake_npu {

namespace {

class Call {
 public:
  Call(const c10::OperatorHandle& op, torch::jit::Stack* stack) : op_(op), stack_(stack) {}

  void run() {
    const auto& schema = op_.schema();
    const size_t count = schema.arguments().size(), first = stack_->size() - count;
    find_device(first);
    check_operator(op_.operator_name().name, dtype_);
    for (size_t i = 0; i < count; ++i) (*stack_)[first + i] = to_cpu((*stack_)[first + i], schema.arguments()[i]);
    {
      const at::AutoDispatchBelowADInplaceOrView guard;
      op_.redispatchBoxed(c10::DispatchKeySet(c10::DispatchKey::CPU), stack_);
    }
    for (auto& [cpu, npu] : written_) write_back(cpu, npu);
    for (auto& [cpu, npu] : generators_) npu.set_state(cpu.get_state());
    const size_t results = schema.returns().size(), start = stack_->size() - results;
    for (size_t i = 0; i < results; ++i) (*stack_)[start + i] = to_npu((*stack_)[start + i]);
  }

 private:
  // The device of the arguments; one for all, but for scalars and indices, which a real card takes from the host.
  void find_device(size_t first) {
    const auto name = op_.operator_name().name;
    const bool indexing = name.rfind("aten::index", 0) == 0 || name.rfind("aten::_index_put", 0) == 0;
    bool on_host = false;
    const auto look = [&](const at::Tensor& tensor) {
      if (!tensor.defined()) return;
      if (!tensor.is_privateuseone()) {
        on_host = on_host || tensor.dim() > 0;
        return;
      }
      TORCH_CHECK(!device_ || *device_ == tensor.device(), name, ": arguments are on ", *device_, " and ",
                  tensor.device());
      device_ = tensor.device();
      if (!dtype_) dtype_ = tensor.scalar_type();
    };
    for (size_t i = first; i < stack_->size(); ++i) {
      const auto& value = (*stack_)[i];
      if (value.isTensor()) look(value.toTensor());
      if (value.isTensorList())
        for (const at::Tensor& tensor : value.toTensorList()) look(tensor);
      if (value.isOptionalTensorList())
        for (const std::optional<at::Tensor>& tensor : value.toOptionalTensorList())
          if (tensor) look(*tensor);
      if (value.isDevice() && value.toDevice().type() == kNpu) device_ = device_.value_or(resolve(value.toDevice()));
    }
    TORCH_CHECK(!device_ || !on_host || indexing, name, ": arguments are on cpu and ", *device_);
    if (!device_) device_ = c10::Device(kNpu, current_device());
  }

  at::Tensor alias(const at::Tensor& tensor) {
    for (auto& [cpu, npu] : aliases_)
      if (npu.is_same(tensor)) return cpu;
    aliases_.emplace_back(cpu_alias(tensor), tensor);
    return aliases_.back().first;
  }

  c10::IValue to_cpu(const c10::IValue& value, const c10::Argument& argument) {
    const bool writes = argument.alias_info() && argument.alias_info()->isWrite();
    const auto tensor = [&](const at::Tensor& given) {
      if (!given.defined() || !given.is_privateuseone()) return given;
      const auto cpu = alias(given);
      if (writes) written_.emplace_back(cpu, given);
      return cpu;
    };
    if (value.isTensor()) return tensor(value.toTensor());
    if (value.isTensorList()) {
      c10::List<at::Tensor> list;
      for (const at::Tensor& given : value.toTensorList()) list.push_back(tensor(given));
      return list;
    }
    if (value.isOptionalTensorList()) {
      c10::List<std::optional<at::Tensor>> list;
      for (const std::optional<at::Tensor>& given : value.toOptionalTensorList())
        list.push_back(given ? std::optional<at::Tensor>(tensor(*given)) : std::nullopt);
      return list;
    }
    if (value.isDevice()) return c10::Device(c10::kCPU);
    const bool draws = argument.type()->isSubtypeOf(*c10::OptionalType::create(c10::GeneratorType::get()));
    if (draws && (value.isNone() || value.toGenerator().device().type() == kNpu)) {
      auto npu = value.isNone() ? default_generator(device_->index()) : value.toGenerator();
      auto cpu = at::detail::createCPUGenerator();
      cpu.set_state(npu.get_state());
      generators_.emplace_back(cpu, npu);
      return cpu;
    }
    return value;
  }

  // An `out=` tensor that the CPU's kernel resized or moved.
  static void write_back(const at::Tensor& cpu, const at::Tensor& npu) {
    if (cpu.sizes() == npu.sizes() && cpu.strides() == npu.strides() && cpu.data_ptr() == npu.data_ptr()) return;
    npu.resize_(cpu.sizes());
    cpu_alias(npu).copy_(cpu);
  }

  at::Tensor to_npu(const at::Tensor& result) {
    if (!result.defined()) return result;
    for (auto& [cpu, npu] : aliases_) {
      if (cpu.is_same(result)) return npu;
      if (cpu.is_alias_of(result) && result.numel() > 0) {  // a view
        TORCH_CHECK(cpu.scalar_type() == result.scalar_type(), op_.operator_name(), ": a view of another dtype");
        return npu.as_strided(result.sizes(), result.strides(), result.storage_offset());
      }
    }
    return copy_to_npu(result, *device_);
  }
  c10::IValue to_npu(const c10::IValue& value) {
    if (value.isTensor()) return to_npu(value.toTensor());
    if (!value.isTensorList()) return value;
    c10::List<at::Tensor> list;
    for (const at::Tensor& result : value.toTensorList()) list.push_back(to_npu(result));
    return list;
  }

  const c10::OperatorHandle& op_;
  torch::jit::Stack* stack_;
  std::optional<c10::Device> device_;
  std::optional<c10::ScalarType> dtype_;  // of the first tensor: what the documented limits speak of
  std::vector<std::pair<at::Tensor, at::Tensor>> aliases_, written_;
  std::vector<std::pair<at::Generator, at::Generator>> generators_;
};

void fallback(const c10::OperatorHandle& op, torch::jit::Stack* stack) { Call(op, stack).run(); }

}  // namespace

TORCH_LIBRARY_IMPL(_, PrivateUse1, m) { m.fallback(torch::CppFunction::makeFromBoxedFunction<&fallback>()); }

// Where PyTorch would take the operator apart for a device without a kernel, and torch_npu has one.
TORCH_LIBRARY_IMPL(aten, PrivateUse1, m) {
  m.impl("native_layer_norm", torch::CppFunction::makeFromBoxedFunction<&fallback>());
}

}  // namespace fake_npu
