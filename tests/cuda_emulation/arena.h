// The buffers of one request, and what every request says: see module.cpp.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdlib>
#include <cstring>
#include <list>
#include <memory>
#include <stdexcept>
#include <string>

#include "../../csrc/common/tensor_types.h"
#include "include/cuda_runtime.h"

namespace cuda_emulation {

namespace py = pybind11;
using advdl_ops::DType;
using advdl_ops::element_bytes;

// Owns the buffers of one call.
class Arena {
 public:
  explicit Arena(py::dict request) : request_(std::move(request)) {}

  // The tensor `name` of the request, or null. "<name>_offset" shifts it by elements from 16-byte alignment.
  void* input(const std::string& name, size_t bytes, DType dtype) {
    if (!request_.contains(name) || request_[name.c_str()].is_none()) return nullptr;
    if (wants("dry")) return allocate(name, bytes, dtype);
    const std::string value = request_[name.c_str()].cast<py::bytes>();
    if (value.size() != bytes)
      throw std::runtime_error(name + ": " + std::to_string(value.size()) + " bytes, expected " +
                               std::to_string(bytes));
    void* data = allocate(name, bytes, dtype);
    std::memcpy(data, value.data(), bytes);
    return data;
  }
  void* output(const std::string& name, size_t bytes, DType dtype) {
    return output_at(name, allocate(name, bytes, dtype), bytes);
  }
  void* output_at(const std::string& name, void* data, size_t bytes) {
    if (!wants("dry")) outputs_.push_back({name, data, bytes});
    return data;
  }
  bool wants(const char* name) const {
    return request_.contains(name) && request_[name].cast<bool>();
  }
  void* workspace(size_t bytes) {
    workspace_ = bytes;
    return allocate("workspace", bytes, DType::f32);
  }

  py::dict results() const {
    py::dict result;
    for (const auto& [name, data, bytes] : outputs_)
      result[name.c_str()] = py::bytes(static_cast<const char*>(data), bytes);
    result["workspace"] = workspace_;
    py::list launches;
    for (size_t i = 0; i < cuda_emulation::launch_count(); ++i) {
      const auto& l = cuda_emulation::launch_at(i);
      launches.append(py::make_tuple(l.is_kernel, l.grid, l.block, l.shared));
    }
    result["launches"] = launches;
    return result;
  }

 private:
  struct Output {
    std::string name;
    void* data;
    size_t bytes;
  };

  void* allocate(const std::string& name, size_t bytes, DType dtype) {
    const std::string key = name + "_offset";
    const size_t offset =
        request_.contains(key) ? request_[key.c_str()].cast<size_t>() * element_bytes(dtype) : 0;
    if (wants("dry")) bytes = 0;
    memory_.emplace_back(std::malloc(bytes + offset), &std::free);
    std::memset(memory_.back().get(), 0xff, bytes + offset);
    return static_cast<char*>(memory_.back().get()) + offset;
  }

  py::dict request_;
  std::list<std::unique_ptr<void, decltype(&std::free)>> memory_;
  std::list<Output> outputs_;
  size_t workspace_ = 0;
};

template <class Enum>
Enum get_enum(const py::dict& request, const char* name) {
  return static_cast<Enum>(request[name].cast<int>());
}

inline void apply_settings(const py::dict& r) {
  auto& settings = cuda_emulation::settings();
  settings = {};
  if (r.contains("order")) settings.order = get_enum<cuda_emulation::Order>(r, "order");
  if (r.contains("seed")) settings.seed = r["seed"].cast<unsigned>();
  if (r.contains("shared_limit")) settings.shared_limit = r["shared_limit"].cast<int>();
  if (r.contains("dry")) settings.dry = r["dry"].cast<bool>();
  cuda_emulation::clear_launches();
}

}  // namespace cuda_emulation
