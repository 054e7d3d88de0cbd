// Row statistics and row gradients of tiles whose rows are contiguous: the lanes of a vector are
// the entries of a row.
//
// A row is taken in blocks that fit the first-level cache: one pass converts, transforms and finds
// the block's maximum, a second one sums, and the block then merges into the row by the rule of
// row_math.h. So each logit is read from memory once, and no vector is rescaled while it
// accumulates. Every row is computed by one thread in one order: results do not depend on the
// number of threads.
#pragma once

#include "common.h"

namespace tightrope::cpu {
inline namespace CPU_CAPABILITY {

constexpr int64_t kRowBlock = 1024;

// Converts n raw values to logits in `z` and returns their maximum (NaN if any is NaN).
template <class scalar_t, class T>
T load_row_block(
    const scalar_t* raw, int64_t first, int64_t n, const Transform<T>& transform, T* z) {
  using Vec = Vectorized<T>;
  constexpr int64_t kLanes = Vec::size();
  at::vec::convert(raw + first, z, n);
  const Vec zero(T(0)), lowest(-std::numeric_limits<T>::infinity());
  const bool identity = transform.is_identity();
  Vec maximum = lowest;
  for (int64_t j = 0; j < n; j += kLanes) {
    const int64_t lanes = std::min(kLanes, n - j);
    Vec v = Vec::loadu(z + j, lanes);
    if (!identity) {
      const T* bias = transform.bias;
      v = transform.apply(v, bias == nullptr ? zero : Vec::loadu(bias + first + j, lanes));
      v.store(z + j, lanes);
    }
    if (lanes < kLanes) v = Vec::set(lowest, v, lanes);
    maximum = at::vec::maximum(maximum, v);
  }
  return at::vec::vec_reduce_all([](Vec a, Vec b) { return at::vec::maximum(a, b); }, maximum);
}

// Statistics of one block of logits whose maximum is known. `dense` is the block's dense target, or
// null.
template <class T>
Partial<T> row_block_statistics(const T* z, int64_t n, T max, const T* dense) {
  using Vec = Vectorized<T>;
  constexpr int64_t kLanes = Vec::size();
  const Vec zero(T(0)), lowest(-std::numeric_limits<T>::infinity()), shift(origin(max));
  Sums<T> sums;
  for (int64_t j = 0; j < n; j += kLanes) {
    const int64_t lanes = std::min(kLanes, n - j);
    const Vec v = Vec::loadu(z + j, lanes);  // lanes past the end read 0
    Vec d = v - shift, counted = d;
    if (lanes < kLanes) {
      counted = Vec::set(zero, d, lanes);
      d = Vec::set(lowest, d, lanes);
    }
    const Vec e = sums.add(v, counted, d);
    if (dense != nullptr) sums.add_target(Vec::loadu(dense + j, lanes), v, shift, e);
  }
  Partial<T> block{
      max,
      horizontal_sum(sums.sum_exp),
      horizontal_sum(sums.sum_exp_shift),
      horizontal_sum(sums.sum_exp_square),
      horizontal_sum(sums.target_shift),
      horizontal_sum(sums.target_exp),
      horizontal_sum(sums.target_mass),
      horizontal_sum(sums.shift_sum),
      horizontal_sum(sums.square_sum),
      static_cast<T>(n),
      horizontal_sum(sums.logit_sum)};
  recount_far_shifts(block, z, n, 1);
  return block;
}

// Merges the statistics of logits [rows, cols], row stride `stride`, into partial [kPartialFields,
// rows] and argmax [rows] (-1: none yet). Column 0 is entry `offset` of the vocabulary. Rows with
// active[i] false keep what they have.
template <class scalar_t, class T>
void row_stats(
    const scalar_t* logits, int64_t stride, int64_t rows, int64_t cols, int64_t offset,
    const Transform<T>& transform, const Targets<T>& targets, const bool* active, T* partial,
    int64_t* argmax) {
  at::parallel_for(0, rows, grain_size(cols), [&](int64_t begin, int64_t end) {
    alignas(64) T z[kRowBlock];
    for (int64_t i = begin; i < end; ++i) {
      if (active != nullptr && !active[i]) continue;
      Partial<T> row = load_partial(partial, rows, i);
      for (int64_t first = 0; first < cols; first += kRowBlock) {
        const int64_t n = std::min(kRowBlock, cols - first);
        const T max = load_row_block(logits + i * stride, first, n, transform, z);
        Partial<T> block = row_block_statistics(z, n, max, targets.dense_from(i, first));
        targets.for_sparse(i, offset + first, n, [&](int64_t column, T mass) {
          Sums<T>::add_sparse(block, mass, z[column]);
        });
        if (is_new_maximum(argmax[i], max, row.max)) {
          argmax[i] = offset + first + first_maximum(z, n, 1, max);
        }
        row = merge(row, block);
      }
      store_partial(row, partial, rows, i);
    }
  });
}

// Merges the statistics of the two sides of a tile into sides [kSideFields, rows]; the rest is
// as in row_stats.
template <class scalar_t, class T>
void row_sides(
    const scalar_t* logits, int64_t stride, int64_t rows, int64_t cols, int64_t offset,
    const Transform<T>& transform, const Sets<T>& sets, const bool* active, T* sides) {
  using Vec = Vectorized<T>;
  constexpr int64_t kLanes = Vec::size();
  constexpr T kLowest = -std::numeric_limits<T>::infinity();
  at::parallel_for(0, rows, grain_size(cols), [&](int64_t begin, int64_t end) {
    alignas(64) T z[kRowBlock];
    for (int64_t i = begin; i < end; ++i) {
      if (active != nullptr && !active[i]) continue;
      Side<T> set = load_side(sides, 0, rows, i), rest = load_side(sides, 1, rows, i);
      const Vec least(sets.least(i));
      for (int64_t first = 0; first < cols; first += kRowBlock) {
        const int64_t n = std::min(kRowBlock, cols - first);
        load_row_block(logits + i * stride, first, n, transform, z);
        // Entries that are impossible count on no side.
        std::fill(z + n, z + (n + kLanes - 1) / kLanes * kLanes, kLowest);
        sets.for_listed(i, offset + first, n, [&](int64_t column) {
          set = merge(set, side_of(z[column]));
          z[column] = kLowest;
        });
        SidesSums<T> sums;
        for (int64_t j = 0; j < n; j += kLanes) sums.see(Vec::loadu(z + j), least);
        const auto largest = [](const Vec& v) {
          return at::vec::vec_reduce_all([](Vec a, Vec b) { return at::vec::maximum(a, b); }, v);
        };
        const T set_max = largest(sums.set.max), rest_max = largest(sums.rest.max);
        sums.set_origin = Vec(origin(set_max)), sums.rest_origin = Vec(origin(rest_max));
        for (int64_t j = 0; j < n; j += kLanes) sums.add(Vec::loadu(z + j), least);
        const auto reduced = [](T max, const SideSums<T>& side) {
          return Side<T>{max, horizontal_sum(side.sum_exp), horizontal_sum(side.sum_exp_shift)};
        };
        set = merge(set, reduced(set_max, sums.set));
        rest = merge(rest, reduced(rest_max, sums.rest));
      }
      store_side(set, sides, 0, rows, i);
      store_side(rest, sides, 1, rows, i);
    }
  });
}

// Writes dloss/draw of logits [rows, cols] to out [rows, cols], which may be the logits themselves.
// norm [2, rows]: maximum and log of the sum of exponentials of the whole row. coef [kCoefficients,
// rows]. With sets the rest's, then the set's. Rows with active[i] false are not read and get
// zeros. kThreshold: the sets have one.
template <bool kThreshold, class scalar_t, class T>
void row_grad(
    const scalar_t* logits, int64_t stride, scalar_t* out, int64_t out_stride, int64_t rows,
    int64_t cols, int64_t offset, const Transform<T>& transform, const Targets<T>& targets,
    const Sets<T>& sets, const bool* active, const T* norm, const T* coef) {
  using Vec = Vectorized<T>;
  constexpr int64_t kLanes = Vec::size();
  at::parallel_for(0, rows, grain_size(cols), [&](int64_t begin, int64_t end) {
    alignas(64) T z[kRowBlock];
    alignas(64) T g[kRowBlock];
    for (int64_t i = begin; i < end; ++i) {
      if (active != nullptr && !active[i]) {
        std::fill_n(out + i * out_stride, cols, scalar_t(0));
        continue;
      }
      const auto value = [&](const T* from, int k) { return from[k * rows + i]; };
      const auto lanes = [&](const T* from, int k) { return Vec(from[k * rows + i]); };
      const auto whole = Form<T>::load(norm, coef, 0, value);
      const auto set = sets.any() ? Form<T>::load(norm, coef, 1, value) : whole;
      const auto whole_lanes = Form<Vec>::load(norm, coef, 0, lanes);
      const auto set_lanes = kThreshold ? Form<Vec>::load(norm, coef, 1, lanes) : whole_lanes;
      const Vec least(sets.least(i));
      const bool no_logit_term = whole.c.logit == T(0);
      for (int64_t first = 0; first < cols; first += kRowBlock) {
        const int64_t n = std::min(kRowBlock, cols - first);
        load_row_block(logits + i * stride, first, n, transform, z);
        const T* dense = targets.dense_from(i, first);
        for (int64_t j = 0; j < n; j += kLanes) {
          const int64_t count = std::min(kLanes, n - j);
          const Vec v = Vec::loadu(z + j, count);
          Form<Vec> mixed;
          const auto& form =
              kThreshold ? select(whole_lanes, set_lanes, v >= least, mixed) : whole_lanes;
          const Vec log_p = log_probability(v, form.max, form.log_sum);
          const Vec p = exponential(log_p);
          Vec grad = prob_gradient(p, at_least(log_p, static_cast<T>(kLogZero)), form.c);
          if (dense != nullptr)
            grad = grad + target_gradient(Vec::loadu(dense + j, count), p, form.c);
          // z is left out where it is not asked for, not multiplied by zero: a masked entry has
          // -inf.
          grad = grad + (no_logit_term ? form.c.constant : logit_gradient(v, form.c));
          grad.store(g + j, count);
        }
        sets.for_listed(i, offset + first, n, [&](int64_t column) {
          const T* const mass = dense == nullptr ? nullptr : dense + column;
          g[column] = entry_gradient(z[column], set, mass);
        });
        targets.for_sparse(i, offset + first, n, [&](int64_t column, T mass) {
          const bool inside = sets.contains(i, offset + first + column, z[column]);
          const Form<T>& form = inside ? set : whole;
          const T p = std::exp(log_probability(z[column], form.max, form.log_sum));
          g[column] += target_gradient(mass, p, form.c);
        });
        if (!transform.is_identity()) {
          for (int64_t j = 0; j < n; j += kLanes) {
            const int64_t lanes = std::min(kLanes, n - j);
            const Vec v = Vec::loadu(z + j, lanes);
            transform.pull_back(Vec::loadu(g + j, lanes), v).store(g + j, lanes);
          }
        }
        at::vec::convert(g, out + i * out_stride + first, n);
      }
    }
  });
}

// Sums over each column of gradients [rows, cols], row stride `stride`. Every column is summed by
// one thread, row by row.
template <class T>
void sum_of_rows(
    const T* grad, int64_t stride, int64_t rows, int64_t cols, const ColumnSums<T>& wanted) {
  using Vec = Vectorized<T>;
  constexpr int64_t kLanes = Vec::size();
  const int64_t blocks = (cols + kRowBlock - 1) / kRowBlock;
  at::parallel_for(0, blocks, grain_size(rows * kRowBlock), [&](int64_t begin, int64_t end) {
    for (int64_t first = begin * kRowBlock; first < std::min(cols, end * kRowBlock);
         first += kRowBlock) {
      const int64_t n = std::min(kRowBlock, cols - first);
      for (int64_t k = 0; k <= wanted.ranks; ++k) {
        const bool squares = k == wanted.ranks;
        T* const sum = wanted.sums + k * wanted.stride + first;
        std::fill_n(sum, n, T(0));
        for (int64_t i = 0; i < rows; ++i) {
          const T* const row = grad + i * stride + first;
          const Vec factor(wanted.scale), by(squares ? T(0) : wanted.along[k * rows + i]);
          for (int64_t j = 0; j < n; j += kLanes) {
            const int64_t lanes = std::min(kLanes, n - j);
            const Vec g = Vec::loadu(row + j, lanes) * factor;
            at::vec::fmadd(g, squares ? g : by, Vec::loadu(sum + j, lanes)).store(sum + j, lanes);
          }
        }
      }
    }
  });
}

}  // namespace CPU_CAPABILITY
}  // namespace tightrope::cpu
