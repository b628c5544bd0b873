// Requests for csrc/cuda/lstm.cu, one step each: see module.cpp. Tensors that a step writes are given too, and come back.
#include "lstm.h"

#include "../../csrc/common/lstm.h"
#include "arena.h"

namespace cuda_emulation {
namespace {

using namespace advdl_ops;

// The tensors of a step by their names: null where the request has none. Rows lie "<name>_stride" elements apart.
class Tensors {
 public:
  Tensors(const py::dict& request, Arena& arena, const LstmStep& step)
      : request_(request), arena_(arena), rows_(step.rows), dtype_(step.dtype) {}

  const void* vector(const char* name, int64_t size) { return input(name, size, dtype_); }
  const void* matrix(const char* name, int64_t width) { return input(name, rows_ * width, dtype_); }
  void* written_matrix(const char* name, int64_t width) {
    return written(name, rows_ * width, dtype_);
  }
  void* written_acc(const char* name, int64_t width) {
    return written(name, rows_ * width, dtype_ == DType::f64 ? DType::f64 : DType::f32);
  }
  LstmStepRows<const void*> rows(const char* name, int64_t width) {
    return {input(name, elements(name, width), dtype_), stride(name, width)};
  }
  LstmStepRows<void*> written_rows(const char* name, int64_t width) {
    return {written(name, elements(name, width), dtype_), stride(name, width)};
  }
  LstmStepRows<const uint8_t*> mask(const char* name, int64_t width) {
    // Arena counts an offset in elements, of which a byte is none: half precision, two bytes, stands in.
    const auto bytes = static_cast<size_t>(elements(name, width));
    return {static_cast<const uint8_t*>(arena_.input(name, bytes, DType::f16)),
            stride(name, width)};
  }
  const int64_t* integers(const char* name) {
    const size_t bytes = static_cast<size_t>(rows_) * sizeof(int64_t);
    return static_cast<const int64_t*>(arena_.input(name, bytes, DType::f64));
  }

 private:
  int64_t stride(const std::string& name, int64_t width) const {
    const std::string key = name + "_stride";
    return request_.contains(key) ? request_[key.c_str()].cast<int64_t>() : width;
  }
  // Nothing behind the last row.
  int64_t elements(const char* name, int64_t width) const {
    return rows_ == 0 ? 0 : (rows_ - 1) * stride(name, width) + width;
  }
  void* input(const char* name, int64_t size, DType dtype) {
    return arena_.input(name, static_cast<size_t>(size) * element_bytes(dtype), dtype);
  }
  void* written(const char* name, int64_t size, DType dtype) {
    void* data = input(name, size, dtype);
    if (data != nullptr)
      arena_.output_at(name, data, static_cast<size_t>(size) * element_bytes(dtype));
    return data;
  }

  const py::dict& request_;
  Arena& arena_;
  int64_t rows_;
  DType dtype_;
};

LstmStep get_step(const py::dict& r) {
  LstmStep s;
  s.rows = r["rows"].cast<int64_t>();
  s.hidden = r["hidden"].cast<int64_t>();
  s.projection = r["projection"].cast<int64_t>();
  s.dtype = get_enum<DType>(r, "dtype");
  s.time = r["time"].cast<int64_t>();
  s.zoneout_c = r["zoneout_c"].cast<double>();
  s.zoneout_h = r["zoneout_h"].cast<double>();
  if (r.contains("packs_from")) s.packs_from = r["packs_from"].cast<int64_t>();
  return s;
}

// What forward and backward share.
template <class Params>
void get_common(const py::dict& r, Tensors& tensors, int64_t size, Params& p) {
  const int64_t hidden = p.step.hidden;
  p.step.lengths = tensors.integers("lengths");
  p.step.zoneout_c_mask = tensors.mask("zoneout_c_mask", hidden);
  p.step.zoneout_h_mask = tensors.mask("zoneout_h_mask", size);
  p.norm.eps = r["eps"].cast<double>();
  p.norm.hh_weight = tensors.vector("hh_weight", 4 * hidden);
  p.norm.hh_bias = tensors.vector("hh_bias", 4 * hidden);
  p.norm.c_weight = tensors.vector("c_weight", hidden);
  p.norm.c_bias = tensors.vector("c_bias", hidden);
  p.recurrent_mask = tensors.matrix("recurrent_mask", size);
}

py::dict forward(const py::dict& r, bool output) {
  Arena arena(r);
  LstmStepForward p;
  p.step = get_step(r);
  Tensors tensors(r, arena, p.step);
  const int64_t hidden = p.step.hidden, gates = 4 * hidden;
  const int64_t size = p.step.projection > 0 ? p.step.projection : hidden;
  get_common(r, tensors, size, p);
  p.product = tensors.matrix("product", gates);
  p.b_ih = tensors.vector("b_ih", gates);
  p.b_hh = tensors.vector("b_hh", gates);
  p.c = tensors.written_acc("c", hidden);
  p.gates = tensors.written_rows("gates", gates);
  if (arena.wants("in_place")) {
    p.projected = {p.gates.data, p.gates.stride};
  } else {
    p.projected = tensors.rows("projected", gates);
  }
  p.cells = tensors.written_rows("cells", hidden);
  p.products = tensors.written_rows("products", gates);
  p.hidden_out = tensors.written_matrix("hidden_out", hidden);
  p.h = tensors.written_matrix("h", size);
  p.fed = tensors.written_matrix("fed", size);
  p.y = tensors.written_rows("y", size);
  if (output) {
    cuda::lstm_step_output(p, tensors.matrix("projected_h", size), nullptr);
  } else {
    cuda::lstm_step_forward(p, nullptr);
  }
  return arena.results();
}

py::dict backward(const py::dict& r, bool output) {
  Arena arena(r);
  LstmStepBackward p;
  p.step = get_step(r);
  Tensors tensors(r, arena, p.step);
  const int64_t hidden = p.step.hidden, gates = 4 * hidden;
  const int64_t size = p.step.projection > 0 ? p.step.projection : hidden;
  get_common(r, tensors, size, p);
  p.gates = tensors.rows("gates", gates);
  p.cells_before = tensors.rows("cells_before", hidden);
  p.products = tensors.rows("products", gates);
  p.h_before = tensors.rows("h_before", size);
  p.begun = r["begun"].cast<int64_t>();
  p.begin_at_lengths = r["begin_at_lengths"].cast<bool>();
  p.c_begin = tensors.matrix("c_begin", hidden);
  p.h_begin = tensors.matrix("h_begin", size);
  p.dy = tensors.rows("dy", size);
  p.dfed = tensors.matrix("dfed", size);
  p.dh = tensors.written_acc("dh", size);
  p.dc = tensors.written_acc("dc", hidden);
  p.dprojected = tensors.written_matrix("dprojected", size);
  p.dhidden = tensors.matrix("dhidden", hidden);
  p.dgates = tensors.written_rows("dgates", gates);
  p.dproducts = tensors.written_rows("dproducts", gates);
  p.fed = tensors.written_rows("fed", size);
  p.hidden_out = tensors.written_rows("hidden_out", hidden);
  p.dhh_weight = tensors.written_rows("dhh_weight", gates);
  p.dc_weight = tensors.written_rows("dc_weight", hidden);
  p.dc_bias = tensors.written_rows("dc_bias", hidden);
  output ? cuda::lstm_step_backward_output(p, nullptr) : cuda::lstm_step_backward(p, nullptr);
  return arena.results();
}

// x and out are [batch, steps, width] with strides of their own, `lengths` [batch].
py::dict padding(const py::dict& r) {
  Arena arena(r);
  LstmPadding p;
  p.steps = r["steps"].cast<int64_t>();
  p.batch = r["rows"].cast<int64_t>();
  p.width = r["width"].cast<int64_t>();
  p.dtype = get_enum<DType>(r, "dtype");
  const auto rows = [&](const char* name) {
    LstmOutput found;
    found.time = r[(std::string(name) + "_time").c_str()].cast<int64_t>();
    found.batch = r[(std::string(name) + "_batch").c_str()].cast<int64_t>();
    const int64_t size = (p.steps - 1) * found.time + (p.batch - 1) * found.batch + p.width;
    const size_t bytes = static_cast<size_t>(size) * element_bytes(p.dtype);
    found.data = arena.input(name, bytes, p.dtype);
    arena.output_at(name, found.data, bytes);
    return found;
  };
  const LstmOutput x = rows("x");
  p.x = {x.data, x.time, x.batch};
  p.out = rows("out");
  const size_t bytes = static_cast<size_t>(p.batch) * sizeof(int64_t);
  p.lengths = static_cast<const int64_t*>(arena.input("lengths", bytes, DType::f64));
  cuda::lstm_without_padding(p, nullptr);
  return arena.results();
}

}  // namespace

py::dict lstm_step(const py::dict& r) {
  apply_settings(r);
  const auto function = r["function"].cast<std::string>();
  if (function == "padding") return padding(r);
  const bool output = function == "output" || function == "backward_output";
  return function == "forward" || function == "output" ? forward(r, output) : backward(r, output);
}

}  // namespace cuda_emulation
