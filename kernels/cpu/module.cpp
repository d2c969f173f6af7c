// npu_rec._C
#include "key_map.h"
#include "ops.h"

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  using release = py::call_guard<py::gil_scoped_release>;
  m.def("instruction_sets", &npu_rec::instruction_sets, "Instruction sets this build and machine run, the fastest first.");
  using at::Tensor;
  using npu_rec::OptionalTensor;
  py::class_<npu_rec::AttentionArguments>(m, "AttentionArguments")
      .def(py::init<
           std::string, Tensor, Tensor, Tensor, Tensor, OptionalTensor, OptionalTensor, OptionalTensor, OptionalTensor,
           OptionalTensor, OptionalTensor, OptionalTensor, Tensor, int64_t, double, double, bool, int64_t, int64_t,
           int64_t, OptionalTensor, int64_t, double, std::string>());
  m.def("attention_forward", &npu_rec::attention_forward, release());
  m.def("attention_backward", &npu_rec::attention_backward, release());
  m.def("sampled_softmax_forward", &npu_rec::sampled_softmax_forward, release());
  m.def("sampled_softmax_backward", &npu_rec::sampled_softmax_backward, release());
  m.def("norm_gate_forward", &npu_rec::norm_gate_forward, release());
  m.def("norm_gate_backward", &npu_rec::norm_gate_backward, release());
  m.def("dropout_forward", &npu_rec::dropout_forward, release());
  m.def("random_integers", &npu_rec::random_integers, release());
  m.def("rms_norm_forward", &npu_rec::rms_norm_forward, release());
  m.def("rms_norm_backward", &npu_rec::rms_norm_backward, release());
  m.def("swiglu_forward", &npu_rec::swiglu_forward, release());
  m.def("swiglu_backward", &npu_rec::swiglu_backward, release());
  m.def("rotary_turn", &npu_rec::rotary_turn, release());
  m.def("embedding_forward", &npu_rec::embedding_forward, release());
  m.def("embedding_backward", &npu_rec::embedding_backward, release());
  m.def("embedding_update", &npu_rec::embedding_update, release());
  m.def("records_read", &npu_rec::records_read, release());
  m.def("records_write", &npu_rec::records_write, release());
  py::class_<npu_rec::KeyMap>(m, "KeyMap")
      .def(py::init<>())
      .def("find", &npu_rec::KeyMap::find, release())
      .def("insert", &npu_rec::KeyMap::insert, release())
      .def("erase", &npu_rec::KeyMap::erase, release())
      .def("items", &npu_rec::KeyMap::items, release())
      .def("__len__", &npu_rec::KeyMap::entries)
      .def_property_readonly("slot_limit", &npu_rec::KeyMap::slot_limit)
      .def_property_readonly("load_factor", &npu_rec::KeyMap::load_factor)
      .def_property_readonly("memory_bytes", &npu_rec::KeyMap::memory_bytes);
}
