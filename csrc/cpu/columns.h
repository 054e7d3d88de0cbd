// Row statistics and row gradients of tiles whose columns are contiguous: the lanes of a vector are
// rows.
//
// The GEMM that makes logits runs faster on a CPU when it writes them transposed, entry by entry of
// the vocabulary, and then rows lie across. So each lane carries a row of its own, nothing is
// reduced across lanes, and a group of rows goes down the vocabulary in blocks that fit the
// first-level cache. A row's arithmetic does not depend on the rows beside it.
#pragma once

#include "common.h"

namespace tightrope::cpu {
inline namespace CPU_CAPABILITY {

constexpr int64_t kColumnBlock = 256;

// A group of up to `Vec::size()` rows, `begin` being the first.
template <class T>
struct Group {
  static constexpr int64_t kLanes = Vectorized<T>::size();
  int64_t begin;
  int64_t lanes;

  Group(int64_t index, int64_t rows)
      : begin(index * kLanes), lanes(std::min<int64_t>(kLanes, rows - index * kLanes)) {}

  static int64_t count(int64_t rows) { return (rows + kLanes - 1) / kLanes; }

  Vectorized<T> load(const T* per_row) const {
    return Vectorized<T>::loadu(per_row + begin, lanes);
  }

  // The group's dense target masses at `column`, gathered; lanes without a row get 0.
  Vectorized<T> dense(const Targets<T>& targets, int64_t column) const {
    alignas(64) T b[kLanes] = {};
    for (int64_t l = 0; l < lanes; ++l) b[l] = *targets.dense_from(begin + l, column);
    return Vectorized<T>::loadu(b);
  }
};

// Calls f(group, first, n) for blocks of n entries of the vocabulary from `first` on, of each group
// in order. Groups that share cache lines go down the vocabulary together.
template <class scalar_t, class T, class F>
void for_blocks(int64_t rows, int64_t cols, F f) {
  constexpr int64_t kLine = 64 / sizeof(scalar_t);
  constexpr int64_t kTogether = std::max<int64_t>(1, kLine / Group<T>::kLanes);
  const int64_t groups = Group<T>::count(rows);
  at::parallel_for(
      0, (groups + kTogether - 1) / kTogether, grain_size(cols * Group<T>::kLanes * kTogether),
      [&](int64_t begin, int64_t end) {
        for (int64_t line = begin; line < end; ++line) {
          const int64_t last = std::min(groups, (line + 1) * kTogether);
          for (int64_t first = 0; first < cols; first += kColumnBlock) {
            const int64_t n = std::min(kColumnBlock, cols - first);
            for (int64_t index = line * kTogether; index < last; ++index) {
              f(Group<T>(index, rows), first, n);
            }
          }
        }
      });
}

// Converts n entries of a group to logits z [n, kLanes] and returns each lane's maximum.
template <class scalar_t, class T>
Vectorized<T> load_column_block(
    const scalar_t* raw, int64_t stride, const Group<T>& group, int64_t first, int64_t n,
    const Transform<T>& transform, T* z) {
  using Vec = Vectorized<T>;
  constexpr int64_t kLanes = Vec::size();
  const bool identity = transform.is_identity();
  Vec maximum(-std::numeric_limits<T>::infinity());
  for (int64_t j = 0; j < n; ++j) {
    T* const lane = z + j * kLanes;
    at::vec::convert(raw + (first + j) * stride + group.begin, lane, group.lanes);
    Vec v = Vec::loadu(lane, group.lanes);
    if (!identity) {
      v = transform.apply(v, Vec(transform.bias == nullptr ? T(0) : transform.bias[first + j]));
    }
    v.store(lane);
    maximum = at::vec::maximum(maximum, v);
  }
  return maximum;
}

// As row_stats of rows.h, for logits whose entries of the vocabulary are `stride` apart and whose
// rows are adjacent.
template <class scalar_t, class T>
void column_stats(
    const scalar_t* logits, int64_t stride, int64_t rows, int64_t cols, int64_t offset,
    const Transform<T>& transform, const Targets<T>& targets, const bool* active, T* partial,
    int64_t* argmax) {
  using Vec = Vectorized<T>;
  constexpr int64_t kLanes = Vec::size();
  for_blocks<scalar_t, T>(rows, cols, [&](const Group<T>& group, int64_t first, int64_t n) {
    alignas(64) T z[kColumnBlock * kLanes];
    alignas(64) T max[kLanes], origins[kLanes];
    load_column_block(logits, stride, group, first, n, transform, z).store(max);
    for (int64_t l = 0; l < kLanes; ++l) origins[l] = origin(max[l]);
    const Vec shift = Vec::loadu(origins);
    Sums<T> sums;
    for (int64_t j = 0; j < n; ++j) {
      const Vec v = Vec::loadu(z + j * kLanes);
      const Vec d = v - shift;
      const Vec e = sums.add(v, d, d);
      if (targets.dense != nullptr) sums.add_target(group.dense(targets, first + j), v, shift, e);
    }
    alignas(64) T field[9][kLanes];
    const Vec all[9] = {sums.sum_exp,      sums.sum_exp_shift, sums.sum_exp_square,
                        sums.target_shift, sums.target_exp,    sums.target_mass,
                        sums.shift_sum,    sums.square_sum,    sums.logit_sum};
    for (int f = 0; f < 9; ++f) all[f].store(field[f]);
    for (int64_t l = 0; l < group.lanes; ++l) {
      const int64_t i = group.begin + l;
      if (active != nullptr && !active[i]) continue;
      Partial<T> block{max[l],      field[0][l],       field[1][l], field[2][l],
                       field[3][l], field[4][l],       field[5][l], field[6][l],
                       field[7][l], static_cast<T>(n), field[8][l]};
      recount_far_shifts(block, z + l, n, kLanes);
      targets.for_sparse(i, offset + first, n, [&](int64_t column, T mass) {
        Sums<T>::add_sparse(block, mass, z[column * kLanes + l]);
      });
      const Partial<T> row = load_partial(partial, rows, i);
      if (is_new_maximum(argmax[i], max[l], row.max)) {
        argmax[i] = offset + first + first_maximum(z + l, n, kLanes, max[l]);
      }
      store_partial(merge(row, block), partial, rows, i);
    }
  });
}

// As row_sides of rows.h, for logits whose rows are adjacent.
template <class scalar_t, class T>
void column_sides(
    const scalar_t* logits, int64_t stride, int64_t rows, int64_t cols, int64_t offset,
    const Transform<T>& transform, const Sets<T>& sets, const bool* active, T* sides) {
  using Vec = Vectorized<T>;
  constexpr int64_t kLanes = Vec::size();
  constexpr T kLowest = -std::numeric_limits<T>::infinity();
  for_blocks<scalar_t, T>(rows, cols, [&](const Group<T>& group, int64_t first, int64_t n) {
    alignas(64) T z[kColumnBlock * kLanes];
    alignas(64) T least_of[kLanes] = {};
    load_column_block(logits, stride, group, first, n, transform, z);
    for (int64_t l = 0; l < group.lanes; ++l) {
      const int64_t i = group.begin + l;
      least_of[l] = sets.least(i);
      if (active != nullptr && !active[i]) continue;
      sets.for_listed(i, offset + first, n, [&](int64_t column) {
        T& entry = z[column * kLanes + l];
        store_side(merge(load_side(sides, 0, rows, i), side_of(entry)), sides, 0, rows, i);
        entry = kLowest;
      });
    }
    const Vec least = Vec::loadu(least_of);
    SidesSums<T> sums;
    for (int64_t j = 0; j < n; ++j) sums.see(Vec::loadu(z + j * kLanes), least);
    const Vec zero(T(0)), lowest(kLowest);
    const auto origins = [&](const Vec& max) { return Vec::blendv(max, zero, max == lowest); };
    sums.set_origin = origins(sums.set.max), sums.rest_origin = origins(sums.rest.max);
    for (int64_t j = 0; j < n; ++j) sums.add(Vec::loadu(z + j * kLanes), least);
    const SideSums<T>* const both[2] = {&sums.set, &sums.rest};
    for (int side = 0; side < 2; ++side) {
      alignas(64) T field[kSideFields / 2][kLanes];
      both[side]->max.store(field[0]);
      both[side]->sum_exp.store(field[1]);
      both[side]->sum_exp_shift.store(field[2]);
      for (int64_t l = 0; l < group.lanes; ++l) {
        const int64_t i = group.begin + l;
        if (active != nullptr && !active[i]) continue;
        const Side<T> block{field[0][l], field[1][l], field[2][l]};
        store_side(merge(load_side(sides, side, rows, i), block), sides, side, rows, i);
      }
    }
  });
}

// As row_grad of rows.h, for logits and out whose rows are adjacent.
template <bool kThreshold, class scalar_t, class T>
void column_grad(
    const scalar_t* logits, int64_t stride, scalar_t* out, int64_t out_stride, int64_t rows,
    int64_t cols, int64_t offset, const Transform<T>& transform, const Targets<T>& targets,
    const Sets<T>& sets, const bool* active, const T* norm, const T* coef) {
  using Vec = Vectorized<T>;
  constexpr int64_t kLanes = Vec::size();
  const Vec zero(T(0)), log_zero(static_cast<T>(kLogZero));
  for_blocks<scalar_t, T>(rows, cols, [&](const Group<T>& group, int64_t first, int64_t n) {
    alignas(64) T z[kColumnBlock * kLanes];
    alignas(64) T g[kColumnBlock * kLanes];
    const auto lanes = [&](const T* from, int k) { return group.load(from + k * rows); };
    const auto whole = Form<Vec>::load(norm, coef, 0, lanes);
    const auto set = kThreshold ? Form<Vec>::load(norm, coef, 1, lanes) : whole;
    const Vec least = kThreshold ? group.load(sets.threshold) : zero;
    // z is left out where it is not asked for, not multiplied by zero: a masked entry has -inf.
    const Vec no_logit_term = whole.c.logit == zero;
    const T* const logit_terms = coef + 5 * rows + group.begin;
    const bool any_logit_term =
        std::any_of(logit_terms, logit_terms + group.lanes, [](T rho) { return rho != T(0); });
    alignas(64) T switched_off[kLanes] = {};
    for (int64_t l = 0; l < group.lanes; ++l) {
      switched_off[l] = active != nullptr && !active[group.begin + l] ? T(1) : T(0);
    }
    const Vec inactive = Vec::loadu(switched_off) != zero;
    load_column_block(logits, stride, group, first, n, transform, z);
    for (int64_t j = 0; j < n; ++j) {
      const Vec v = Vec::loadu(z + j * kLanes);
      Form<Vec> mixed;
      const auto& form = kThreshold ? select(whole, set, v >= least, mixed) : whole;
      const Coefficients<Vec>& c = form.c;
      const Vec log_p = log_probability(v, form.max, form.log_sum);
      const Vec p = exponential(log_p);
      Vec grad = prob_gradient(p, at::vec::maximum(log_p, log_zero), c);
      if (targets.dense != nullptr) {
        grad = grad + target_gradient(group.dense(targets, first + j), p, c);
      }
      grad = grad + (any_logit_term ? Vec::blendv(logit_gradient(v, c), c.constant, no_logit_term)
                                    : c.constant);
      grad.store(g + j * kLanes);
    }
    for (int64_t l = 0; l < group.lanes; ++l) {
      const int64_t i = group.begin + l;
      const auto value = [&](const T* from, int k) { return from[k * rows + i]; };
      sets.for_listed(i, offset + first, n, [&](int64_t column) {
        const auto own = Form<T>::load(norm, coef, 1, value);
        const T* const mass = targets.dense_from(i, first + column);
        g[column * kLanes + l] = entry_gradient(z[column * kLanes + l], own, mass);
      });
      targets.for_sparse(i, offset + first, n, [&](int64_t column, T mass) {
        const T logit = z[column * kLanes + l];
        const bool inside = sets.contains(i, offset + first + column, logit);
        const auto own = Form<T>::load(norm, coef, inside, value);
        const T p = std::exp(log_probability(logit, own.max, own.log_sum));
        g[column * kLanes + l] += target_gradient(mass, p, own.c);
      });
    }
    for (int64_t j = 0; j < n; ++j) {
      T* const lane = g + j * kLanes;
      const Vec grad = transform.pull_back(Vec::loadu(lane), Vec::loadu(z + j * kLanes));
      Vec::blendv(grad, zero, inactive).store(lane);
      at::vec::convert(lane, out + (first + j) * out_stride + group.begin, group.lanes);
    }
  });
}

// As sum_of_rows of rows.h, for gradients whose rows are adjacent: a column goes through registers
// once for each row vector, and is in the first-level cache from the second on.
template <class T>
void sum_of_columns(
    const T* grad, int64_t stride, int64_t rows, int64_t cols, const T* along, int64_t ranks,
    T scale, T* sums, int64_t sums_stride) {
  using Vec = Vectorized<T>;
  constexpr int64_t kLanes = Vec::size();
  const int64_t whole = rows / kLanes * kLanes;
  const Vec factor(scale);
  at::parallel_for(0, cols, grain_size(rows), [&](int64_t begin, int64_t end) {
    for (int64_t j = begin; j < end; ++j) {
      const T* const column = grad + j * stride;
      // The sum of column times by(i, lanes), which is of the same kind.
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
        sums[k * sums_stride + j] = product(
            [&](const Vec&, int64_t i, int64_t lanes) { return Vec::loadu(vector + i, lanes); });
      }
      sums[ranks * sums_stride + j] = product([](const Vec& g, int64_t, int64_t) { return g; });
    }
  });
}

}  // namespace CPU_CAPABILITY
}  // namespace tightrope::cpu
