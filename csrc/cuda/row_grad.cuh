// row_grad: writes the gradient of a tile of logits, in place or elsewhere: one read and one write
// of each entry. Elsewhere it may be narrower than the logits: bfloat16 or float16 of float32.
//
// Entries are independent, so a row is cut into as many runs as fill the device. Entries that a
// sparse target names are staged in shared memory before anything is written, and written once more
// after the others, whole and rounded once: no block ever waits for another, and repeated indices
// add up in their order in the target.
//
// Where rows have a set of classes an entry takes the form of its side. That is the general
// instance's alone, whose vectors without an entry of the set cost no more than they do without
// one.
//
// Occupancy: as row_stats: 256 threads, four blocks an SM, at most 64 registers (general instance
// and float64: two blocks, 128 registers); shared memory only for staged targets.
#pragma once

#include "sides.cuh"

namespace tightrope::cuda {

// A row's gradient: everything that an entry's gradient is made of, but for the entry.
template <class T>
struct Form {
  T max, log_sum;
  Coefficients<T> c;
};

template <class T>
TIGHTROPE_DEVICE Form<T> load_form(const T* norm, const T* coef, int64_t rows, int64_t row) {
  const auto value = [&](int k) { return coef[k * rows + row]; };
  return {
      norm[row], norm[rows + row],
      Coefficients<T>{value(0), value(1), value(2), value(3), value(4), value(5), value(6)}};
}

// Field by field: a reference to one or the other would leave registers.
template <class T>
TIGHTROPE_DEVICE Form<T> select(bool first, const Form<T>& x, const Form<T>& y) {
  const auto pick = [first](T u, T v) { return first ? u : v; };
  return {
      pick(x.max, y.max),
      pick(x.log_sum, y.log_sum),
      {pick(x.c.prob, y.c.prob), pick(x.c.prob_log_prob, y.c.prob_log_prob),
       pick(x.c.prob_square, y.c.prob_square), pick(x.c.target, y.c.target),
       pick(x.c.target_prob, y.c.target_prob), pick(x.c.logit, y.c.logit),
       pick(x.c.constant, y.c.constant)}};
}

// The forms of the two sides of a row. That of the set is read where it is needed: few vectors have
// an entry of the set, and for both forms float64 has no registers.
template <class T>
struct SidedForm {
  Form<T> rest;
  Members<T> members;
  const T *norm, *coef;  // of the set
  int64_t rows, row;

  TIGHTROPE_DEVICE Form<T> set() const { return load_form(norm, coef, rows, row); }
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

template <bool kPlain, int N, class Args, class T>
TIGHTROPE_DEVICE void gradients_at(
    const Args& a, const Form<T>& form, int, T* z, bool has_mass, const T* mass) {
  gradients<kPlain, N>(a, form, z, has_mass, mass);
}
// The same of N consecutive logits from `column`, each by its side.
template <bool kPlain, int N, class Args, class T>
TIGHTROPE_DEVICE void gradients_at(
    const Args& a, const SidedForm<T>& form, int column, T* z, bool has_mass, const T* mass) {
  const unsigned in = form.members.template among<N>(z, column);
  if (in == 0) return gradients<kPlain, N>(a, form.rest, z, has_mass, mass);
  const Form<T> set = form.set();
#pragma unroll
  for (int k = 0; k < N; ++k) {
    const Form<T> own = select((in >> k & 1) != 0, set, form.rest);
    gradients<kPlain, 1>(a, own, z + k, has_mass, mass + k);
  }
}

// Gradients of one vector of raw values, whose first entry is `column`, to `out`. wide: out is
// aligned.
template <bool kPlain, class scalar_t, class out_t, class Forms, class T>
TIGHTROPE_DEVICE void write_vector(
    const RowArgs<scalar_t>& a, const Forms& form, const Vector& raw, int column, const T* dense,
    out_t* out, bool wide) {
  constexpr int kPer = kLanes<scalar_t>;
  T z[kPer];
  unpack<scalar_t>(raw, z);
  transform<kPlain, kPer>(a, column, z);
  const bool has_mass = !kPlain && dense != nullptr;
  T b[kPer];
  if (has_mass) load_run<kPer>(dense + column, b);
  gradients_at<kPlain, kPer>(a, form, column, z, has_mass, b);
  store_run<kPer>(out, z, wide);
}

// Gradients of a run that starts at column `begin`. source(vector) gives a vector's raw values; out
// is the run's first output and may be the logits themselves: a thread reads what it writes.
// kAhead: vectors that a thread reads before it writes the first.
template <bool kPlain, int kAhead, class scalar_t, class out_t, class Forms, class T, class Source>
TIGHTROPE_DEVICE void write_gradients(
    const RowArgs<scalar_t>& a, const Forms& form, int begin, const Span<scalar_t>& span,
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
    gradients_at<kPlain, 1>(a, form, begin + column, &z, has_mass, &b);
    out_t g;
    narrow(z, &g);
    store_one(out + column, g);
  }
}

// Writes the staged entries again, with their target mass. The first of equal indices adds up all.
template <bool kPlain, class scalar_t, class out_t, class Forms, class T>
TIGHTROPE_DEVICE void write_sparse(
    const RowArgs<scalar_t>& a, const Forms& form, int64_t row, const Staged<T>& staged,
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
    gradients_at<kPlain, 1>(a, form, column, &z, true, &mass);
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

// grid: rows x runs of `run` columns. The plain instance takes no set.
template <class scalar_t, class out_t, bool kPlain>
__global__ void __launch_bounds__(kGradThreads, kLean<scalar_t, kPlain> ? 4 : 2) row_grad_kernel(
    const RowArgs<scalar_t> a, const SideArgs<Arithmetic<scalar_t>> which, out_t* out,
    int64_t out_stride, const Arithmetic<scalar_t>* norm, const Arithmetic<scalar_t>* coef,
    int run) {
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
  const Form<T> rest = load_form(norm, coef, a.rows, row);
  if (a.sparse() > 0) __syncthreads();  // staged before another thread writes
  const scalar_t* body = start + span.head;
  const auto write = [&](const auto& form) {
    write_gradients<kPlain, kAheadOf<scalar_t>>(
        a, form, begin, span, dense, edge, out_row + begin,
        [&](int v) { return load_vector(body + int64_t(v) * kPer); });
    if (a.sparse() == 0) return;
    __syncthreads();  // after the other entries
    write_sparse<kPlain>(a, form, row, staged, out_row);
  };
  if constexpr (kPlain) {
    write(rest);
  } else {
    write(
        SidedForm<T>{
            rest, Members<T>(which, row, a.offset, begin, end), norm + 2 * a.rows,
            coef + kCoefficients * a.rows, a.rows, row});
  }
}

}  // namespace tightrope::cuda
