// What operators are checked with: shapes, dtypes and layouts that the kernels rely on.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>

namespace tightrope::cpu {
inline namespace CPU_CAPABILITY {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

inline void check(const Tensor& t, const char* name, at::IntArrayRef shape, at::ScalarType dtype) {
  TORCH_CHECK_VALUE(t.sizes() == shape, name, " has shape ", t.sizes(), ", expected ", shape);
  TORCH_CHECK_TYPE(t.scalar_type() == dtype, name, " is ", t.scalar_type(), ", expected ", dtype);
  TORCH_CHECK_VALUE(t.numel() == 0 || t.is_contiguous(), name, " must be contiguous");
}

template <class U>
const U* pointer(const OptionalTensor& t) {
  return t.has_value() ? t->const_data_ptr<U>() : nullptr;
}

inline bool has_adjacent_entries(const Tensor& t) {
  return t.size(1) <= 1 || t.stride(1) == 1;
}
inline bool has_adjacent_rows(const Tensor& t) {
  return t.size(0) <= 1 || t.stride(0) == 1;
}

}  // namespace CPU_CAPABILITY
}  // namespace tightrope::cpu
