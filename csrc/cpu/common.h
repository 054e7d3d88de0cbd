// What the row kernels share: how raw values become logits, the targets, and the sums.
//
// rows.h takes tiles whose rows are contiguous and gives a row's entries to the lanes of a vector;
// columns.h takes tiles that lie the other way and gives rows to the lanes. What happens in a lane
// is the same, and stands here.
#pragma once

#include <ATen/Parallel.h>
#include <ATen/cpu/vec/functional.h>
#include <ATen/cpu/vec/vec.h>

#include <algorithm>
#include <cstdint>
#include <type_traits>
#include <vector>

#include "../row_math.h"
#include "exponential.h"

namespace tightrope::cpu {
// Inline symbols must differ between the builds for each instruction set.
inline namespace CPU_CAPABILITY {

using at::vec::Vectorized;

// How raw values become logits: to_logit of row_math.h.
template <class T>
struct Transform {
  using Vec = Vectorized<T>;
  const T* bias;  // [cols] or null
  T logit_scale;
  T softcap;  // 0: none

  bool is_identity() const { return bias == nullptr && logit_scale == T(1) && softcap == T(0); }
  T inverse_cap() const { return softcap == T(0) ? T(0) : T(1) / softcap; }

  // The same of the columns from `first` on.
  Transform from(int64_t first) const {
    return {bias == nullptr ? nullptr : bias + first, logit_scale, softcap};
  }

  Vec apply(Vec x, Vec bias_lanes) const {
    const auto tanh = [](Vec u) { return u.tanh(); };
    return to_logit<Vec>(
        x + bias_lanes, Vec(logit_scale), softcap != T(0), Vec(softcap), Vec(inverse_cap()), tanh);
  }

  // dloss/dz to dloss/dx.
  Vec pull_back(Vec grad, Vec z) const {
    return to_raw_gradient<Vec>(grad, z, Vec(logit_scale), softcap != T(0), Vec(inverse_cap()));
  }

  // The direction of logits z, from that of raw values; impossible entries do not move.
  Vec push_forward(Vec moved, Vec z) const {
    const Vec out =
        to_logit_tangent<Vec>(moved, z, Vec(logit_scale), softcap != T(0), Vec(inverse_cap()));
    return Vec::blendv(out, Vec(T(0)), z == Vec(-std::numeric_limits<T>::infinity()));
  }

  // The derivative of pull_back.
  Vec pull_back_tangent(Vec grad, Vec grad_tangent, Vec z, Vec moved) const {
    return to_raw_gradient_tangent<Vec>(
        grad, grad_tangent, z, moved, Vec(logit_scale), softcap != T(0), Vec(inverse_cap()));
  }
};

// The part of the targets that meets columns [offset, offset + cols); one of three kinds, or none.
template <class T>
struct Targets {
  const int64_t* index;  // [rows]: class of each row, in the whole vocabulary
  const T* dense;        // [rows, cols], row stride dense_stride
  int64_t dense_stride;
  const int64_t* topk_index;  // [rows, topk]
  const T* topk_prob;         // [rows, topk]
  int64_t topk;

  // The dense target of `row` from column `first` on, or null.
  const T* dense_from(int64_t row, int64_t first) const {
    return dense == nullptr ? nullptr : dense + row * dense_stride + first;
  }

  // Calls f(column in the block, mass) for each sparse target of `row` in [first, first + n).
  template <class F>
  void for_sparse(int64_t row, int64_t first, int64_t n, F f) const {
    if (index != nullptr) {
      const int64_t column = index[row] - first;
      if (column >= 0 && column < n) f(column, T(1));
    }
    for (int64_t k = row * topk; k < (row + 1) * topk; ++k) {
      const int64_t column = topk_index[k] - first;
      if (column >= 0 && column < n && topk_prob[k] != T(0)) f(column, topk_prob[k]);
    }
  }
};

// Which entries of each row are in its set; of one kind, or none.
template <class T>
struct Sets {
  const T* threshold;  // [rows]: logits of at least this
  const int64_t*
      classes;  // [rows, count], ascending, of the whole vocabulary; repeated ones are one
  int64_t count;

  bool any() const { return threshold != nullptr || classes != nullptr; }

  // Logits of at least this are in the set of `row`; where the set is a list, none.
  T least(int64_t row) const {
    return threshold == nullptr ? std::numeric_limits<T>::infinity() : threshold[row];
  }

  // Whether column `column` of the vocabulary, whose logit is z, is in the set of `row`.
  bool contains(int64_t row, int64_t column, T z) const {
    if (threshold != nullptr) return z >= threshold[row];
    const int64_t* const list = classes + row * count;
    return classes != nullptr && std::binary_search(list, list + count, column);
  }

  // Calls f(column in the block) for each listed class of `row` in [first, first + n).
  template <class F>
  void for_listed(int64_t row, int64_t first, int64_t n, F f) const {
    if (classes == nullptr) return;
    const int64_t *const list = classes + row * count, *const end = list + count;
    for (const int64_t* at = std::lower_bound(list, end, first); at != end && *at < first + n;
         ++at) {
      if (at == list || *at != at[-1]) f(*at - first);
    }
  }
};

// Up to `Vec::size()` values, converted; lanes past them get 0.
template <class T, class scalar_t>
Vectorized<T> load_lanes(const scalar_t* from, int64_t lanes) {
  if constexpr (std::is_same_v<scalar_t, T>) {
    return Vectorized<T>::loadu(from, lanes);
  } else {
    alignas(64) T converted[Vectorized<T>::size()];
    at::vec::convert(from, converted, lanes);
    return Vectorized<T>::loadu(converted, lanes);
  }
}

template <class T, class scalar_t>
void store_lanes(const Vectorized<T>& value, scalar_t* to, int64_t lanes) {
  if constexpr (std::is_same_v<scalar_t, T>) {
    value.store(to, lanes);
  } else {
    alignas(64) T lane[Vectorized<T>::size()];
    value.store(lane);
    at::vec::convert(lane, to, lanes);
  }
}

template <class T>
T horizontal_sum(const Vectorized<T>& v) {
  return at::vec::vec_reduce_all([](Vectorized<T> a, Vectorized<T> b) { return a + b; }, v);
}

// Whether no lane of a comparison holds.
template <class T>
bool is_none(const Vectorized<T>& holds) {
  return holds.zero_mask() == (1 << Vectorized<T>::size()) - 1;
}

// A side's sums, one in each lane.
template <class T>
struct SideSums : Side<Vectorized<T>> {
  using Vec = Vectorized<T>;

  SideSums() : Side<Vec>{Vec(-std::numeric_limits<T>::infinity()), Vec(T(0)), Vec(T(0))} {}

  void add(Vec e, Vec d) {
    this->sum_exp = this->sum_exp + e;
    this->sum_exp_shift = at::vec::fmadd(e, d, this->sum_exp_shift);
  }
};

// Both sides of some entries whose maxima are known, one in each lane. least: `Sets::least`. Few
// vectors hold an entry of the set, and the others cost one side's sums.
template <class T>
struct SidesSums {
  using Vec = Vectorized<T>;
  SideSums<T> set, rest;
  Vec set_origin, rest_origin;

  // The first pass.
  void see(Vec z, Vec least) {
    const Vec inside = z >= least, lowest(-std::numeric_limits<T>::infinity());
    if (is_none(inside)) {
      rest.max = at::vec::maximum(rest.max, z);
      return;
    }
    set.max = at::vec::maximum(set.max, Vec::blendv(lowest, z, inside));
    rest.max = at::vec::maximum(rest.max, Vec::blendv(z, lowest, inside));
  }

  // The second one, once the origins are set.
  void add(Vec z, Vec least) {
    const Vec inside = z >= least, zero(T(0));
    const T log_zero = static_cast<T>(kLogZero);
    if (is_none(inside)) {
      const Vec d = z - rest_origin;
      rest.add(exponential(d), at_least(d, log_zero));
      return;
    }
    const Vec d = z - Vec::blendv(rest_origin, set_origin, inside);
    const Vec e = exponential(d), bounded = at_least(d, log_zero);
    set.add(Vec::blendv(zero, e, inside), bounded);
    rest.add(Vec::blendv(e, zero, inside), bounded);
  }
};

// One side of a row in a `sides` tensor [kSideFields, rows]: the set, 0, or the rest, 1.
template <class T>
Side<T> load_side(const T* sides, int side, int64_t rows, int64_t i) {
  const T* const field = sides + side * (kSideFields / 2) * rows + i;
  return {field[0], field[rows], field[2 * rows]};
}

template <class T>
void store_side(const Side<T>& value, T* sides, int side, int64_t rows, int64_t i) {
  T* const field = sides + side * (kSideFields / 2) * rows + i;
  field[0] = value.max, field[rows] = value.sum_exp, field[2 * rows] = value.sum_exp_shift;
}

// What a row's gradient is made of, but for the entries. V may be a vector.
template <class V>
struct Form {
  V max, log_sum;
  Coefficients<V> c;

  // value(tensor, field): of norm [2, rows] and coef [kCoefficients, rows], or of the set's, which
  // follow them.
  template <class T, class Value>
  static Form load(const T* norm, const T* coef, int side, Value value) {
    const auto n = [&](int k) { return value(norm, 2 * side + k); };
    const auto c = [&](int k) { return value(coef, kCoefficients * side + k); };
    return {n(0), n(1), {c(0), c(1), c(2), c(3), c(4), c(5), c(6)}};
  }
};

// The one that `inside` says, in each lane; the terms that have no probability are the same. Most
// vectors are of the rest alone, so `mixed` is made only where one is not.
template <class V>
const Form<V>& select(const Form<V>& rest, const Form<V>& set, const V& inside, Form<V>& mixed) {
  if (is_none(inside)) return rest;
  const auto pick = [&](const V& a, const V& b) { return V::blendv(a, b, inside); };
  mixed = rest;
  mixed.max = pick(rest.max, set.max);
  mixed.log_sum = pick(rest.log_sum, set.log_sum);
  mixed.c.prob = pick(rest.c.prob, set.c.prob);
  mixed.c.prob_log_prob = pick(rest.c.prob_log_prob, set.c.prob_log_prob);
  mixed.c.prob_square = pick(rest.c.prob_square, set.c.prob_square);
  mixed.c.target_prob = pick(rest.c.target_prob, set.c.target_prob);
  return mixed;
}

// dloss/dz of an entry of logit z, but for sparse target mass. dense: its mass, or null.
template <class T>
T entry_gradient(T z, const Form<T>& form, const T* dense) {
  const T log_p = log_probability(z, form.max, form.log_sum), p = std::exp(log_p);
  T grad = prob_gradient(p, maximum(log_p, T(kLogZero)), form.c);
  if (dense != nullptr) grad += target_gradient(*dense, p, form.c);
  return grad + (form.c.logit == T(0) ? form.c.constant : logit_gradient(z, form.c));
}

// The sums of a Partial, one in each lane; max and count stay unused.
template <class T>
struct Sums : Partial<Vectorized<T>> {
  using Vec = Vectorized<T>;

  // One entry in each lane: z is what it and its square count as, `counted` what its shift counts
  // as, and d its shift as an exponent; they differ only in lanes past the end of a row. Gives e^d.
  Vec add(Vec z, Vec counted, Vec d) {
    const Vec e = exponential(d), sum_scale(static_cast<T>(kSumScale));
    add_entry<Vec>(*this, z, at_least(d, static_cast<T>(kLogZero)), e, sum_scale);
    this->shift_sum = at::vec::fmadd(counted, sum_scale, this->shift_sum);
    return e;
  }

  // Dense target mass b at that entry. A mass of 0 at an impossible entry is 0 * -inf.
  void add_target(Vec b, Vec z, Vec origin, Vec e) {
    const Vec zero(T(0));
    const Vec scaled = scaled_shift<Vec>(z, origin, Vec(static_cast<T>(kSumScale)));
    tightrope::add_target<Vec>(*this, b, Vec::blendv(scaled, zero, b == zero), e);
  }

  // The same for sparse mass, in a Partial that is already reduced.
  static void add_sparse(Partial<T>& part, T mass, T z) {
    const T shift = origin(part.max);
    tightrope::add_target<T>(part, mass, scaled_shift(z, shift), std::exp(z - shift));
  }
};

// Puts the shift sum of a reduced block right where z - origin(max) may have overflowed: n logits,
// `step` apart.
template <class T>
void recount_far_shifts(Partial<T>& block, const T* z, int64_t n, int64_t step) {
  if (!is_far(block.max)) return;
  block.shift_sum = T(0);
  for (int64_t j = 0; j < n; ++j) block.shift_sum += scaled_shift(z[j * step], block.max);
}

// One row's statistics in a `partial` tensor [kPartialFields, rows].
template <class T>
Partial<T> load_partial(const T* partial, int64_t rows, int64_t i) {
  const auto field = [&](int f) { return partial[f * rows + i]; };
  return {field(0), field(1), field(2), field(3), field(4), field(5),
          field(6), field(7), field(8), field(9), field(10)};
}

template <class T>
void store_partial(const Partial<T>& p, T* partial, int64_t rows, int64_t i) {
  const T fields[kPartialFields] = {p.max,          p.sum_exp,    p.sum_exp_shift, p.sum_exp_square,
                                    p.target_shift, p.target_exp, p.target_mass,   p.shift_sum,
                                    p.square_sum,   p.count,      p.logit_sum};
  for (int f = 0; f < kPartialFields; ++f) partial[f * rows + i] = fields[f];
}

// Whether a block of maximum `max` holds the row's largest logit so far; the first NaN counts as
// largest.
template <class T>
bool is_new_maximum(int64_t best, T max, T so_far) {
  return best < 0 || max > so_far || (max != max && so_far == so_far);
}

// First position of a block's maximum, or of its first NaN, among n values `step` apart.
template <class T>
int64_t first_maximum(const T* z, int64_t n, int64_t step, T max) {
  for (int64_t j = 0; j < n; ++j) {
    if (z[j * step] == max || z[j * step] != z[j * step]) return j;
  }
  return 0;
}

// What is wanted of the columns of a gradient times a scale: their products with row vectors along
// [ranks, rows], then their squares, into sums [ranks + 1, cols], row stride `stride`.
template <class T>
struct ColumnSums {
  const T* along;
  int64_t ranks;
  T scale;
  T* sums;  // null: nothing
  int64_t stride;

  // Sums of column j of the tile, which is at hand: it goes through registers once for each sum.
  void of_column(int64_t j, const T* column, int64_t rows) const {
    using Vec = Vectorized<T>;
    constexpr int64_t kLanes = Vec::size();
    const int64_t whole = rows / kLanes * kLanes;
    const Vec factor(scale);
    // The sum of column times by(value, i, lanes), which is of the same kind.
    const auto product = [&](auto by) {
      Vec sum(T(0));
      for (int64_t i = 0; i < whole; i += kLanes) {
        const Vec g = Vec::loadu(column + i) * factor;
        sum = at::vec::fmadd(g, by(g, i, kLanes), sum);
      }
      if (whole < rows) {  // lanes past the end read 0
        const Vec g = Vec::loadu(column + whole, rows - whole) * factor;
        sum = at::vec::fmadd(g, by(g, whole, rows - whole), sum);
      }
      return horizontal_sum(sum);
    };
    for (int64_t k = 0; k < ranks; ++k) {
      const T* const vector = along + k * rows;
      sums[k * stride + j] = product(
          [&](const Vec&, int64_t i, int64_t lanes) { return Vec::loadu(vector + i, lanes); });
    }
    sums[ranks * stride + j] = product([](const Vec& g, int64_t, int64_t) { return g; });
  }
};

// Rows (or groups of rows) that make a task worth a thread.
inline int64_t grain_size(int64_t entries_each) {
  return std::max<int64_t>(1, 16384 / std::max<int64_t>(entries_each, 1));
}

}  // namespace CPU_CAPABILITY
}  // namespace tightrope::cpu
