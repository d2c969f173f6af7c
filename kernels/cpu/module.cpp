// npu_rec._C
#include "ops.h"

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  using release = py::call_guard<py::gil_scoped_release>;
  m.def("instruction_sets", &npu_rec::instruction_sets, "Instruction sets this build and machine run, the fastest first.");
  m.def("hstu_attention_forward", &npu_rec::hstu_attention_forward, release());
  m.def("hstu_attention_backward", &npu_rec::hstu_attention_backward, release());
  m.def("sampled_softmax_forward", &npu_rec::sampled_softmax_forward, release());
  m.def("sampled_softmax_backward", &npu_rec::sampled_softmax_backward, release());
  m.def("norm_gate_forward", &npu_rec::norm_gate_forward, release());
  m.def("norm_gate_backward", &npu_rec::norm_gate_backward, release());
  m.def("embedding_forward", &npu_rec::embedding_forward, release());
  m.def("embedding_backward", &npu_rec::embedding_backward, release());
  m.def("embedding_update", &npu_rec::embedding_update, release());
}
