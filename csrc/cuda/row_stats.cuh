// row_stats: merges the statistics of a tile of logits into `partial` and `argmax`, reading each
// logit once.
//
// One block takes a run of a row. Where rows are few a row is cut into several runs, whose
// statistics go to a workspace and are merged by a second kernel in the order of the runs: no
// atomics.
//
// Occupancy: 256 threads and four blocks an SM, so at most 64 registers a thread; each thread has
// 64 bytes in flight, 64 KiB an SM. That is above what Little's law asks of HBM: on an H100, 3.35
// TB/s times about 800 ns, over 132 SMs, is 20 KiB. The general instance (bias, scale, softcap,
// dense targets) and float64 settle for two blocks an SM and 128 registers. Shared memory: under 1
// KiB, and 8 bytes (float64: 12) for each top-k entry.
#pragma once

#include "row.cuh"

namespace tightrope::cuda {

// Merges a tile's statistics into those of its row.
template <class T>
TIGHTROPE_DEVICE void merge_into(
    const Part<T>& tile, const StatsOut<T>& out, int64_t rows, int64_t row, int64_t offset) {
  const Part<T> before = load_part(out.partial, out.argmax, rows, row);
  const uint64_t best = static_cast<uint64_t>(out.argmax[row]);
  const uint64_t here =
      tile.best == kNowhere ? ~uint64_t(0) : static_cast<uint64_t>(offset) + tile.best;
  if (precedes(tile.sums.max, here, before.sums.max, best)) {
    out.argmax[row] = static_cast<int64_t>(here);
  }
  store_sums(merge(before.sums, tile.sums), out.partial, rows, row);
}

template <class T>
struct StatsShared {
  Part<T> warps[kStatsThreads / kWarp];
};

template <class T>
TIGHTROPE_HD constexpr int stats_shared_bytes(int sparse) {
  return (static_cast<int>(sizeof(StatsShared<T>)) + 15) / 16 * 16 + staged_bytes<T>(sparse);
}

// grid: rows x splits; a split takes `run` columns.
template <class scalar_t, bool kPlain>
__global__ void __launch_bounds__(kStatsThreads, kLean<scalar_t, kPlain> ? 4 : 2)
    row_stats_kernel(const RowArgs<scalar_t> a, const StatsOut<Arithmetic<scalar_t>> out, int run) {
  using T = Arithmetic<scalar_t>;
  const int64_t row = blockIdx.x;
  if (a.active != nullptr && !a.active[row]) return;
  unsigned char* shared = shared_memory();
  auto* warps = reinterpret_cast<StatsShared<T>*>(shared)->warps;
  const Staged<T> staged = staged_at<T>(shared + stats_shared_bytes<T>(0), a.sparse());

  const int begin = blockIdx.y * run;
  const int end = a.cols - begin < run ? a.cols : begin + run;
  const scalar_t* start = a.logits + row * a.stride + begin;
  const Span<scalar_t> span(start, end - begin);
  const T* dense = a.dense == nullptr ? nullptr : a.dense + row * a.dense_stride;
  scalar_t edge{};
  if (static_cast<int>(threadIdx.x) < span.edges()) {
    edge = load_one(start + span.edge_column(threadIdx.x));
  }
  stage_sparse<kPlain>(a, row, begin, end, staged);
  Part<T> part = sweep<kPlain, kAheadOf<scalar_t>>(
      a, start, begin, span, dense, edge, [](int, const Vector&) {});
  part = block_reduce(part, !kPlain && dense != nullptr, warps);
  if (threadIdx.x >= kWarp) return;
  add_sparse(a, row, staged, part.sums);
  if (threadIdx.x != 0) return;
  if (gridDim.y == 1) {
    merge_into(part, out, a.rows, row, a.offset);
  } else {
    const int64_t split = blockIdx.y;
    store_sums(part.sums, out.split_partial + split * kPartialFields * a.rows, a.rows, row);
    out.split_argmax[split * a.rows + row] =
        part.best == kNowhere ? int64_t(-1) : static_cast<int64_t>(part.best);
  }
}

// The second stage: a warp a row, a lane a split.
template <class T>
__global__ void __launch_bounds__(kStatsThreads) row_stats_merge_kernel(
    const StatsOut<T> out, int64_t rows, int64_t offset, int splits, const bool* active) {
  const int lane = threadIdx.x % kWarp;
  const int64_t row = int64_t(blockIdx.x) * (blockDim.x / kWarp) + threadIdx.x / kWarp;
  if (row >= rows || (active != nullptr && !active[row])) return;
  Part<T> part;
  if (lane < splits) {
    part = load_part(
        out.split_partial + lane * kPartialFields * rows, out.split_argmax + lane * rows, rows,
        row);
  }
  part = warp_reduce(part, true);
  if (lane == 0) merge_into(part, out, rows, row, offset);
}

}  // namespace tightrope::cuda
