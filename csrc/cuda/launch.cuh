// The launchers of the row kernels: pick the instance, lay out the grid, launch.
//
// Included once per storage type, by rows_*.cu, so that the instances build in parallel; and by the
// tests, where the launch runs on the CPU.
#pragma once

#include "row_loss_grad.cuh"
#include "row_sides.cuh"

namespace tightrope::cuda {

struct Shape {
  int64_t x;
  int y, threads, cluster, shared;
};

#if defined(TIGHTROPE_SIMT)

template <class... P, class... A>
int launch(void (*kernel)(P...), const Shape& shape, CUstream_st*, const A&... args) {
  const simt::Dim grid{static_cast<unsigned>(shape.x), static_cast<unsigned>(shape.y), 1};
  simt::launch(grid, shape.threads, shape.cluster, shape.shared, [=] { kernel(args...); });
  return 0;
}

#else

template <class... P, class... A>
int launch(void (*kernel)(P...), const Shape& shape, CUstream_st* stream, const A&... args) {
  constexpr int kWithoutOptIn = 48 << 10;
  if (shape.shared > kWithoutOptIn) {
    // To the most that a block can have, whatever this launch needs: another thread, which launches
    // the same kernel between these calls and the launch, must not lower it.
    int device = 0, most = 0;
    cudaError_t error = cudaGetDevice(&device);
    if (error == cudaSuccess) {
      error = cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
    }
    if (error == cudaSuccess) {
      error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, most);
    }
    if (error != cudaSuccess) return error;
  }
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(shape.x), static_cast<unsigned>(shape.y));
  config.blockDim = dim3(static_cast<unsigned>(shape.threads));
  config.dynamicSmemBytes = shape.shared;
  config.stream = stream;
  cudaLaunchAttribute cluster{};
  cluster.id = cudaLaunchAttributeClusterDimension;
  cluster.val.clusterDim = {static_cast<unsigned>(shape.cluster), 1, 1};
  config.attrs = &cluster;
  config.numAttrs = shape.cluster > 1 ? 1 : 0;
  return cudaLaunchKernelEx(&config, kernel, P(args)...);
}

#endif

template <class scalar_t>
int row_stats(
    const RowArgs<scalar_t>& args, const StatsOut<Arithmetic<scalar_t>>& out, const Runs& runs,
    CUstream_st* stream) {
  using T = Arithmetic<scalar_t>;
  const auto kernel =
      args.plain() ? row_stats_kernel<scalar_t, true> : row_stats_kernel<scalar_t, false>;
  const Shape shape{args.rows, runs.count, runs.threads, 1, stats_shared_bytes<T>(args.sparse())};
  const int error = launch(kernel, shape, stream, args, out, runs.columns);
  if (error != 0 || runs.count == 1) return error;
  constexpr int kRows = kStatsThreads / kWarp;
  const Shape second{(args.rows + kRows - 1) / kRows, 1, kStatsThreads, 1, 0};
  return launch(
      row_stats_merge_kernel<T>, second, stream, out, args.rows, args.offset, runs.count,
      args.active);
}

template <class scalar_t>
int row_sides(
    const RowArgs<scalar_t>& args, const SideArgs<Arithmetic<scalar_t>>& which,
    const SidesOut<Arithmetic<scalar_t>>& out, const Runs& runs, CUstream_st* stream) {
  using T = Arithmetic<scalar_t>;
  const auto kernel =
      args.raw_are_logits() ? row_sides_kernel<scalar_t, true> : row_sides_kernel<scalar_t, false>;
  const Shape shape{args.rows, runs.count, runs.threads, 1, kSidesSharedBytes<T>};
  const int error = launch(kernel, shape, stream, args, which, out, runs.columns);
  if (error != 0 || runs.count == 1) return error;
  constexpr int kRows = kStatsThreads / kWarp;
  const Shape second{(args.rows + kRows - 1) / kRows, 1, kStatsThreads, 1, 0};
  return launch(row_sides_merge_kernel<T>, second, stream, out, args.rows, runs.count, args.active);
}

template <class scalar_t, class out_t>
int row_grad(
    const RowArgs<scalar_t>& args, const SideArgs<Arithmetic<scalar_t>>& which, out_t* out,
    int64_t out_stride, const Arithmetic<scalar_t>* norm, const Arithmetic<scalar_t>* coef,
    const Runs& runs, CUstream_st* stream) {
  const auto kernel = args.plain() && !which.given() ? row_grad_kernel<scalar_t, out_t, true>
                                                     : row_grad_kernel<scalar_t, out_t, false>;
  const Shape shape{
      args.rows, runs.count, runs.threads, 1, staged_bytes<Arithmetic<scalar_t>>(args.sparse())};
  return launch(kernel, shape, stream, args, which, out, out_stride, norm, coef, runs.columns);
}

template <class scalar_t>
int loss_fixed_bytes(int sparse) {
  return loss_shared_bytes<Arithmetic<scalar_t>>(sparse);
}

template <class scalar_t>
bool loss_has_clusters() {
#if defined(TIGHTROPE_SIMT)
  return true;
#else
  cudaFuncAttributes attributes{};
  const auto kernel = row_loss_grad_kernel<scalar_t, scalar_t, true>;
  return cudaFuncGetAttributes(&attributes, kernel) == cudaSuccess && attributes.ptxVersion >= 90;
#endif
}

template <class scalar_t, class out_t>
int row_loss_grad(
    const RowArgs<scalar_t>& args, out_t* out, int64_t out_stride, Arithmetic<scalar_t>* partial,
    int64_t* argmax, const Arithmetic<scalar_t>* upstream, const LossPlan& plan,
    CUstream_st* stream) {
  const auto kernel = args.plain() ? row_loss_grad_kernel<scalar_t, out_t, true>
                                   : row_loss_grad_kernel<scalar_t, out_t, false>;
  const int cluster = plan.runs.count;
  const Shape shape{args.rows * cluster, 1, plan.runs.threads, cluster, plan.shared};
  return launch(
      kernel, shape, stream, args, out, out_stride, partial, argmax, upstream, cluster,
      plan.runs.columns, plan.kept);
}

}  // namespace tightrope::cuda

#define TIGHTROPE_INSTANTIATE(scalar_t)                                                            \
  namespace tightrope::cuda {                                                                      \
  template int row_stats<scalar_t>(                                                                \
      const RowArgs<scalar_t>&, const StatsOut<Arithmetic<scalar_t>>&, const Runs&, CUstream_st*); \
  template int row_sides<scalar_t>(                                                                \
      const RowArgs<scalar_t>&, const SideArgs<Arithmetic<scalar_t>>&,                             \
      const SidesOut<Arithmetic<scalar_t>>&, const Runs&, CUstream_st*);                           \
  template int loss_fixed_bytes<scalar_t>(int);                                                    \
  template bool loss_has_clusters<scalar_t>();                                                     \
  }                                                                                                \
  TIGHTROPE_INSTANTIATE_GRADIENTS(scalar_t, scalar_t)

#define TIGHTROPE_INSTANTIATE_GRADIENTS(scalar_t, out_t)                                    \
  namespace tightrope::cuda {                                                               \
  template int row_grad<scalar_t, out_t>(                                                   \
      const RowArgs<scalar_t>&, const SideArgs<Arithmetic<scalar_t>>&, out_t*, int64_t,     \
      const Arithmetic<scalar_t>*, const Arithmetic<scalar_t>*, const Runs&, CUstream_st*); \
  template int row_loss_grad<scalar_t, out_t>(                                              \
      const RowArgs<scalar_t>&, out_t*, int64_t, Arithmetic<scalar_t>*, int64_t*,           \
      const Arithmetic<scalar_t>*, const LossPlan&, CUstream_st*);                          \
  }
