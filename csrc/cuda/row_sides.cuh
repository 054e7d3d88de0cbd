// row_sides: merges what a tile of logits adds to the two sides of each row, its set of classes and
// the rest, reading each logit once.
//
// The shape is that of row_stats: a block takes a run of a row, and a second kernel merges the runs
// of a row that is cut, in their order. A thread adds its entries to the rest; only a vector that
// holds an entry of the set goes through both sides, and what is not of a side is -inf to it, which
// adds exactly nothing. Sets are small, so that is rare.
//
// Occupancy: as row_stats, with 48 bytes in flight of 16-bit logits; shared memory under 1 KiB.
#pragma once

#include "sides.cuh"

namespace tightrope::cuda {

// Vectors in flight. With four, the instance for float16 logits spills on sm_80.
template <class scalar_t>
constexpr int kSidesAheadOf = sizeof(scalar_t) == 2 ? 3 : kAheadOf<scalar_t>;

template <class T>
struct Sides {
  Side<T> set, rest;
};

// Adds N logits to a side; value(k) gives one, or -inf.
template <int N, class T, class Value>
TIGHTROPE_DEVICE void add_logits(Side<T>& side, Value value) {
  T top = value(0);
#pragma unroll
  for (int k = 1; k < N; ++k) top = maximum(top, value(k));
  if (!(top <= side.max)) side = rebase(side, maximum(top, side.max));
  const T shift = origin(side.max), log_zero = static_cast<T>(kLogZero);
#pragma unroll
  for (int k = 0; k < N; ++k) {
    const T d = value(k) - shift;
    const T e = exponential(d);
    side.sum_exp += e;
    side.sum_exp_shift = fmadd(e, maximum(d, log_zero), side.sum_exp_shift);
  }
}

// A thread's sums, for read_run.
template <class T>
struct SideSums {
  Sides<T> sides;
  const Members<T> members;

  template <int kRuns, int N>
  TIGHTROPE_DEVICE void add(const T* z, int column, int stride) {
    static_assert(kRuns * N <= 32, "a bit for each");
    unsigned in = 0;
#pragma unroll
    for (int u = 0; u < kRuns; ++u) {
      in |= members.template among<N>(z + u * N, column + u * stride) << (u * N);
    }
    if (in == 0) return add_logits<kRuns * N>(sides.rest, [=](int k) { return z[k]; });
    const T nothing = -std::numeric_limits<T>::infinity();
#pragma unroll
    for (int u = 0; u < kRuns; ++u) {
      const auto of_set = [=](int k) { return (in >> (u * N + k) & 1) != 0; };
      add_logits<N>(sides.set, [=](int k) { return of_set(k) ? z[u * N + k] : nothing; });
      add_logits<N>(sides.rest, [=](int k) { return of_set(k) ? nothing : z[u * N + k]; });
    }
  }
};

// The sides of a warp's 32 parts, in every lane.
template <class T>
TIGHTROPE_DEVICE Side<T> warp_reduce(const Side<T>& part) {
  T top = part.max;
#pragma unroll
  for (int lane = kWarp / 2; lane > 0; lane /= 2) {
    top = maximum(top, T(__shfl_xor_sync(kAllLanes, top, lane)));
  }
  Side<T> out = rebase(part, top);
  out.sum_exp = warp_sum(out.sum_exp);
  out.sum_exp_shift = warp_sum(out.sum_exp_shift);
  return out;
}
template <class T>
TIGHTROPE_DEVICE Sides<T> warp_reduce(const Sides<T>& part) {
  return {warp_reduce(part.set), warp_reduce(part.rest)};
}

// Sides as they lie in `sides` [kSideFields, rows].
template <class T>
TIGHTROPE_DEVICE Sides<T> load_sides(const T* sides, int64_t rows, int64_t row) {
  const auto field = [&](int f) { return sides[f * rows + row]; };
  return {{field(0), field(1), field(2)}, {field(3), field(4), field(5)}};
}
template <class T>
TIGHTROPE_DEVICE void store_sides(const Sides<T>& s, T* sides, int64_t rows, int64_t row) {
  const T field[kSideFields] = {s.set.max,  s.set.sum_exp,  s.set.sum_exp_shift,
                                s.rest.max, s.rest.sum_exp, s.rest.sum_exp_shift};
#pragma unroll
  for (int f = 0; f < kSideFields; ++f) sides[f * rows + row] = field[f];
}
template <class T>
TIGHTROPE_DEVICE void merge_into(const Sides<T>& tile, T* sides, int64_t rows, int64_t row) {
  const Sides<T> before = load_sides(sides, rows, row);
  store_sides<T>({merge(before.set, tile.set), merge(before.rest, tile.rest)}, sides, rows, row);
}

template <class T>
constexpr int kSidesSharedBytes = sizeof(Sides<T>) * (kStatsThreads / kWarp);

// grid: rows x splits; a split takes `run` columns.
template <class scalar_t, bool kPlain>
__global__ void __launch_bounds__(kStatsThreads, kLean<scalar_t, kPlain> ? 4 : 2) row_sides_kernel(
    const RowArgs<scalar_t> a, const SideArgs<Arithmetic<scalar_t>> which,
    const SidesOut<Arithmetic<scalar_t>> out, int run) {
  using T = Arithmetic<scalar_t>;
  const int64_t row = blockIdx.x;
  if (a.active != nullptr && !a.active[row]) return;
  const int begin = blockIdx.y * run;
  const int end = a.cols - begin < run ? a.cols : begin + run;
  const scalar_t* start = a.logits + row * a.stride + begin;
  const Span<scalar_t> span(start, end - begin);
  scalar_t edge{};
  if (static_cast<int>(threadIdx.x) < span.edges()) {
    edge = load_one(start + span.edge_column(threadIdx.x));
  }
  SideSums<T> sums{Sides<T>(), Members<T>(which, row, a.offset, begin, end)};
  read_run<kPlain, kSidesAheadOf<scalar_t>>(
      a, start, begin, span, edge, [](int, const Vector&) {}, sums);

  auto* warps = reinterpret_cast<Sides<T>*>(shared_memory());
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  Sides<T> sides = warp_reduce(sums.sides);
  if (lane == 0) warps[warp] = sides;
  __syncthreads();
  if (warp != 0) return;
  sides = warp_reduce(lane < static_cast<int>(blockDim.x) / kWarp ? warps[lane] : Sides<T>());
  if (lane != 0) return;
  if (gridDim.y == 1) {
    merge_into(sides, out.sides, a.rows, row);
  } else {
    store_sides(sides, out.split_sides + blockIdx.y * kSideFields * a.rows, a.rows, row);
  }
}

// The second stage: a warp a row, a lane a split.
template <class T>
__global__ void __launch_bounds__(kStatsThreads)
    row_sides_merge_kernel(const SidesOut<T> out, int64_t rows, int splits, const bool* active) {
  const int lane = threadIdx.x % kWarp;
  const int64_t row = int64_t(blockIdx.x) * (blockDim.x / kWarp) + threadIdx.x / kWarp;
  if (row >= rows || (active != nullptr && !active[row])) return;
  Sides<T> sides;
  if (lane < splits) sides = load_sides(out.split_sides + lane * kSideFields * rows, rows, row);
  sides = warp_reduce(sides);
  if (lane == 0) merge_into(sides, out.sides, rows, row);
}

}  // namespace tightrope::cuda
