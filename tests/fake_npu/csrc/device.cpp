// Devices, streams and events. Work is done when its call returns, so streams are names and events are times.
#include "fake_npu.h"

#include <c10/core/impl/DeviceGuardImplInterface.h>

#include <atomic>
#include <chrono>
#include <cstdlib>

namespace fake_npu {

namespace {
thread_local c10::DeviceIndex g_current = 0;
thread_local std::vector<c10::StreamId> g_streams;
std::atomic<c10::StreamId> g_last_stream{0};

using Clock = std::chrono::steady_clock;

struct Event {
  Clock::time_point time;
};
}  // namespace

c10::DeviceIndex device_count() {
  static const c10::DeviceIndex count = [] {
    const char* text = std::getenv("FAKE_NPU_DEVICES");
    return static_cast<c10::DeviceIndex>(text ? std::atoi(text) : 2);
  }();
  return count;
}

c10::DeviceIndex current_device() { return g_current; }

void set_device(c10::DeviceIndex index) {
  TORCH_CHECK(index >= 0 && index < device_count(), "npu:", int(index), " does not exist: ", int(device_count()),
              " npu device(s)");
  g_current = index;
}

c10::Device resolve(std::optional<c10::Device> device) {
  const auto index = device && device->has_index() ? device->index() : current_device();
  TORCH_CHECK(index < device_count(), "npu:", int(index), " does not exist: ", int(device_count()), " npu device(s)");
  return {kNpu, index};
}

struct Guard final : c10::impl::DeviceGuardImplInterface {
  c10::DeviceType type() const override { return kNpu; }
  c10::DeviceIndex deviceCount() const noexcept override { return device_count(); }
  c10::Device getDevice() const override { return {kNpu, g_current}; }
  void setDevice(c10::Device device) const override { set_device(device.index()); }
  void uncheckedSetDevice(c10::Device device) const noexcept override {
    if (device.index() >= 0) g_current = device.index();
  }
  c10::Device exchangeDevice(c10::Device device) const override {
    const auto before = getDevice();
    set_device(device.index());
    return before;
  }

  static c10::StreamId& current_stream(c10::Device device) {
    g_streams.resize(device_count(), 0);
    return g_streams[resolve(device).index()];
  }
  c10::Stream getStream(c10::Device device) const override {
    return c10::Stream(c10::Stream::UNSAFE, resolve(device), current_stream(device));
  }
  c10::Stream getDefaultStream(c10::Device device) const override {
    return c10::Stream(c10::Stream::DEFAULT, resolve(device));
  }
  c10::Stream getNewStream(c10::Device device, int) const override {
    return c10::Stream(c10::Stream::UNSAFE, resolve(device), ++g_last_stream);
  }
  c10::Stream getStreamFromGlobalPool(c10::Device device, bool) const override { return getNewStream(device, 0); }
  c10::Stream exchangeStream(c10::Stream stream) const override {
    const auto before = getStream(stream.device());
    current_stream(stream.device()) = stream.id();
    return before;
  }
  bool queryStream(const c10::Stream&) const override { return true; }
  void synchronizeStream(const c10::Stream&) const override {}
  void synchronizeDevice(const c10::DeviceIndex) const override {}

  void record(void** event, const c10::Stream&, const c10::DeviceIndex, const c10::EventFlag) const override {
    if (*event == nullptr) *event = new Event;
    static_cast<Event*>(*event)->time = Clock::now();
  }
  void block(void*, const c10::Stream&) const override {}
  bool queryEvent(void*) const override { return true; }
  void synchronizeEvent(void*) const override {}
  void destroyEvent(void* event, const c10::DeviceIndex) const noexcept override { delete static_cast<Event*>(event); }
  double elapsedTime(void* start, void* end, const c10::DeviceIndex) const override {
    const auto span = static_cast<Event*>(end)->time - static_cast<Event*>(start)->time;
    return std::chrono::duration<double, std::milli>(span).count();
  }
};

C10_REGISTER_GUARD_IMPL(PrivateUse1, Guard);

}  // namespace fake_npu
