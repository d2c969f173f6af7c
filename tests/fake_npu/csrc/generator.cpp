// Random generators, one default a device, and the hooks by which PyTorch reaches the device.
// A generator is the CPU's Mersenne twister under the device's name: equal seeds draw what the CPU draws.
#include "fake_npu.h"

#include <ATen/detail/PrivateUse1HooksInterface.h>

namespace fake_npu {

namespace {

struct NpuGenerator final : at::CPUGeneratorImpl {
  explicit NpuGenerator(c10::DeviceIndex index) {
    device_ = c10::Device(kNpu, index);
    key_set_ = c10::DispatchKeySet(c10::DispatchKey::PrivateUse1);
  }

 private:
  NpuGenerator* clone_impl() const override {
    auto* copy = new NpuGenerator(device_.index());
    copy->set_engine(const_cast<NpuGenerator*>(this)->engine());
    return copy;
  }
};

struct Hooks final : at::PrivateUse1HooksInterface {
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return device_count() > 0; }
  bool hasPrimaryContext(c10::DeviceIndex) const override { return true; }
  c10::DeviceIndex deviceCount() const override { return device_count(); }
  void setCurrentDevice(c10::DeviceIndex device) const override { set_device(device); }
  c10::DeviceIndex getCurrentDevice() const override { return current_device(); }
  c10::DeviceIndex exchangeDevice(c10::DeviceIndex device) const override {
    const auto before = current_device();
    set_device(device);
    return before;
  }
  c10::DeviceIndex maybeExchangeDevice(c10::DeviceIndex device) const override { return exchangeDevice(device); }
  bool isPinnedPtr(const void* pointer) const override { return is_pinned(pointer); }
  at::Allocator* getPinnedMemoryAllocator() const override { return pinned_allocator(); }
  at::Device getDeviceFromPtr(void* pointer) const override {
    const auto device = device_of_pointer(pointer);
    TORCH_CHECK(device, "this address is not memory of an npu");
    return *device;
  }
  const at::Generator& getDefaultGenerator(c10::DeviceIndex index) const override { return default_generator(index); }
  at::Generator getNewGenerator(c10::DeviceIndex index) const override { return new_generator(index); }
  void resizePrivateUse1Bytes(const c10::Storage& storage, size_t bytes) const override {
    const c10::OptionalDeviceGuard guard(storage.device());
    auto data = device_allocator()->allocate(bytes);
    device_allocator()->copy_data(data.mutable_get(), storage.data(), std::min(bytes, storage.nbytes()));
    storage.set_data_ptr_noswap(std::move(data));
    storage.set_nbytes(bytes);
  }
};

const bool g_registered = [] {
  at::RegisterPrivateUse1HooksInterface(new Hooks);
  return true;
}();

}  // namespace

at::Generator new_generator(c10::DeviceIndex index) {
  return at::make_generator<NpuGenerator>(index < 0 ? current_device() : index);
}

const at::Generator& default_generator(c10::DeviceIndex index) {
  static const std::vector<at::Generator> generators = [] {
    std::vector<at::Generator> made;
    for (c10::DeviceIndex device = 0; device < device_count(); ++device) made.push_back(new_generator(device));
    return made;
  }();
  return generators.at(index < 0 ? current_device() : index);
}

}  // namespace fake_npu
