// The CUDA extension: checks what the kernels rely on, picks the types, and registers the row
// operators for CUDA tensors.
//
// Plain C++: the kernels are in rows_*.cu and know nothing of torch. Schemas are defined in Python
// (tightrope/backends/ops.py), so that the operators exist without this extension too. Launches go
// to the current stream of the logits' device; memory that a launch needs beside its arguments
// comes from torch's allocator, so a call can be captured in a CUDA graph.
#include <ATen/Dispatch.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <cuda_runtime_api.h>
#include <pybind11/pybind11.h>
#include <torch/library.h>

#include <limits>
#include <mutex>
#include <optional>
#include <type_traits>
#include <unordered_map>

#include "rows.h"

namespace tightrope::cuda {
namespace {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

constexpr int64_t kMaxColumns = std::numeric_limits<int>::max() / 2;

// Storage types of the kernels, by torch's.
template <class scalar_t>
struct StorageOf {
  using type = scalar_t;
};
template <>
struct StorageOf<at::BFloat16> {
  using type = bf16;
};
template <>
struct StorageOf<at::Half> {
  using type = fp16;
};

// The current device, which must be `index`.
Device device_of(int index) {
  static std::mutex mutex;
  static std::unordered_map<int, Device> known;
  const std::lock_guard<std::mutex> lock(mutex);
  const auto found = known.find(index);
  if (found != known.end()) return found->second;
  const auto attribute = [index](cudaDeviceAttr which) {
    int value = 0;
    C10_CUDA_CHECK(cudaDeviceGetAttribute(&value, which, index));
    return value;
  };
  const bool clusters = attribute(cudaDevAttrClusterLaunch) != 0 && loss_has_clusters<bf16>();
  const Device device{
      attribute(cudaDevAttrMultiProcessorCount),
      attribute(cudaDevAttrMaxSharedMemoryPerMultiprocessor),
      attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin), clusters};
  return known.emplace(index, device).first->second;
}

void check(
    const Tensor& t, const char* name, at::IntArrayRef shape, at::ScalarType dtype,
    const Tensor& logits) {
  TORCH_CHECK_VALUE(t.sizes() == shape, name, " has shape ", t.sizes(), ", expected ", shape);
  TORCH_CHECK_TYPE(t.scalar_type() == dtype, name, " is ", t.scalar_type(), ", expected ", dtype);
  TORCH_CHECK_VALUE(t.numel() == 0 || t.is_contiguous(), name, " must be contiguous");
  TORCH_CHECK_VALUE(
      t.device() == logits.device(), name, " is on ", t.device(), ", logits on ", logits.device());
}

// A matrix like the logits: unit stride along the entries.
void check_matrix(const Tensor& t, const char* name, at::ScalarType dtype, const Tensor& logits) {
  TORCH_CHECK_VALUE(t.dim() == 2, name, " has ", t.dim(), " dimensions, expected 2: rows, entries");
  TORCH_CHECK_VALUE(
      t.sizes() == logits.sizes(), name, " has shape ", t.sizes(), ", expected ", logits.sizes());
  TORCH_CHECK_TYPE(t.scalar_type() == dtype, name, " is ", t.scalar_type(), ", expected ", dtype);
  TORCH_CHECK_VALUE(
      t.size(1) <= 1 || t.stride(1) == 1, name, " has stride ", t.stride(1),
      " between entries, expected 1");
  TORCH_CHECK_VALUE(
      t.device() == logits.device(), name, " is on ", t.device(), ", logits on ", logits.device());
}

// An output: a matrix like the logits, of their dtype, or narrower where they are float32.
void check_out(const Tensor& out, const Tensor& logits) {
  const bool narrows = logits.scalar_type() == at::kFloat &&
                       (out.scalar_type() == at::kBFloat16 || out.scalar_type() == at::kHalf);
  check_matrix(out, "out", narrows ? out.scalar_type() : logits.scalar_type(), logits);
}

// Whether out shares the logits' memory and is narrower than they are.
bool narrows_in_place(const Tensor& out, const Tensor& logits) {
  return out.element_size() < logits.element_size() && out.is_alias_of(logits);
}

template <class U>
const U* pointer(const OptionalTensor& t) {
  return t.has_value() ? t->const_data_ptr<U>() : nullptr;
}

// The arguments that the operators share, checked.
struct Shared {
  const Tensor& logits;
  int64_t offset;
  const OptionalTensor &index, &dense, &topk_index, &topk_prob, &bias, &active;
  double logit_scale;
  std::optional<double> softcap;

  template <class scalar_t>
  RowArgs<scalar_t> args() const {
    using T = Arithmetic<scalar_t>;
    constexpr auto type = c10::CppTypeToScalarType<T>::value;
    const int64_t rows = logits.size(0), cols = logits.size(1);
    TORCH_CHECK_VALUE(
        cols <= kMaxColumns && rows <= std::numeric_limits<int>::max() / 8, "logits have shape ",
        logits.sizes(), ", more than a launch can take");
    int64_t topk = 0;
    if (index.has_value()) check(*index, "index", {rows}, at::kLong, logits);
    if (dense.has_value()) check_matrix(*dense, "dense", type, logits);
    TORCH_CHECK_VALUE(
        topk_index.has_value() == topk_prob.has_value(), "topk_index and topk_prob go together");
    TORCH_CHECK_VALUE(
        index.has_value() + dense.has_value() + topk_index.has_value() <= 1,
        "index, dense and topk_index exclude each other");
    if (topk_index.has_value()) {
      topk = topk_index->size(-1);
      TORCH_CHECK_VALUE(
          topk <= kMaxTopk, "a top-k target has ", topk,
          " entries a row; the CUDA kernels take at most ", kMaxTopk,
          ". Use a dense target or backend=\"eager\"");
      check(*topk_index, "topk_index", {rows, topk}, at::kLong, logits);
      check(*topk_prob, "topk_prob", {rows, topk}, type, logits);
    }
    if (bias.has_value()) check(*bias, "bias", {cols}, type, logits);
    if (active.has_value()) check(*active, "active", {rows}, at::kBool, logits);
    const T cap = static_cast<T>(softcap.value_or(0));
    return {
        static_cast<const scalar_t*>(logits.const_data_ptr()),
        logits.stride(0),
        rows,
        static_cast<int>(cols),
        offset,
        pointer<T>(bias),
        static_cast<T>(logit_scale),
        cap,
        cap == T(0) ? T(0) : T(1) / cap,
        pointer<int64_t>(index),
        pointer<T>(dense),
        dense.has_value() ? dense->stride(0) : 0,
        pointer<int64_t>(topk_index),
        pointer<T>(topk_prob),
        static_cast<int>(topk),
        pointer<bool>(active)};
  }
};

// Which entries are in the sets, checked.
struct Sets {
  const OptionalTensor &threshold, &classes;

  bool given() const { return threshold.has_value() || classes.has_value(); }

  template <class scalar_t>
  SideArgs<Arithmetic<scalar_t>> args(const Tensor& logits) const {
    using T = Arithmetic<scalar_t>;
    const int64_t rows = logits.size(0);
    int64_t listed = 0;
    TORCH_CHECK_VALUE(
        !threshold.has_value() || !classes.has_value(), "threshold and classes exclude each other");
    if (threshold.has_value()) {
      check(*threshold, "threshold", {rows}, c10::CppTypeToScalarType<T>::value, logits);
    }
    if (classes.has_value()) {
      listed = classes->size(-1);
      TORCH_CHECK_VALUE(
          listed <= kMaxColumns, "classes has shape ", classes->sizes(),
          ", more than a launch can take");
      check(*classes, "classes", {rows, listed}, at::kLong, logits);
    }
    return {pointer<T>(threshold), pointer<int64_t>(classes), static_cast<int>(listed)};
  }
};

void succeed(int error) {
  C10_CUDA_CHECK(static_cast<cudaError_t>(error));
}

// Runs f<scalar_t of the kernels>() for the dtype of the logits, on their device.
template <class F>
void dispatch(const Tensor& logits, F f) {
  TORCH_CHECK_VALUE(
      logits.dim() == 2, "logits have ", logits.dim(), " dimensions, expected 2: rows, entries");
  TORCH_CHECK_VALUE(
      logits.size(1) <= 1 || logits.stride(1) == 1, "logits have stride ", logits.stride(1),
      " between entries, expected 1");
  if (logits.numel() == 0) return;
  const c10::cuda::CUDAGuard guard(logits.device());
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, logits.scalar_type(), "tightrope", [&] {
    f.template operator()<typename StorageOf<scalar_t>::type>();
  });
}

// The same for the dtype of an output, which check_out has seen.
template <class scalar_t, class F>
void dispatch_out(const Tensor& out, F f) {
  if constexpr (std::is_same_v<scalar_t, float>) {
    if (out.scalar_type() == at::kBFloat16) return f.template operator()<bf16>();
    if (out.scalar_type() == at::kHalf) return f.template operator()<fp16>();
  }
  f.template operator()<scalar_t>();
}

void row_stats_op(
    const Tensor& logits, Tensor& partial, Tensor& argmax, int64_t offset,
    const OptionalTensor& index, const OptionalTensor& dense, const OptionalTensor& topk_index,
    const OptionalTensor& topk_prob, const OptionalTensor& bias, const OptionalTensor& active,
    double logit_scale, std::optional<double> softcap) {
  const Shared shared{logits,    offset, index,  dense,       topk_index,
                      topk_prob, bias,   active, logit_scale, softcap};
  dispatch(logits, [&]<class scalar_t>() {
    using T = Arithmetic<scalar_t>;
    const RowArgs<scalar_t> args = shared.args<scalar_t>();
    check(
        partial, "partial", {kPartialFields, args.rows}, c10::CppTypeToScalarType<T>::value,
        logits);
    check(argmax, "argmax", {args.rows}, at::kLong, logits);
    const Runs runs = plan_stats<scalar_t>(args.rows, args.cols, device_of(logits.get_device()));
    StatsOut<T> out{partial.data_ptr<T>(), argmax.data_ptr<int64_t>(), nullptr, nullptr};
    Tensor split_partial, split_argmax;
    if (runs.count > 1) {
      split_partial = at::empty({runs.count, kPartialFields, args.rows}, partial.options());
      split_argmax = at::empty({runs.count, args.rows}, argmax.options());
      out.split_partial = split_partial.data_ptr<T>();
      out.split_argmax = split_argmax.data_ptr<int64_t>();
    }
    succeed(row_stats(args, out, runs, c10::cuda::getCurrentCUDAStream()));
  });
}

void row_sides_op(
    const Tensor& logits, Tensor& sides, int64_t offset, const OptionalTensor& threshold,
    const OptionalTensor& classes, const OptionalTensor& index, const OptionalTensor& dense,
    const OptionalTensor& topk_index, const OptionalTensor& topk_prob, const OptionalTensor& bias,
    const OptionalTensor& active, double logit_scale, std::optional<double> softcap) {
  const Shared shared{logits,    offset, index,  dense,       topk_index,
                      topk_prob, bias,   active, logit_scale, softcap};
  const Sets sets{threshold, classes};
  TORCH_CHECK_VALUE(sets.given(), "row_sides takes threshold or classes");
  dispatch(logits, [&]<class scalar_t>() {
    using T = Arithmetic<scalar_t>;
    const RowArgs<scalar_t> args = shared.args<scalar_t>();
    const SideArgs<T> which = sets.args<scalar_t>(logits);
    check(sides, "sides", {kSideFields, args.rows}, c10::CppTypeToScalarType<T>::value, logits);
    const Runs runs = plan_stats<scalar_t>(args.rows, args.cols, device_of(logits.get_device()));
    SidesOut<T> out{sides.data_ptr<T>(), nullptr};
    Tensor split_sides;
    if (runs.count > 1) {
      split_sides = at::empty({runs.count, kSideFields, args.rows}, sides.options());
      out.split_sides = split_sides.data_ptr<T>();
    }
    succeed(row_sides(args, which, out, runs, c10::cuda::getCurrentCUDAStream()));
  });
}

void row_grad_op(
    const Tensor& logits, Tensor& out, const Tensor& norm, const Tensor& coef, int64_t offset,
    const OptionalTensor& threshold, const OptionalTensor& classes, const OptionalTensor& index,
    const OptionalTensor& dense, const OptionalTensor& topk_index, const OptionalTensor& topk_prob,
    const OptionalTensor& bias, const OptionalTensor& active, double logit_scale,
    std::optional<double> softcap) {
  const Shared shared{logits,    offset, index,  dense,       topk_index,
                      topk_prob, bias,   active, logit_scale, softcap};
  const Sets sets{threshold, classes};
  check_out(out, logits);
  dispatch(logits, [&]<class scalar_t>() {
    using T = Arithmetic<scalar_t>;
    constexpr auto type = c10::CppTypeToScalarType<T>::value;
    const RowArgs<scalar_t> args = shared.args<scalar_t>();
    const SideArgs<T> which = sets.args<scalar_t>(logits);
    const int sides = sets.given() ? 2 : 1;
    check(norm, "norm", {2 * sides, args.rows}, type, logits);
    check(coef, "coef", {kCoefficients * sides, args.rows}, type, logits);
    TORCH_CHECK_VALUE(
        !narrows_in_place(out, logits), "out is ", out.scalar_type(),
        ", narrower than the logits, ", "so it may not share their memory");
    dispatch_out<scalar_t>(out, [&]<class out_t>() {
      succeed(row_grad(
          args, which, static_cast<out_t*>(out.data_ptr()), out.stride(0), norm.const_data_ptr<T>(),
          coef.const_data_ptr<T>(), plan_grad<scalar_t>(args.cols),
          c10::cuda::getCurrentCUDAStream()));
    });
  });
}

void row_loss_grad_op(
    const Tensor& logits, Tensor& out, Tensor& partial, Tensor& argmax, const Tensor& upstream,
    const OptionalTensor& index, const OptionalTensor& dense, const OptionalTensor& topk_index,
    const OptionalTensor& topk_prob, const OptionalTensor& bias, const OptionalTensor& active,
    double logit_scale, std::optional<double> softcap) {
  const Shared shared{logits,    0,    index,  dense,       topk_index,
                      topk_prob, bias, active, logit_scale, softcap};
  check_out(out, logits);
  dispatch(logits, [&]<class scalar_t>() {
    using T = Arithmetic<scalar_t>;
    constexpr auto type = c10::CppTypeToScalarType<T>::value;
    const RowArgs<scalar_t> args = shared.args<scalar_t>();
    check(partial, "partial", {kPartialFields, args.rows}, type, logits);
    check(argmax, "argmax", {args.rows}, at::kLong, logits);
    check(upstream, "upstream", {kUpstreamFields, args.rows}, type, logits);
    const LossPlan plan = plan_loss<scalar_t>(
        args.rows, args.cols, loss_fixed_bytes<scalar_t>(args.sparse()),
        device_of(logits.get_device()));
    TORCH_CHECK_VALUE(
        !narrows_in_place(out, logits) ||
            (plan.whole && out.const_data_ptr() == logits.const_data_ptr() &&
             out.stride(0) * out.element_size() == logits.stride(0) * logits.element_size()),
        "out is ", out.scalar_type(),
        ", narrower than the logits, so it may share their memory only ",
        "at the front of each row, and only where a row's ", args.cols,
        " logits are kept in shared memory");
    dispatch_out<scalar_t>(out, [&]<class out_t>() {
      succeed(row_loss_grad(
          args, static_cast<out_t*>(out.data_ptr()), out.stride(0), partial.data_ptr<T>(),
          argmax.data_ptr<int64_t>(), upstream.const_data_ptr<T>(), plan,
          c10::cuda::getCurrentCUDAStream()));
    });
  });
}

// Whether row_loss_grad is the better way for whole rows of float32 or (wide) float64 logits with
// so many sparse targets each, on a device. Asks nothing of the device but its properties, once.
bool fuses_on(int64_t rows, int64_t cols, int64_t sparse, bool wide, int device) {
  if (rows == 0 || cols == 0 || cols > kMaxColumns || sparse > kMaxTopk) return false;
  const c10::cuda::CUDAGuard guard(static_cast<c10::DeviceIndex>(device));
  const auto ask = [&]<class scalar_t>() {
    const int fixed = loss_fixed_bytes<scalar_t>(static_cast<int>(sparse));
    return fuses<scalar_t>(rows, static_cast<int>(cols), fixed, device_of(device));
  };
  return wide ? ask.operator()<double>() : ask.operator()<float>();
}

}  // namespace
}  // namespace tightrope::cuda

TORCH_LIBRARY_IMPL(tightrope, CUDA, m) {
  m.impl("row_stats", TORCH_FN(tightrope::cuda::row_stats_op));
  m.impl("row_sides", TORCH_FN(tightrope::cuda::row_sides_op));
  m.impl("row_grad", TORCH_FN(tightrope::cuda::row_grad_op));
  m.impl("row_loss_grad", TORCH_FN(tightrope::cuda::row_loss_grad_op));
}

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  m.doc() = "Tightrope's CUDA row kernels.";
  m.attr("architectures") = TIGHTROPE_CUDA_ARCHITECTURES;
  m.attr("max_topk") = tightrope::cuda::kMaxTopk;
  m.def(
      "fuses", tightrope::cuda::fuses_on, pybind11::arg("rows"), pybind11::arg("cols"),
      pybind11::arg("sparse"), pybind11::arg("wide"), pybind11::arg("device"),
      "Whether row_loss_grad beats row_stats and row_grad for whole rows, on a device.");
}
