// A device called "npu" on host memory: what the parts share. It computes with PyTorch's CPU kernels and is as
// strict as a real card about what lives where.
#pragma once

#include <ATen/ATen.h>
#include <ATen/CPUGeneratorImpl.h>
#include <c10/core/Device.h>

namespace fake_npu {

constexpr auto kNpu = c10::DeviceType::PrivateUse1;

// device.cpp
c10::DeviceIndex device_count();  // FAKE_NPU_DEVICES, 2 by default
c10::DeviceIndex current_device();
void set_device(c10::DeviceIndex index);
c10::Device resolve(std::optional<c10::Device> device);  // a missing index means the current device

// allocator.cpp
c10::Allocator* device_allocator();
c10::Allocator* pinned_allocator();
size_t memory_limit();  // FAKE_NPU_MEMORY in bytes, 64 GiB by default
bool is_pinned(const void* pointer);
std::optional<c10::Device> device_of_pointer(const void* pointer);

// generator.cpp
const at::Generator& default_generator(c10::DeviceIndex index);  // -1: of the current device
at::Generator new_generator(c10::DeviceIndex index);

// alias.cpp
at::Tensor cpu_alias(const at::Tensor& tensor);  // the same memory as a CPU tensor; a CPU tensor is itself
at::Tensor copy_to_npu(const at::Tensor& cpu, c10::Device device);

// strict.cpp
void check_operator(const std::string& name, std::optional<c10::ScalarType> dtype);

}  // namespace fake_npu
