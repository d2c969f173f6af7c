// Memory of the devices, counted to the byte, and pinned memory of the host.
//
// A real allocator rounds a request up (512 bytes) and keeps what is freed: here `allocated` and `reserved` are both
// exactly the bytes of live tensors. What a CPU kernel needs inside is not counted.
#include "fake_npu.h"

#include <ATen/core/CachingHostAllocator.h>
#include <c10/core/CachingDeviceAllocator.h>

#include <cstdlib>
#include <map>
#include <mutex>

namespace fake_npu {

namespace {

struct Block {
  size_t bytes;
  c10::DeviceIndex device;
};

// Blocks by address, so that a pointer into the middle of one finds it.
class Blocks {
 public:
  void* add(size_t bytes, c10::DeviceIndex device) {
    void* pointer = std::aligned_alloc(64, (bytes + 63) / 64 * 64);
    TORCH_CHECK(pointer, "the host has no ", bytes, " bytes");
    blocks_[reinterpret_cast<uintptr_t>(pointer)] = {bytes, device};
    return pointer;
  }
  Block take(void* pointer) {
    const auto found = blocks_.find(reinterpret_cast<uintptr_t>(pointer));
    TORCH_INTERNAL_ASSERT(found != blocks_.end());
    const Block block = found->second;
    blocks_.erase(found);
    std::free(pointer);
    return block;
  }
  const Block* find(const void* pointer) const {
    const auto address = reinterpret_cast<uintptr_t>(pointer);
    auto after = blocks_.upper_bound(address);
    if (after == blocks_.begin()) return nullptr;
    --after;
    return address < after->first + after->second.bytes ? &after->second : nullptr;
  }

 private:
  std::map<uintptr_t, Block> blocks_;
};

// Never destroyed: tensors may outlive static objects at the end of the process.
std::mutex& g_mutex = *new std::mutex;
Blocks& g_device_blocks = *new Blocks;
Blocks& g_pinned_blocks = *new Blocks;

using c10::CachingDeviceAllocator::DeviceStats;

struct DeviceAllocator final : c10::DeviceAllocator {
  at::DataPtr allocate(size_t bytes) override {
    const c10::Device device(kNpu, current_device());
    if (bytes == 0) return {nullptr, device};
    std::lock_guard lock(g_mutex);
    auto& stats = of(device.index());
    const auto used = static_cast<size_t>(stats.allocated_bytes[0].current);
    TORCH_CHECK_WITH(OutOfMemoryError, used + bytes <= memory_limit(), "npu:", int(device.index()),
                     " is out of memory: ", used, " of ", memory_limit(), " bytes are in use, ", bytes, " more asked");
    void* pointer = g_device_blocks.add(bytes, device.index());
    for (auto* counted : {&stats.allocated_bytes, &stats.reserved_bytes, &stats.active_bytes, &stats.requested_bytes})
      (*counted)[0].increase(bytes);
    for (auto* counted : {&stats.allocation, &stats.active, &stats.segment}) (*counted)[0].increase(1);
    return {pointer, pointer, &free, device};
  }
  static void free(void* pointer);
  at::DeleterFnPtr raw_deleter() const override { return &free; }
  void copy_data(void* to, const void* from, size_t bytes) const override { default_copy_data(to, from, bytes); }

  bool initialized() override { return true; }
  void emptyCache(c10::MempoolId_t) override {}
  void recordStream(const at::DataPtr&, c10::Stream) override {}
  DeviceStats getDeviceStats(c10::DeviceIndex device) override {
    std::lock_guard lock(g_mutex);
    return of(device);
  }
  void resetPeakStats(c10::DeviceIndex device) override {
    each(device, [](c10::CachingAllocator::Stat& stat) { stat.reset_peak(); });
  }
  void resetAccumulatedStats(c10::DeviceIndex device) override {
    each(device, [](c10::CachingAllocator::Stat& stat) { stat.reset_accumulated(); });
  }
  std::pair<size_t, size_t> getMemoryInfo(c10::DeviceIndex device) override {
    std::lock_guard lock(g_mutex);
    return {memory_limit() - static_cast<size_t>(of(device).allocated_bytes[0].current), memory_limit()};
  }

  DeviceStats& of(c10::DeviceIndex device) {
    stats_.resize(device_count());
    return stats_.at(device);
  }
  template <typename F>
  void each(c10::DeviceIndex device, F change) {
    std::lock_guard lock(g_mutex);
    auto& stats = of(device);
    for (auto* counted : {&stats.allocated_bytes, &stats.reserved_bytes, &stats.active_bytes, &stats.requested_bytes,
                          &stats.allocation, &stats.active, &stats.segment})
      change((*counted)[0]);
  }

 private:
  std::vector<DeviceStats> stats_;
};

DeviceAllocator& g_allocator = *new DeviceAllocator;

void DeviceAllocator::free(void* pointer) {
  if (pointer == nullptr) return;
  std::lock_guard lock(g_mutex);
  const Block block = g_device_blocks.take(pointer);
  auto& stats = g_allocator.of(block.device);
  for (auto* counted : {&stats.allocated_bytes, &stats.reserved_bytes, &stats.active_bytes, &stats.requested_bytes})
    (*counted)[0].decrease(block.bytes);
  for (auto* counted : {&stats.allocation, &stats.active, &stats.segment}) (*counted)[0].decrease(1);
}

struct PinnedAllocator final : at::HostAllocator {
  at::DataPtr allocate(size_t bytes) override {
    if (bytes == 0) return {nullptr, c10::kCPU};
    std::lock_guard lock(g_mutex);
    void* pointer = g_pinned_blocks.add(bytes, -1);
    return {pointer, pointer, &free, c10::kCPU};
  }
  static void free(void* pointer) {
    if (pointer == nullptr) return;
    std::lock_guard lock(g_mutex);
    g_pinned_blocks.take(pointer);
  }
  at::DeleterFnPtr raw_deleter() const override { return &free; }
  void copy_data(void* to, const void* from, size_t bytes) const override { default_copy_data(to, from, bytes); }
  bool record_event(void*, void*, c10::Stream) override { return true; }
  void empty_cache() override {}
  at::HostStats get_stats() override { return {}; }
  void reset_accumulated_stats() override {}
  void reset_peak_stats() override {}
};

PinnedAllocator& g_pinned = *new PinnedAllocator;

}  // namespace

c10::Allocator* device_allocator() { return &g_allocator; }
c10::Allocator* pinned_allocator() { return &g_pinned; }

size_t memory_limit() {
  static const size_t limit = [] {
    const char* text = std::getenv("FAKE_NPU_MEMORY");
    return text ? std::strtoull(text, nullptr, 10) : size_t{64} << 30;
  }();
  return limit;
}

bool is_pinned(const void* pointer) {
  std::lock_guard lock(g_mutex);
  return g_pinned_blocks.find(pointer) != nullptr;
}

std::optional<c10::Device> device_of_pointer(const void* pointer) {
  std::lock_guard lock(g_mutex);
  const Block* block = g_device_blocks.find(pointer);
  if (block == nullptr) return std::nullopt;
  return c10::Device(kNpu, block->device);
}

REGISTER_ALLOCATOR(c10::DeviceType::PrivateUse1, &g_allocator);

}  // namespace fake_npu

namespace {
at::HostAllocatorRegistry<c10::DeviceType::PrivateUse1> g_register_pinned(
    static_cast<at::HostAllocator*>(fake_npu::pinned_allocator()));
}  // namespace
