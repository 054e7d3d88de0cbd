// What the row kernels share: their arguments, the sweep over a run of one row, and the reduction
// of statistics over a warp and a block.
//
// A thread reads several 16-byte vectors at a time, finds their maximum, moves its own sums to it
// where it is a new one, and adds the entries. So a logit is read once, sums are always relative to
// a maximum that is at least every entry in them, and the costly part (rebasing, finding the
// argmax) runs once in 64 bytes at most. The reduction finds the maximum first, rebases each thread
// once, and then only adds: the merge rule of row_math.h, at a tenth of the price of merging in
// every step. Its order is fixed by the thread numbers alone, so results are the same bits in every
// run.
#pragma once

#include "scalar.cuh"

namespace tightrope::cuda {

constexpr unsigned kAllLanes = 0xffffffffu;
constexpr unsigned kNowhere = 0xffffffffu;
// Vectors that a thread has in flight at a time. In float64, four would not fit 128 registers.
template <class scalar_t>
constexpr int kAheadOf = sizeof(scalar_t) == 8 ? 2 : 4;
// Instances that hold to 64 registers, for twice the threads an SM: see Occupancy beside each
// kernel.
template <class scalar_t, bool kPlain>
constexpr bool kLean = kPlain && sizeof(Arithmetic<scalar_t>) == 4;

// Statistics of part of a row, and the column of its maximum.
template <class T>
struct Part {
  Partial<T> sums;
  unsigned best = kNowhere;
};

// The entries of a row that sparse targets name, as far as they lie in this block's columns: column
// or -1, and logit. Taken before anything is written, because the output may be the logits.
template <class T>
struct Staged {
  T* z;
  int* column;
};

template <class T>
TIGHTROPE_HD constexpr int staged_bytes(int count) {
  return (count * static_cast<int>(sizeof(T) + sizeof(int)) + 15) / 16 * 16;
}

template <class T>
TIGHTROPE_DEVICE Staged<T> staged_at(unsigned char* shared, int count) {
  return {reinterpret_cast<T*>(shared), reinterpret_cast<int*>(shared + count * sizeof(T))};
}

// Raw values of N consecutive columns to logits, in place. The lean instance has nothing to do.
template <bool kPlain, int N, class Args, class T>
TIGHTROPE_DEVICE void transform(const Args& a, int column, T* z) {
  if constexpr (!kPlain) {
    if (a.bias != nullptr) {
      T bias[N];
      load_run<N>(a.bias + column, bias);
#pragma unroll
      for (int k = 0; k < N; ++k) z[k] += bias[k];
    }
    const bool capped = a.softcap != T(0);
    const auto tanh = [](T u) { return std::tanh(u); };
#pragma unroll
    for (int k = 0; k < N; ++k) {
      z[k] = to_logit<T>(z[k], a.logit_scale, capped, a.softcap, a.inverse_softcap, tanh);
    }
  }
}

template <bool kPlain, class Args, class T>
TIGHTROPE_DEVICE void stage_sparse(
    const Args& a, int64_t row, int begin, int end, const Staged<T>& staged) {
  const auto* raw = a.logits + row * a.stride;
  for (int k = threadIdx.x; k < a.sparse(); k += blockDim.x) {
    const int64_t at = row * a.topk + k;
    const int64_t column = (a.index != nullptr ? a.index[row] : a.topk_index[at]) - a.offset;
    const bool counts =
        column >= begin && column < end && (a.index != nullptr || a.topk_prob[at] != T(0));
    staged.column[k] = counts ? static_cast<int>(column) : -1;
    if (counts) {
      T z = widen(load_one(raw + column));
      transform<kPlain, 1>(a, static_cast<int>(column), &z);
      staged.z[k] = z;
    }
  }
}

template <class Args>
TIGHTROPE_DEVICE typename Args::T sparse_mass(const Args& a, int64_t row, int k) {
  return a.index != nullptr ? typename Args::T(1) : a.topk_prob[row * a.topk + k];
}

// Adds kRuns runs of N logits to a thread's statistics; run u starts at column + u * stride. dense:
// the row's dense target, or null. A thread's columns ascend, but for edges, which come alone.
template <int kRuns, int N, class T>
TIGHTROPE_DEVICE void accumulate(
    Part<T>& part, const T* z, int column, int stride, const T* dense) {
  T top = z[0];
#pragma unroll
  for (int i = 1; i < kRuns * N; ++i) top = maximum(top, z[i]);
  if (precedes(top, static_cast<unsigned>(column), part.sums.max, part.best)) {
    part.sums = rebase(part.sums, top);
#pragma unroll
    for (int i = kRuns * N - 1; i >= 0; --i) {
      if (z[i] == top || z[i] != z[i]) part.best = column + i / N * stride + i % N;
    }
  }
  const T shift = origin(part.sums.max);
  const T log_zero = static_cast<T>(kLogZero), sum_scale = static_cast<T>(kSumScale);
  T shifts = T(0);
#pragma unroll
  for (int u = 0; u < kRuns; ++u) {
    T b[N];
    if (dense != nullptr) load_run<N>(dense + column + u * stride, b);
#pragma unroll
    for (int k = 0; k < N; ++k) {
      const T d = z[u * N + k] - shift;
      const T e = exponential(d);
      add_entry(part.sums, z[u * N + k], maximum(d, log_zero), e, sum_scale);
      shifts = fmadd(d, sum_scale, shifts);
      if (dense != nullptr) {
        add_target(part.sums, b[k], b[k] == T(0) ? T(0) : scaled_shift(z[u * N + k], shift), e);
      }
    }
  }
  if (is_far(shift)) {  // some d may have overflowed
    shifts = T(0);
#pragma unroll
    for (int i = 0; i < kRuns * N; ++i) shifts += scaled_shift(z[i], shift);
  }
  part.sums.shift_sum += shifts;
  part.sums.count += kRuns * N;
}

// Reads this thread's share of a run of a row that starts at `begin`, and gives the logits to
// sums.add<kRuns, N>, as `accumulate` takes them. keep(vector, raw) sees every vector that was
// read; edge is this thread's entry of the run's edge, if it has one. kAhead: vectors in flight.
template <bool kPlain, int kAhead, class scalar_t, class Keep, class Sums>
TIGHTROPE_DEVICE void read_run(
    const RowArgs<scalar_t>& a, const scalar_t* start, int begin, const Span<scalar_t>& span,
    scalar_t edge, Keep keep, Sums& sums) {
  using T = Arithmetic<scalar_t>;
  constexpr int kPer = kLanes<scalar_t>;
  const scalar_t* body = start + span.head;
  const int step = blockDim.x;
  const int first = begin + span.head;
  int v = threadIdx.x;
  for (; v + (kAhead - 1) * step < span.vectors; v += kAhead * step) {
    Vector raw[kAhead];
#pragma unroll
    for (int u = 0; u < kAhead; ++u) raw[u] = load_vector(body + int64_t(v + u * step) * kPer);
    T z[kAhead * kPer];
#pragma unroll
    for (int u = 0; u < kAhead; ++u) {
      keep(v + u * step, raw[u]);
      unpack<scalar_t>(raw[u], z + u * kPer);
      transform<kPlain, kPer>(a, first + (v + u * step) * kPer, z + u * kPer);
    }
    sums.template add<kAhead, kPer>(z, first + v * kPer, step * kPer);
  }
  for (; v < span.vectors; v += step) {
    const Vector raw = load_vector(body + int64_t(v) * kPer);
    keep(v, raw);
    T z[kPer];
    unpack<scalar_t>(raw, z);
    transform<kPlain, kPer>(a, first + v * kPer, z);
    sums.template add<1, kPer>(z, first + v * kPer, 0);
  }
  if (static_cast<int>(threadIdx.x) < span.edges()) {
    const int column = begin + span.edge_column(threadIdx.x);
    T z = widen(edge);
    transform<kPlain, 1>(a, column, &z);
    sums.template add<1, 1>(&z, column, 0);
  }
}

template <class T>
struct PartSums {
  Part<T> part;
  const T* dense;

  template <int kRuns, int N>
  TIGHTROPE_DEVICE void add(const T* z, int column, int stride) {
    accumulate<kRuns, N>(part, z, column, stride, dense);
  }
};

// The statistics of this thread's share of a run.
template <bool kPlain, int kAhead, class scalar_t, class T, class Keep>
TIGHTROPE_DEVICE Part<T> sweep(
    const RowArgs<scalar_t>& a, const scalar_t* start, int begin, const Span<scalar_t>& span,
    const T* dense, scalar_t edge, Keep keep) {
  PartSums<T> sums{Part<T>(), kPlain ? nullptr : dense};
  read_run<kPlain, kAhead>(a, start, begin, span, edge, keep, sums);
  return sums.part;
}

// Butterflies: every lane ends with the same bits.
template <class T>
TIGHTROPE_DEVICE T warp_sum(T x) {
#pragma unroll
  for (int lane = kWarp / 2; lane > 0; lane /= 2) x += __shfl_xor_sync(kAllLanes, x, lane);
  return x;
}

// The statistics of a warp's 32 parts, in every lane. targets: whether sums over targets are there
// yet.
template <class T>
TIGHTROPE_DEVICE Part<T> warp_reduce(const Part<T>& part, bool targets) {
  T top = part.sums.max;
#pragma unroll
  for (int lane = kWarp / 2; lane > 0; lane /= 2) {
    top = maximum(top, T(__shfl_xor_sync(kAllLanes, top, lane)));
  }
  Part<T> out;
  out.sums = rebase(part.sums, top);
  const bool mine = part.sums.max == top || part.sums.max != part.sums.max;
  out.best = mine ? part.best : kNowhere;
#pragma unroll
  for (int lane = kWarp / 2; lane > 0; lane /= 2) {
    const unsigned other = __shfl_xor_sync(kAllLanes, out.best, lane);
    if (other < out.best) out.best = other;
  }
  out.sums.sum_exp = warp_sum(out.sums.sum_exp);
  out.sums.sum_exp_shift = warp_sum(out.sums.sum_exp_shift);
  out.sums.sum_exp_square = warp_sum(out.sums.sum_exp_square);
  out.sums.shift_sum = warp_sum(out.sums.shift_sum);
  out.sums.square_sum = warp_sum(out.sums.square_sum);
  out.sums.count = warp_sum(out.sums.count);
  out.sums.logit_sum = warp_sum(out.sums.logit_sum);
  if (targets) {
    out.sums.target_shift = warp_sum(out.sums.target_shift);
    out.sums.target_exp = warp_sum(out.sums.target_exp);
    out.sums.target_mass = warp_sum(out.sums.target_mass);
  }
  return out;
}

// The statistics of a block, in every lane of its first warp. `warps` is shared memory; on return
// all threads have passed a barrier.
template <class T>
TIGHTROPE_DEVICE Part<T> block_reduce(const Part<T>& mine, bool targets, Part<T>* warps) {
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  Part<T> part = warp_reduce(mine, targets);
  if (lane == 0) warps[warp] = part;
  __syncthreads();
  if (warp == 0) {
    part = lane < static_cast<int>(blockDim.x) / kWarp ? warps[lane] : Part<T>();
    part = warp_reduce(part, targets);
  }
  return part;
}

// Adds the staged targets to a block's statistics. By the first warp; the result is in its first
// lane.
template <class Args, class T>
TIGHTROPE_DEVICE void add_sparse(
    const Args& a, int64_t row, const Staged<T>& staged, Partial<T>& sums) {
  Partial<T> target;
  for (int k = threadIdx.x; k < a.sparse(); k += kWarp) {
    if (staged.column[k] < 0) continue;
    const T z = staged.z[k], shift = origin(sums.max);
    add_target(target, sparse_mass(a, row, k), scaled_shift(z, shift), exponential(z - shift));
  }
  if (a.sparse() > 1) {
    target.target_shift = warp_sum(target.target_shift);
    target.target_exp = warp_sum(target.target_exp);
    target.target_mass = warp_sum(target.target_mass);
  }
  sums.target_shift += target.target_shift;
  sums.target_exp += target.target_exp;
  sums.target_mass += target.target_mass;
}

// Statistics as they lie in `partial` [kPartialFields, rows] and `argmax` [rows].
template <class T>
TIGHTROPE_DEVICE Part<T> load_part(
    const T* partial, const int64_t* argmax, int64_t rows, int64_t row) {
  const auto field = [&](int f) { return partial[f * rows + row]; };
  Part<T> part;
  part.sums = {field(0), field(1), field(2), field(3), field(4), field(5),
               field(6), field(7), field(8), field(9), field(10)};
  part.best = static_cast<unsigned>(argmax[row]);
  return part;
}
template <class T>
TIGHTROPE_DEVICE void store_sums(const Partial<T>& s, T* partial, int64_t rows, int64_t row) {
  const T field[kPartialFields] = {s.max,          s.sum_exp,    s.sum_exp_shift, s.sum_exp_square,
                                   s.target_shift, s.target_exp, s.target_mass,   s.shift_sum,
                                   s.square_sum,   s.count,      s.logit_sum};
#pragma unroll
  for (int f = 0; f < kPartialFields; ++f) partial[f * rows + row] = field[f];
}

}  // namespace tightrope::cuda
