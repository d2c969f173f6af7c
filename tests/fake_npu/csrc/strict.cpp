// Strict mode: which operators may run on the device. The lists are data (../operators/), handed over by Python.
#include "fake_npu.h"

#include <unordered_map>
#include <unordered_set>

namespace fake_npu {

namespace {
bool g_strict = false;
std::unordered_set<std::string> g_reviewed;
std::unordered_map<std::string, std::string> g_unsupported;  // "operator" or "operator/dtype" -> why
}  // namespace

// `aten::add_.Tensor` is the operator `add`: overloads and in-place forms are one.
std::string base_name(const std::string& name) {
  const bool aten = name.rfind("aten::", 0) == 0;
  std::string base = aten ? name.substr(6) : name;
  if (base.size() > 1 && base.back() == '_' && base[base.size() - 2] != '_') base.pop_back();
  return base;
}

void set_strict(const std::vector<std::string>& reviewed, const std::vector<std::string>& unsupported,
                const std::vector<std::string>& reasons) {
  g_strict = true;
  g_reviewed = {reviewed.begin(), reviewed.end()};
  for (size_t i = 0; i < unsupported.size(); ++i) g_unsupported[unsupported[i]] = reasons[i];
}

void check_operator(const std::string& name, std::optional<c10::ScalarType> dtype) {
  if (!g_strict) return;
  const auto base = base_name(name);
  for (const auto& rule : {base, dtype ? base + "/" + c10::toString(*dtype) : base}) {
    const auto found = g_unsupported.find(rule);
    TORCH_CHECK_NOT_IMPLEMENTED(found == g_unsupported.end(), "fake npu, strict: ", rule,
                                " does not run on Ascend: ", found->second);
  }
  TORCH_CHECK_NOT_IMPLEMENTED(g_reviewed.count(base), "fake npu, strict: ", base,
                              " is not a reviewed operator (tests/fake_npu/operators/reviewed.txt says how to add it)");
}

}  // namespace fake_npu
