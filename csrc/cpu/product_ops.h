// The operators of pairs.h and product.h: what the kernels rely on is checked here.
#pragma once

#include <ATen/core/Tensor.h>

#include "checks.h"
#include "pairs.h"
#include "product.h"

namespace tightrope::cpu {
inline namespace CPU_CAPABILITY {

template <class S>
Strided<S> make_strided(const Tensor& t) {
  return {t.const_data_ptr<S>(), t.stride(0), t.stride(1)};
}

inline void pairs_op(const Tensor& b, Tensor& out) {
  TORCH_CHECK_VALUE(
      b.dim() == 2 && has_adjacent_entries(b), "b has shape ", b.sizes(), " and strides ",
      b.strides(), ", expected two dimensions, adjacent along the second");
  TORCH_CHECK_TYPE(
      b.scalar_type() == at::kBFloat16, "b is ", b.scalar_type(), ", expected ", at::kBFloat16);
  const int64_t inner = b.size(0), cols = b.size(1);
  check(out, "out", {filled_inner(inner) / 2, cols, 2}, at::kBFloat16);
  pack_pairs(
      b.const_data_ptr<at::BFloat16>(), b.stride(0), inner, cols, out.data_ptr<at::BFloat16>());
}

inline void pair_product_op(const Tensor& a, const Tensor& pairs, Tensor& out, bool add) {
  TORCH_CHECK_VALUE(
      a.dim() == 2 && pairs.dim() == 3 && out.dim() == 2 && has_adjacent_entries(out),
      "a, pairs and out have shapes ", a.sizes(), ", ", pairs.sizes(), " and ", out.sizes(),
      ", out strides ", out.strides(),
      ", expected two dimensions, three and two, those of out adjacent along the second");
  const int64_t rows = a.size(0), inner = a.size(1), cols = pairs.size(1);
  const bool rounds = a.scalar_type() == at::kFloat;
  check(pairs, "pairs", {(rounds ? filled_inner(inner) : inner) / 2, cols, 2}, at::kBFloat16);
  TORCH_CHECK_VALUE(
      out.size(0) == rows && out.size(1) == cols, "out has shape ", out.sizes(), ", expected [",
      rows, ", ", cols, "]");
  TORCH_CHECK_TYPE(
      out.scalar_type() == at::kFloat, "out is ", out.scalar_type(), ", expected float");
  const auto* const factor = pairs.const_data_ptr<at::BFloat16>();
  float* const to = out.data_ptr<float>();
  if (out.numel() == 0) return;
  if (inner == 0) {
    if (!add) out.zero_();
    return;
  }
  if (rounds) {
    auto left = make_strided<float>(a);
    if (inner <= 1) left.step = 1;
    if (rows <= 1 && left.step != 1) left.row = 1;
    TORCH_CHECK_VALUE(
        left.step == 1 || left.row == 1, "a has strides ", a.strides(), ", expected a 1");
    rounded_product(left, factor, to, out.stride(0), rows, cols, inner, add);
    return;
  }
  TORCH_CHECK_TYPE(
      a.scalar_type() == at::kBFloat16, "a is ", a.scalar_type(), ", expected float or ",
      at::kBFloat16);
  TORCH_CHECK_VALUE(
      inner % 2 == 0 && has_adjacent_entries(a), "a has shape ", a.sizes(), " and strides ",
      a.strides(), ", expected an even second dimension, adjacent along it");
  pair_product(
      a.const_data_ptr<at::BFloat16>(), a.stride(0), factor, to, out.stride(0), rows, cols, inner,
      add);
}

inline void panels_op(const Tensor& b, Tensor& out) {
  TORCH_CHECK_VALUE(b.dim() == 2, "b has ", b.dim(), " dimensions, expected 2");
  TORCH_CHECK_TYPE(b.scalar_type() == at::kFloat, "b is ", b.scalar_type(), ", expected float");
  const int64_t inner = b.size(0), cols = b.size(1);
  check(out, "out", {panel_count(cols), inner, kPanel}, at::kFloat);
  const auto from = make_strided<float>(b);
  float* const panels = out.data_ptr<float>();
  for_parts(cols, kPanel, units_of(16 * inner * kPanel), [&](int64_t begin, int64_t end) {
    pack_panels(from.from(0, begin), inner, end - begin, panels + begin * inner);
  });
}

inline void product_op(const Tensor& a, const Tensor& b, Tensor& out, bool add) {
  TORCH_CHECK_VALUE(
      a.dim() == 2 && out.dim() == 2 && has_adjacent_entries(out), "a and out have shapes ",
      a.sizes(), " and ", out.sizes(), ", out strides ", out.strides(),
      ", expected two dimensions, those of out adjacent along the second");
  const int64_t rows = out.size(0), cols = out.size(1), inner = a.size(1);
  TORCH_CHECK_VALUE(a.size(0) == rows, "a has ", a.size(0), " rows, expected ", rows);
  for (const Tensor* t : {&a, const_cast<const Tensor*>(&out)}) {
    TORCH_CHECK_TYPE(
        t->scalar_type() == at::kFloat, "a or out is ", t->scalar_type(), ", expected float");
  }
  const auto run = [&](auto kernel, auto factor) {
    kernel(
        make_strided<float>(a), factor, inner, out.data_ptr<float>(), out.stride(0), rows, cols,
        add);
  };
  if (b.dim() != 2) {
    check(b, "b", {panel_count(cols), inner, kPanel}, at::kFloat);
    run(product_of_panels, b.const_data_ptr<float>());
    return;
  }
  TORCH_CHECK_VALUE(
      b.size(0) == inner && b.size(1) == cols, "b has shape ", b.sizes(), ", expected [", inner,
      ", ", cols, "]");
  if (b.scalar_type() == at::kBFloat16) {
    run(product<at::BFloat16>, make_strided<at::BFloat16>(b));
  } else {
    TORCH_CHECK_TYPE(b.scalar_type() == at::kFloat, "b is ", b.scalar_type(), ", expected float");
    run(product<float>, make_strided<float>(b));
  }
}

}  // namespace CPU_CAPABILITY
}  // namespace tightrope::cpu
