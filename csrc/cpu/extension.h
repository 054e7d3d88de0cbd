// The CPU extension: checks what the kernels of rows.h rely on, picks the types, registers with the
// dispatcher.
//
// Included by one stub per instruction set, which names the module. The operators' schemas are
// defined in Python (tightrope/backends/ops.py), so that they exist without this extension too.
// Light ATen headers instead of torch/extension.h halve the time to build.
#pragma once

#include <ATen/Dispatch.h>
#include <ATen/OpMathType.h>
#include <ATen/core/Tensor.h>
#include <pybind11/pybind11.h>
#include <torch/library.h>

#include <optional>

#include "checks.h"
#include "columns.h"
#include "product_ops.h"
#include "rows.h"
#include "scored.h"
#include "tangent_columns.h"
#include "tangent_rows.h"

namespace tightrope::cpu {
inline namespace CPU_CAPABILITY {

// Whether the columns of `logits`, and of `out` with it, are contiguous; otherwise the rows are.
inline bool is_transposed(const Tensor& logits, const Tensor& out) {
  TORCH_CHECK_VALUE(
      logits.dim() == 2, "logits has ", logits.dim(), " dimensions, expected 2: rows, entries");
  TORCH_CHECK_VALUE(
      out.sizes() == logits.sizes(), "out has shape ", out.sizes(), ", expected ", logits.sizes());
  TORCH_CHECK_TYPE(
      out.scalar_type() == logits.scalar_type(), "out is ", out.scalar_type(), ", expected ",
      logits.scalar_type());
  if (has_adjacent_entries(logits) && has_adjacent_entries(out)) return false;
  TORCH_CHECK_VALUE(
      has_adjacent_rows(logits) && has_adjacent_rows(out), "logits and out have strides ",
      logits.strides(), " and ", out.strides(), ", expected 1 in the same dimension");
  return true;
}

template <class T>
Targets<T> make_targets(
    int64_t rows, int64_t cols, const OptionalTensor& index, const OptionalTensor& dense,
    const OptionalTensor& topk_index, const OptionalTensor& topk_prob) {
  constexpr auto type = c10::CppTypeToScalarType<T>::value;
  Targets<T> out{pointer<int64_t>(index),      pointer<T>(dense),     0,
                 pointer<int64_t>(topk_index), pointer<T>(topk_prob), 0};
  if (index.has_value()) check(*index, "index", {rows}, at::kLong);
  if (dense.has_value()) {
    TORCH_CHECK_VALUE(
        dense->dim() == 2 && dense->size(0) == rows && dense->size(1) == cols, "dense has shape ",
        dense->sizes(), ", expected [", rows, ", ", cols, "]");
    TORCH_CHECK_VALUE(
        has_adjacent_entries(*dense), "dense has strides ", dense->strides(),
        ", expected 1 between entries");
    TORCH_CHECK_TYPE(
        dense->scalar_type() == type, "dense is ", dense->scalar_type(), ", expected ", type);
    out.dense_stride = dense->stride(0);
  }
  TORCH_CHECK_VALUE(
      topk_index.has_value() == topk_prob.has_value(), "topk_index and topk_prob go together");
  if (topk_index.has_value()) {
    out.topk = topk_index->size(-1);
    check(*topk_index, "topk_index", {rows, out.topk}, at::kLong);
    check(*topk_prob, "topk_prob", {rows, out.topk}, type);
  }
  return out;
}

template <class T>
Transform<T> make_transform(
    int64_t cols, const OptionalTensor& bias, double logit_scale, std::optional<double> softcap) {
  if (bias.has_value()) check(*bias, "bias", {cols}, c10::CppTypeToScalarType<T>::value);
  return {pointer<T>(bias), static_cast<T>(logit_scale), static_cast<T>(softcap.value_or(0))};
}

inline void check_active(const OptionalTensor& active, int64_t rows) {
  if (active.has_value()) check(*active, "active", {rows}, at::kBool);
}

void row_stats_op(
    const Tensor& logits, Tensor& partial, Tensor& argmax, int64_t offset,
    const OptionalTensor& index, const OptionalTensor& dense, const OptionalTensor& topk_index,
    const OptionalTensor& topk_prob, const OptionalTensor& bias, const OptionalTensor& active,
    double logit_scale, std::optional<double> softcap) {
  const bool transposed = is_transposed(logits, logits);
  const int64_t rows = logits.size(0), cols = logits.size(1);
  check(argmax, "argmax", {rows}, at::kLong);
  check_active(active, rows);
  AT_DISPATCH_FLOATING_TYPES_AND2(
      at::kHalf, at::kBFloat16, logits.scalar_type(), "tightrope::row_stats", [&] {
        using T = at::opmath_type<scalar_t>;
        check(partial, "partial", {kPartialFields, rows}, c10::CppTypeToScalarType<T>::value);
        const auto kernel = transposed ? column_stats<scalar_t, T> : row_stats<scalar_t, T>;
        kernel(
            logits.const_data_ptr<scalar_t>(), logits.stride(transposed), rows, cols, offset,
            make_transform<T>(cols, bias, logit_scale, softcap),
            make_targets<T>(rows, cols, index, dense, topk_index, topk_prob), pointer<bool>(active),
            partial.data_ptr<T>(), argmax.data_ptr<int64_t>());
      });
}

void product_stats_op(
    const Tensor& head, const Tensor& factor, const OptionalTensor& out, Tensor& partial,
    Tensor& argmax, int64_t offset, const OptionalTensor& index, const OptionalTensor& dense,
    const OptionalTensor& topk_index, const OptionalTensor& topk_prob, const OptionalTensor& bias,
    const OptionalTensor& active, double logit_scale, std::optional<double> softcap) {
  TORCH_CHECK_VALUE(!dense.has_value(), "dense is given, expected none beside a product");
  TORCH_CHECK_VALUE(
      head.dim() == 2 && has_adjacent_entries(head), "head has shape ", head.sizes(),
      " and strides ", head.strides(), ", expected two dimensions, adjacent along the second");
  const int64_t rows = argmax.numel(), cols = head.size(0), inner = head.size(1);
  check(argmax, "argmax", {rows}, at::kLong);
  check(partial, "partial", {kPartialFields, rows}, at::kFloat);
  check_active(active, rows);
  if (out.has_value()) check(*out, "out", {cols, rows}, at::kFloat);
  const int64_t stride = head.stride(0);
  const auto run = [&](auto product) {
    product_stats(
        product, inner, out.has_value() ? out->data_ptr<float>() : nullptr, rows, cols, offset,
        make_transform<float>(cols, bias, logit_scale, softcap),
        make_targets<float>(rows, cols, index, dense, topk_index, topk_prob), pointer<bool>(active),
        partial.data_ptr<float>(), argmax.data_ptr<int64_t>());
  };
  if (head.scalar_type() == at::kBFloat16) {
    TORCH_CHECK_VALUE(inner % 2 == 0, "head has shape ", head.sizes(), ", expected an even second");
    check(factor, "factor", {inner / 2, rows, 2}, at::kBFloat16);
    const auto* const from = head.const_data_ptr<at::BFloat16>();
    const auto* const pairs = factor.const_data_ptr<at::BFloat16>();
    run([=](int64_t first, int64_t n, float* z) {
      pair_product(from + first * stride, stride, pairs, z, rows, n, rows, inner, false);
    });
    return;
  }
  TORCH_CHECK_TYPE(
      head.scalar_type() == at::kFloat, "head is ", head.scalar_type(), ", expected float or ",
      at::kBFloat16);
  check(factor, "factor", {panel_count(rows), inner, kPanel}, at::kFloat);
  const auto* const from = head.const_data_ptr<float>();
  const auto* const panels = factor.const_data_ptr<float>();
  run([=](int64_t first, int64_t n, float* z) {
    product_of_panels({from + first * stride, stride, 1}, panels, inner, z, rows, n, rows, false);
  });
}

template <class T>
Sets<T> make_sets(int64_t rows, const OptionalTensor& threshold, const OptionalTensor& classes) {
  TORCH_CHECK_VALUE(
      !(threshold.has_value() && classes.has_value()), "threshold and classes exclude each other");
  if (threshold.has_value())
    check(*threshold, "threshold", {rows}, c10::CppTypeToScalarType<T>::value);
  const int64_t count = classes.has_value() ? classes->size(-1) : 0;
  if (classes.has_value()) check(*classes, "classes", {rows, count}, at::kLong);
  return {pointer<T>(threshold), pointer<int64_t>(classes), count};
}

void row_sides_op(
    const Tensor& logits, Tensor& sides, int64_t offset, const OptionalTensor& threshold,
    const OptionalTensor& classes, const OptionalTensor&, const OptionalTensor&,
    const OptionalTensor&, const OptionalTensor&, const OptionalTensor& bias,
    const OptionalTensor& active, double logit_scale, std::optional<double> softcap) {
  const bool transposed = is_transposed(logits, logits);
  const int64_t rows = logits.size(0), cols = logits.size(1);
  check_active(active, rows);
  AT_DISPATCH_FLOATING_TYPES_AND2(
      at::kHalf, at::kBFloat16, logits.scalar_type(), "tightrope::row_sides", [&] {
        using T = at::opmath_type<scalar_t>;
        check(sides, "sides", {kSideFields, rows}, c10::CppTypeToScalarType<T>::value);
        const auto kernel = transposed ? column_sides<scalar_t, T> : row_sides<scalar_t, T>;
        kernel(
            logits.const_data_ptr<scalar_t>(), logits.stride(transposed), rows, cols, offset,
            make_transform<T>(cols, bias, logit_scale, softcap),
            make_sets<T>(rows, threshold, classes), pointer<bool>(active), sides.data_ptr<T>());
      });
}

template <class T>
ColumnSums<T> make_column_sums(
    int64_t rows, int64_t cols, const Tensor& along, double scale, Tensor& sums) {
  constexpr auto type = c10::CppTypeToScalarType<T>::value;
  TORCH_CHECK_VALUE(along.dim() == 2, "along has ", along.dim(), " dimensions, expected 2");
  const int64_t ranks = along.size(0);
  check(along, "along", {ranks, rows}, type);
  const at::IntArrayRef shape = sums.sizes();
  TORCH_CHECK_VALUE(
      sums.dim() == 2 && shape[0] == ranks + 1 && shape[1] == cols && has_adjacent_entries(sums),
      "sums has shape ", shape, " and strides ", sums.strides(), ", expected [", ranks + 1, ", ",
      cols, "], adjacent along the second");
  TORCH_CHECK_TYPE(sums.scalar_type() == type, "sums is ", sums.scalar_type(), ", expected ", type);
  return {
      along.const_data_ptr<T>(), ranks, static_cast<T>(scale), sums.data_ptr<T>(), sums.stride(0)};
}

// As row_grad, and where sums are given, as column_sums of out.
void gradient_of_rows(
    const Tensor& logits, Tensor& out, const Tensor& norm, const Tensor& coef, const Tensor* along,
    double scale, Tensor* sums, int64_t offset, const OptionalTensor& threshold,
    const OptionalTensor& classes, const OptionalTensor& index, const OptionalTensor& dense,
    const OptionalTensor& topk_index, const OptionalTensor& topk_prob, const OptionalTensor& bias,
    const OptionalTensor& active, double logit_scale, std::optional<double> softcap) {
  const bool transposed = is_transposed(logits, out);
  const int64_t rows = logits.size(0), cols = logits.size(1);
  check_active(active, rows);
  AT_DISPATCH_FLOATING_TYPES_AND2(
      at::kHalf, at::kBFloat16, logits.scalar_type(), "tightrope::row_grad", [&] {
        using T = at::opmath_type<scalar_t>;
        constexpr auto type = c10::CppTypeToScalarType<T>::value;
        const Sets<T> sets = make_sets<T>(rows, threshold, classes);
        const int64_t forms = sets.any() ? 2 : 1;
        check(norm, "norm", {2 * forms, rows}, type);
        check(coef, "coef", {kCoefficients * forms, rows}, type);
        ColumnSums<T> wanted{};
        if (sums != nullptr) wanted = make_column_sums<T>(rows, cols, *along, scale, *sums);
        const auto run = [&](auto kernel, const auto&... rest) {
          kernel(
              logits.const_data_ptr<scalar_t>(), logits.stride(transposed),
              out.data_ptr<scalar_t>(), out.stride(transposed), rows, cols, offset,
              make_transform<T>(cols, bias, logit_scale, softcap),
              make_targets<T>(rows, cols, index, dense, topk_index, topk_prob), sets,
              pointer<bool>(active), norm.const_data_ptr<T>(), coef.const_data_ptr<T>(), rest...);
        };
        if (transposed) {
          run(threshold.has_value() ? column_grad<true, scalar_t, T>
                                    : column_grad<false, scalar_t, T>,
              wanted);
          return;
        }
        run(threshold.has_value() ? row_grad<true, scalar_t, T> : row_grad<false, scalar_t, T>);
        if constexpr (std::is_same_v<scalar_t, T>) {
          if (sums != nullptr) {
            sum_of_rows<T>(out.const_data_ptr<T>(), out.stride(0), rows, cols, wanted);
          }
        } else {
          TORCH_CHECK_TYPE(
              sums == nullptr, "logits are ", logits.scalar_type(), ", expected ", type);
        }
      });
}

void row_grad_op(
    const Tensor& logits, Tensor& out, const Tensor& norm, const Tensor& coef, int64_t offset,
    const OptionalTensor& threshold, const OptionalTensor& classes, const OptionalTensor& index,
    const OptionalTensor& dense, const OptionalTensor& topk_index, const OptionalTensor& topk_prob,
    const OptionalTensor& bias, const OptionalTensor& active, double logit_scale,
    std::optional<double> softcap) {
  gradient_of_rows(
      logits, out, norm, coef, nullptr, 1.0, nullptr, offset, threshold, classes, index, dense,
      topk_index, topk_prob, bias, active, logit_scale, softcap);
}

void row_grad_sums_op(
    const Tensor& logits, Tensor& out, const Tensor& norm, const Tensor& coef, const Tensor& along,
    double scale, Tensor& sums, int64_t offset, const OptionalTensor& threshold,
    const OptionalTensor& classes, const OptionalTensor& index, const OptionalTensor& dense,
    const OptionalTensor& topk_index, const OptionalTensor& topk_prob, const OptionalTensor& bias,
    const OptionalTensor& active, double logit_scale, std::optional<double> softcap) {
  gradient_of_rows(
      logits, out, norm, coef, &along, scale, &sums, offset, threshold, classes, index, dense,
      topk_index, topk_prob, bias, active, logit_scale, softcap);
}

void column_sums_op(const Tensor& grad, const Tensor& along, double scale, Tensor& sums) {
  TORCH_CHECK_VALUE(grad.dim() == 2, "grad has ", grad.dim(), " dimensions, expected 2");
  const int64_t rows = grad.size(0), cols = grad.size(1);
  const bool transposed = !has_adjacent_entries(grad);
  TORCH_CHECK_VALUE(
      !transposed || has_adjacent_rows(grad), "grad has strides ", grad.strides(),
      ", expected a 1");
  AT_DISPATCH_FLOATING_TYPES(grad.scalar_type(), "tightrope::column_sums", [&] {
    const auto kernel = transposed ? sum_of_columns<scalar_t> : sum_of_rows<scalar_t>;
    kernel(
        grad.const_data_ptr<scalar_t>(), grad.stride(transposed), rows, cols,
        make_column_sums<scalar_t>(rows, cols, along, scale, sums));
  });
}

// Whether the columns of all that a kernel of second order goes over are contiguous. Their strides
// differ, but not in what is contiguous.
inline bool is_transposed(const Tensor& logits, at::ArrayRef<Tensor> others) {
  bool entries = has_adjacent_entries(logits);
  for (const Tensor& other : others) {
    TORCH_CHECK_VALUE(
        other.sizes() == logits.sizes() && other.scalar_type() == logits.scalar_type(),
        "tangents and outputs are [", other.sizes(), "] ", other.scalar_type(),
        ", expected those of the logits, ", logits.sizes(), " ", logits.scalar_type());
    entries = entries && has_adjacent_entries(other);
  }
  if (entries) return false;
  bool rows = has_adjacent_rows(logits);
  for (const Tensor& other : others) rows = rows && has_adjacent_rows(other);
  TORCH_CHECK_VALUE(rows, "logits, tangents and outputs have no dimension that is adjacent in all");
  return true;
}

void row_tangent_op(
    const Tensor& logits, const Tensor& tangent, Tensor& sums, const Tensor& norm, int64_t offset,
    const OptionalTensor& threshold, const OptionalTensor& classes, const OptionalTensor& index,
    const OptionalTensor& dense, const OptionalTensor& topk_index, const OptionalTensor& topk_prob,
    const OptionalTensor& bias, const OptionalTensor& active, double logit_scale,
    std::optional<double> softcap) {
  const bool transposed = is_transposed(logits, {tangent});
  const int64_t rows = logits.size(0), cols = logits.size(1);
  check_active(active, rows);
  AT_DISPATCH_FLOATING_TYPES_AND2(
      at::kHalf, at::kBFloat16, logits.scalar_type(), "tightrope::row_tangent", [&] {
        using T = at::opmath_type<scalar_t>;
        constexpr auto type = c10::CppTypeToScalarType<T>::value;
        const Sets<T> sets = make_sets<T>(rows, threshold, classes);
        const int64_t forms = sets.any() ? 2 : 1;
        check(norm, "norm", {2 * forms, rows}, type);
        check(sums, "sums", {kTangentSums * forms, rows}, type);
        const auto kernel = transposed ? column_tangent<scalar_t, T> : row_tangent<scalar_t, T>;
        kernel(
            logits.const_data_ptr<scalar_t>(), logits.stride(transposed ? 1 : 0),
            tangent.const_data_ptr<scalar_t>(), tangent.stride(transposed ? 1 : 0), rows, cols,
            offset, make_transform<T>(cols, bias, logit_scale, softcap),
            make_targets<T>(rows, cols, index, dense, topk_index, topk_prob), sets,
            pointer<bool>(active), norm.const_data_ptr<T>(), sums.data_ptr<T>());
      });
}

void row_grad_tangent_op(
    const Tensor& logits, const Tensor& tangent, const OptionalTensor& out, Tensor& out_tangent,
    const Tensor& norm, const Tensor& norm_tangent, const Tensor& coef, const Tensor& coef_tangent,
    int64_t offset, const OptionalTensor& threshold, const OptionalTensor& classes,
    const OptionalTensor& index, const OptionalTensor& dense, const OptionalTensor& topk_index,
    const OptionalTensor& topk_prob, const OptionalTensor& bias, const OptionalTensor& active,
    double logit_scale, std::optional<double> softcap) {
  const bool transposed =
      is_transposed(logits, {tangent, out_tangent, out.has_value() ? *out : out_tangent});
  const int64_t rows = logits.size(0), cols = logits.size(1);
  const auto stride = [&](const Tensor& t) { return t.stride(transposed ? 1 : 0); };
  check_active(active, rows);
  AT_DISPATCH_FLOATING_TYPES_AND2(
      at::kHalf, at::kBFloat16, logits.scalar_type(), "tightrope::row_grad_tangent", [&] {
        using T = at::opmath_type<scalar_t>;
        constexpr auto type = c10::CppTypeToScalarType<T>::value;
        const Sets<T> sets = make_sets<T>(rows, threshold, classes);
        const int64_t forms = sets.any() ? 2 : 1;
        check(norm, "norm", {2 * forms, rows}, type);
        check(norm_tangent, "norm_tangent", {forms, rows}, type);
        check(coef, "coef", {kCoefficients * forms, rows}, type);
        check(coef_tangent, "coef_tangent", {kCoefficients * forms, rows}, type);
        const auto run = [&](auto kernel) {
          kernel(
              logits.const_data_ptr<scalar_t>(), stride(logits), tangent.const_data_ptr<scalar_t>(),
              stride(tangent), out.has_value() ? out->data_ptr<scalar_t>() : nullptr,
              out.has_value() ? stride(*out) : 0, out_tangent.data_ptr<scalar_t>(),
              stride(out_tangent), rows, cols, offset,
              make_transform<T>(cols, bias, logit_scale, softcap),
              make_targets<T>(rows, cols, index, dense, topk_index, topk_prob), sets,
              pointer<bool>(active), norm.const_data_ptr<T>(), norm_tangent.const_data_ptr<T>(),
              coef.const_data_ptr<T>(), coef_tangent.const_data_ptr<T>());
        };
        if (threshold.has_value()) {
          run(transposed ? column_grad_tangent<true, scalar_t, T>
                         : row_grad_tangent<true, scalar_t, T>);
        } else {
          run(transposed ? column_grad_tangent<false, scalar_t, T>
                         : row_grad_tangent<false, scalar_t, T>);
        }
      });
}

}  // namespace CPU_CAPABILITY
}  // namespace tightrope::cpu

#define TIGHTROPE_STRING_(x) #x
#define TIGHTROPE_STRING(x) TIGHTROPE_STRING_(x)

TORCH_LIBRARY_IMPL(tightrope, CPU, m) {
  m.impl("row_stats", TORCH_FN(tightrope::cpu::row_stats_op));
  m.impl("row_sides", TORCH_FN(tightrope::cpu::row_sides_op));
  m.impl("row_grad", TORCH_FN(tightrope::cpu::row_grad_op));
  m.impl("row_grad_sums", TORCH_FN(tightrope::cpu::row_grad_sums_op));
  m.impl("column_sums", TORCH_FN(tightrope::cpu::column_sums_op));
  m.impl("pairs", TORCH_FN(tightrope::cpu::pairs_op));
  m.impl("pair_product", TORCH_FN(tightrope::cpu::pair_product_op));
  m.impl("panels", TORCH_FN(tightrope::cpu::panels_op));
  m.impl("product_stats", TORCH_FN(tightrope::cpu::product_stats_op));
  m.impl("product", TORCH_FN(tightrope::cpu::product_op));
  m.impl("row_tangent", TORCH_FN(tightrope::cpu::row_tangent_op));
  m.impl("row_grad_tangent", TORCH_FN(tightrope::cpu::row_grad_tangent_op));
}

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  m.doc() = "Tightrope's CPU kernels, built for one instruction set.";
  m.attr("capability") = TIGHTROPE_STRING(CPU_CAPABILITY);
  m.attr("pairs") = tightrope::cpu::has_pair_products();
  m.attr("panel") = tightrope::cpu::kPanel;
  m.attr("lanes") = at::vec::Vectorized<float>::size();
}
