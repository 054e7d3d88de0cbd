// Row statistics and row gradients on a CPU, vectorised over a row and threaded over rows.
//
// A row is taken in blocks that fit the first-level cache: one pass converts, transforms and finds
// the block's maximum, a second one sums, and the block then merges into the row by the rule of
// row_math.h. So each logit is read from memory once, and no vector is rescaled while it
// accumulates. Every row is computed by one thread in one order: results do not depend on the
// number of threads.
#pragma once

#include <ATen/OpMathType.h>
#include <ATen/Parallel.h>
#include <ATen/cpu/vec/functional.h>
#include <ATen/cpu/vec/vec.h>

#include <algorithm>
#include <cstdint>
#include <optional>

#include "../row_math.h"

namespace tightrope::cpu {
// Inline symbols must differ between the builds for each instruction set, which share one process.
inline namespace CPU_CAPABILITY {

using at::vec::Vectorized;

constexpr int64_t kBlock = 1024;

// How raw values become logits: z = softcap * tanh(logit_scale * (x + bias) / softcap).
template <class T>
struct Transform {
  const T* bias;  // [cols] or null
  T logit_scale;
  T softcap;  // 0: none
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

template <class T>
T horizontal_sum(const Vectorized<T>& v) {
  return at::vec::vec_reduce_all([](Vectorized<T> a, Vectorized<T> b) { return a + b; }, v);
}

// Converts n raw values to logits in `z` and returns their maximum (NaN if any is NaN).
template <class scalar_t, class T>
T load_block(const scalar_t* raw, int64_t first, int64_t n, const Transform<T>& transform, T* z) {
  using Vec = Vectorized<T>;
  constexpr int64_t kLanes = Vec::size();
  at::vec::convert(raw + first, z, n);
  const Vec lowest(-std::numeric_limits<T>::infinity());
  const Vec scale(transform.logit_scale), cap(transform.softcap);
  const Vec inverse_cap(transform.softcap == T(0) ? T(0) : T(1) / transform.softcap);
  const bool plain =
      transform.bias == nullptr && transform.logit_scale == T(1) && transform.softcap == T(0);
  Vec maximum = lowest;
  for (int64_t j = 0; j < n; j += kLanes) {
    const int64_t lanes = std::min(kLanes, n - j);
    Vec v = Vec::loadu(z + j, lanes);
    if (!plain) {
      if (transform.bias != nullptr) v = v + Vec::loadu(transform.bias + first + j, lanes);
      v = v * scale;
      if (transform.softcap != T(0)) v = cap * (v * inverse_cap).tanh();
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
Partial<T> block_statistics(const T* z, int64_t n, T max, const T* dense) {
  using Vec = Vectorized<T>;
  constexpr int64_t kLanes = Vec::size();
  const Vec zero(T(0)), lowest(-std::numeric_limits<T>::infinity());
  const Vec shift(origin(max)), log_zero(static_cast<T>(kLogZero));
  Partial<Vec> sums{lowest, zero, zero, zero, zero, zero, zero, zero, zero, zero};
  for (int64_t j = 0; j < n; j += kLanes) {
    const int64_t lanes = std::min(kLanes, n - j);
    Vec v = Vec::loadu(z + j, lanes);  // lanes past the end read 0
    Vec d = v - shift;
    if (lanes == kLanes) {
      sums.shift_sum = sums.shift_sum + d;
    } else {
      sums.shift_sum = sums.shift_sum + Vec::set(zero, d, lanes);
      d = Vec::set(lowest, d, lanes);
    }
    const Vec e = d.exp();
    add_entry(sums, v, d, e, log_zero);
    if (dense != nullptr) {
      const Vec b = Vec::loadu(dense + j, lanes);
      add_target(sums, b, Vec::blendv(d, zero, b == zero), e);
    }
  }
  Partial<T> out;
  out.max = max;
  out.sum_exp = horizontal_sum(sums.sum_exp);
  out.sum_exp_shift = horizontal_sum(sums.sum_exp_shift);
  out.sum_exp_square = horizontal_sum(sums.sum_exp_square);
  out.target_shift = horizontal_sum(sums.target_shift);
  out.target_exp = horizontal_sum(sums.target_exp);
  out.target_mass = horizontal_sum(sums.target_mass);
  out.shift_sum = horizontal_sum(sums.shift_sum);
  out.square_sum = horizontal_sum(sums.square_sum);
  out.count = static_cast<T>(n);
  return out;
}

// First position of the block's maximum; of its first NaN if it has one.
template <class T>
int64_t first_maximum(const T* z, int64_t n, T max) {
  for (int64_t j = 0; j < n; ++j) {
    if (z[j] == max || z[j] != z[j]) return j;
  }
  return 0;
}

// Merges the statistics of logits [rows, cols], row stride `stride`, into partial [kPartialFields,
// rows] and argmax [rows] (-1: none yet). Column 0 is entry `offset` of the vocabulary. Rows with
// active[i] false are neither read nor written.
template <class scalar_t, class T>
void row_stats(
    const scalar_t* logits, int64_t stride, int64_t rows, int64_t cols, int64_t offset,
    const Transform<T>& transform, const Targets<T>& targets, const bool* active, T* partial,
    int64_t* argmax) {
  const int64_t grain = std::max<int64_t>(1, 16 * kBlock / std::max<int64_t>(cols, 1));
  at::parallel_for(0, rows, grain, [&](int64_t begin, int64_t end) {
    alignas(64) T z[kBlock];
    for (int64_t i = begin; i < end; ++i) {
      if (active != nullptr && !active[i]) continue;
      Partial<T> row;
      T* const field = reinterpret_cast<T*>(&row);
      for (int f = 0; f < kPartialFields; ++f) field[f] = partial[f * rows + i];
      int64_t best = argmax[i];
      for (int64_t first = 0; first < cols; first += kBlock) {
        const int64_t n = std::min(kBlock, cols - first);
        const T max = load_block(logits + i * stride, first, n, transform, z);
        const T* dense =
            targets.dense == nullptr ? nullptr : targets.dense + i * targets.dense_stride + first;
        Partial<T> block = block_statistics(z, n, max, dense);
        targets.for_sparse(i, offset + first, n, [&](int64_t column, T mass) {
          const T d = z[column] - origin(max);
          add_target(block, mass, d, T(std::exp(d)));
        });
        if (best < 0 || max > row.max || (max != max && row.max == row.max)) {
          best = offset + first + first_maximum(z, n, max);
        }
        row = merge(row, block);
      }
      for (int f = 0; f < kPartialFields; ++f) partial[f * rows + i] = field[f];
      argmax[i] = best;
    }
  });
}

// Writes dloss/draw of logits [rows, cols] to out [rows, cols], which may be the logits themselves.
// norm [2, rows]: maximum and log of the sum of exponentials of the whole row. coef [kCoefficients,
// rows]. Rows with active[i] false are not read and get zeros.
template <class scalar_t, class T>
void row_grad(
    const scalar_t* logits, int64_t stride, scalar_t* out, int64_t out_stride, int64_t rows,
    int64_t cols, int64_t offset, const Transform<T>& transform, const Targets<T>& targets,
    const bool* active, const T* norm, const T* coef) {
  using Vec = Vectorized<T>;
  constexpr int64_t kLanes = Vec::size();
  const int64_t grain = std::max<int64_t>(1, 16 * kBlock / std::max<int64_t>(cols, 1));
  at::parallel_for(0, rows, grain, [&](int64_t begin, int64_t end) {
    alignas(64) T z[kBlock];
    alignas(64) T g[kBlock];
    const Vec log_zero(static_cast<T>(kLogZero)), scale(transform.logit_scale);
    const T inverse_cap = transform.softcap == T(0) ? T(0) : T(1) / transform.softcap;
    for (int64_t i = begin; i < end; ++i) {
      if (active != nullptr && !active[i]) {
        std::fill_n(out + i * out_stride, cols, scalar_t(0));
        continue;
      }
      const T max = norm[i], log_sum = norm[rows + i];
      const auto value = [&](int k) { return coef[k * rows + i]; };
      const Coefficients<T> c{value(0), value(1), value(2), value(3), value(4), value(5), value(6)};
      const Coefficients<Vec> vc{Vec(c.prob),    Vec(c.prob_log_prob), Vec(c.prob_square),
                                 Vec(c.target),  Vec(c.target_prob),   Vec(c.logit),
                                 Vec(c.constant)};
      // Skipped when absent, not multiplied by zero: a masked entry has z = -inf.
      const bool has_logit_term = c.logit != T(0) || c.constant != T(0);
      for (int64_t first = 0; first < cols; first += kBlock) {
        const int64_t n = std::min(kBlock, cols - first);
        load_block(logits + i * stride, first, n, transform, z);
        const T* dense =
            targets.dense == nullptr ? nullptr : targets.dense + i * targets.dense_stride + first;
        for (int64_t j = 0; j < n; j += kLanes) {
          const int64_t lanes = std::min(kLanes, n - j);
          const Vec v = Vec::loadu(z + j, lanes);
          const Vec log_p = log_probability(v, Vec(max), Vec(log_sum));
          const Vec p = log_p.exp();
          Vec grad = prob_gradient(p, at::vec::maximum(log_p, log_zero), vc);
          if (dense != nullptr) grad = grad + target_gradient(Vec::loadu(dense + j, lanes), p, vc);
          if (has_logit_term) {
            grad = grad + (c.logit == T(0) ? vc.constant : logit_gradient(v, vc));
          }
          grad.store(g + j, lanes);
        }
        targets.for_sparse(i, offset + first, n, [&](int64_t column, T mass) {
          const T p = std::exp(log_probability(z[column], max, log_sum));
          g[column] += target_gradient(mass, p, c);
        });
        if (transform.logit_scale != T(1) || transform.softcap != T(0)) {
          for (int64_t j = 0; j < n; j += kLanes) {
            const int64_t lanes = std::min(kLanes, n - j);
            Vec grad = Vec::loadu(g + j, lanes) * scale;
            if (transform.softcap != T(0)) {
              grad = grad * softcap_slope(Vec::loadu(z + j, lanes), Vec(inverse_cap));
            }
            grad.store(g + j, lanes);
          }
        }
        at::vec::convert(g, out + i * out_stride + first, n);
      }
    }
  });
}

}  // namespace CPU_CAPABILITY
}  // namespace tightrope::cpu
