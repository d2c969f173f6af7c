// What the Python stand-in calls, as torch.ops.fake_npu.*.
#include "fake_npu.h"

#include <torch/library.h>

namespace fake_npu {

void set_strict(const std::vector<std::string>& reviewed, const std::vector<std::string>& unsupported,
                const std::vector<std::string>& reasons);

namespace {
void manual_seed(int64_t index, int64_t seed) {
  auto generator = default_generator(static_cast<c10::DeviceIndex>(index));
  generator.set_current_seed(static_cast<uint64_t>(seed));
}
at::Tensor get_rng_state(int64_t index) { return default_generator(static_cast<c10::DeviceIndex>(index)).get_state(); }
void set_rng_state(int64_t index, const at::Tensor& state) {
  auto generator = default_generator(static_cast<c10::DeviceIndex>(index));
  generator.set_state(state);
}
int64_t count() { return device_count(); }
int64_t total_memory() { return static_cast<int64_t>(memory_limit()); }
}  // namespace

TORCH_LIBRARY(fake_npu, m) {
  m.def("set_strict(str[] reviewed, str[] unsupported, str[] reasons) -> ()",
        [](std::vector<std::string> reviewed, std::vector<std::string> unsupported, std::vector<std::string> reasons) {
          set_strict(reviewed, unsupported, reasons);
        });
  m.def("device_count() -> int", &count);
  m.def("manual_seed(int device, int seed) -> ()", &manual_seed);
  m.def("get_rng_state(int device) -> Tensor", &get_rng_state);
  m.def("set_rng_state(int device, Tensor state) -> ()", &set_rng_state);
  m.def("total_memory() -> int", &total_memory);
  m.def("cpu_alias(Tensor(a) tensor) -> Tensor(a)");
  m.impl("cpu_alias", c10::DispatchKey::PrivateUse1, &cpu_alias);
  m.impl("cpu_alias", c10::DispatchKey::CPU, &cpu_alias);
}

}  // namespace fake_npu
