// row_grad: writes the gradient of a tile of logits, in place or elsewhere: one read and one write
// of each entry. Elsewhere it may be narrower than the logits: bfloat16 or float16 of float32.
//
// Entries are independent, so a row is cut into as many runs as fill the device. Entries that a
// sparse target names are staged in shared memory before anything is written, and written once more
// after the others, whole and rounded once: no block ever waits for another, and repeated indices
// add up in their order in the target.
//
// Occupancy: as row_stats: 256 threads, four blocks an SM, at most 64 registers (general instance
// and float64: two blocks, 128 registers); shared memory only for staged targets.
#pragma once

#include "row.cuh"

namespace tightrope::cuda {

// A row's gradient: everything that an entry's gradient is made of, but for the entry.
template <class T>
struct Form {
  T max, log_sum;
  Coefficients<T> c;
};

// N logits to their gradients with respect to the raw values, in place. mass: of the target, read
// only where has_mass says so (a flag, since an array that a pointer may or may not point to leaves
// registers).
template <bool kPlain, int N, class Args, class T>
TIGHTROPE_DEVICE void gradients(
    const Args& a, const Form<T>& form, T* z, bool has_mass, const T* mass) {
  const Coefficients<T>& c = form.c;
  const T log_zero = static_cast<T>(kLogZero);
  // Skipped when absent, not multiplied by zero: a masked entry has z = -inf.
  const bool has_logit_term = c.logit != T(0) || c.constant != T(0);
#pragma unroll
  for (int k = 0; k < N; ++k) {
    const T log_p = log_probability(z[k], form.max, form.log_sum);
    const T p = exponential(log_p);
    T g = prob_gradient(p, maximum(log_p, log_zero), c);
    if (has_mass) g += target_gradient(mass[k], p, c);
    if (has_logit_term) g += c.logit == T(0) ? c.constant : logit_gradient(z[k], c);
    if constexpr (!kPlain) {
      g = to_raw_gradient<T>(g, z[k], a.logit_scale, a.softcap != T(0), a.inverse_softcap);
    }
    z[k] = g;
  }
}

// Gradients of one vector of raw values, whose first entry is `column`, to `out`. wide: out is
// aligned.
template <bool kPlain, class scalar_t, class out_t, class T>
TIGHTROPE_DEVICE void write_vector(
    const RowArgs<scalar_t>& a, const Form<T>& form, const Vector& raw, int column, const T* dense,
    out_t* out, bool wide) {
  constexpr int kPer = kLanes<scalar_t>;
  T z[kPer];
  unpack<scalar_t>(raw, z);
  transform<kPlain, kPer>(a, column, z);
  const bool has_mass = !kPlain && dense != nullptr;
  T b[kPer];
  if (has_mass) load_run<kPer>(dense + column, b);
  gradients<kPlain, kPer>(a, form, z, has_mass, b);
  store_run<kPer>(out, z, wide);
}

// Gradients of a run that starts at column `begin`. source(vector) gives a vector's raw values; out
// is the run's first output and may be the logits themselves: a thread reads what it writes.
// kAhead: vectors that a thread reads before it writes the first.
template <bool kPlain, int kAhead, class scalar_t, class out_t, class T, class Source>
TIGHTROPE_DEVICE void write_gradients(
    const RowArgs<scalar_t>& a, const Form<T>& form, int begin, const Span<scalar_t>& span,
    const T* dense, scalar_t edge, out_t* out, Source source) {
  const bool wide = aligned(out + span.head, kLanes<scalar_t> * sizeof(out_t));
  const int step = blockDim.x;
  int v = threadIdx.x;
  for (; v + (kAhead - 1) * step < span.vectors; v += kAhead * step) {
    Vector raw[kAhead];
#pragma unroll
    for (int u = 0; u < kAhead; ++u) raw[u] = source(v + u * step);
#pragma unroll
    for (int u = 0; u < kAhead; ++u) {
      const int column = span.column(v + u * step);
      write_vector<kPlain>(a, form, raw[u], begin + column, dense, out + column, wide);
    }
  }
  for (; v < span.vectors; v += step) {
    const int column = span.column(v);
    write_vector<kPlain>(a, form, source(v), begin + column, dense, out + column, wide);
  }
  if (static_cast<int>(threadIdx.x) < span.edges()) {
    const int column = span.edge_column(threadIdx.x);
    T z = widen(edge), b = T(0);
    transform<kPlain, 1>(a, begin + column, &z);
    const bool has_mass = !kPlain && dense != nullptr;
    if (has_mass) b = dense[begin + column];
    gradients<kPlain, 1>(a, form, &z, has_mass, &b);
    out_t g;
    narrow(z, &g);
    store_one(out + column, g);
  }
}

// Writes the staged entries again, with their target mass. The first of equal indices adds up all.
template <bool kPlain, class scalar_t, class out_t, class T>
TIGHTROPE_DEVICE void write_sparse(
    const RowArgs<scalar_t>& a, const Form<T>& form, int64_t row, const Staged<T>& staged,
    out_t* out) {
  for (int k = threadIdx.x; k < a.sparse(); k += blockDim.x) {
    const int column = staged.column[k];
    if (column < 0) continue;
    T mass = T(0);
    bool first = true;
    for (int other = 0; other < a.sparse(); ++other) {
      if (staged.column[other] != column) continue;
      first = first && other >= k;
      mass += sparse_mass(a, row, other);
    }
    if (!first) continue;
    T z = staged.z[k];
    gradients<kPlain, 1>(a, form, &z, true, &mass);
    out_t g;
    narrow(z, &g);
    store_one(out + column, g);
  }
}

// Zeros in `n` entries from `out`.
template <class scalar_t>
TIGHTROPE_DEVICE void write_zeros(scalar_t* out, int n) {
  const Span<scalar_t> span(out, n);
  for (int v = threadIdx.x; v < span.vectors; v += blockDim.x) {
    store_vector(out + span.column(v), Vector{});
  }
  if (static_cast<int>(threadIdx.x) < span.edges()) {
    store_one(out + span.edge_column(threadIdx.x), scalar_t{});
  }
}

// grid: rows x runs of `run` columns. norm [2, rows], coef [kCoefficients, rows].
template <class scalar_t, class out_t, bool kPlain>
__global__ void __launch_bounds__(kGradThreads, kLean<scalar_t, kPlain> ? 4 : 2) row_grad_kernel(
    const RowArgs<scalar_t> a, out_t* out, int64_t out_stride, const Arithmetic<scalar_t>* norm,
    const Arithmetic<scalar_t>* coef, int run) {
  using T = Arithmetic<scalar_t>;
  constexpr int kPer = kLanes<scalar_t>;
  const int64_t row = blockIdx.x;
  const int begin = blockIdx.y * run;
  const int end = a.cols - begin < run ? a.cols : begin + run;
  out_t* out_row = out + row * out_stride;
  if (a.active != nullptr && !a.active[row]) {
    write_zeros(out_row + begin, end - begin);
    return;
  }
  const scalar_t* start = a.logits + row * a.stride + begin;
  const Span<scalar_t> span(start, end - begin);
  const T* dense = a.dense == nullptr ? nullptr : a.dense + row * a.dense_stride;
  const Staged<T> staged = staged_at<T>(shared_memory(), a.sparse());
  stage_sparse<kPlain>(a, row, begin, end, staged);
  scalar_t edge{};
  if (static_cast<int>(threadIdx.x) < span.edges()) {
    edge = load_one(start + span.edge_column(threadIdx.x));
  }
  const auto value = [&](int k) { return coef[k * a.rows + row]; };
  const Form<T> form{
      norm[row], norm[a.rows + row],
      Coefficients<T>{value(0), value(1), value(2), value(3), value(4), value(5), value(6)}};
  if (a.sparse() > 0) __syncthreads();  // staged before another thread writes
  const scalar_t* body = start + span.head;
  write_gradients<kPlain, kAheadOf<scalar_t>>(
      a, form, begin, span, dense, edge, out_row + begin,
      [&](int v) { return load_vector(body + int64_t(v) * kPer); });
  if (a.sparse() == 0) return;
  __syncthreads();  // after the other entries
  write_sparse<kPlain>(a, form, row, staged, out_row);
}

}  // namespace tightrope::cuda
