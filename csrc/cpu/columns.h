// Row statistics and row gradients of tiles whose columns are contiguous: the lanes of a vector are
// rows.
//
// The GEMM that makes logits runs faster on a CPU when it writes them transposed, entry by entry of
// the vocabulary, and then rows lie across. So each lane carries a row of its own and nothing of a
// row is reduced across lanes. For statistics a group of rows goes down the vocabulary in blocks
// that fit the first-level cache; gradients have no sums of rows, and go by column after column. A
// row's arithmetic does not depend on the rows beside it.
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
    Vec v = load_lanes<T>(raw + (first + j) * stride + group.begin, group.lanes);
    if (!identity) {
      v = transform.apply(v, Vec(transform.bias == nullptr ? T(0) : transform.bias[first + j]));
    }
    v.store(z + j * kLanes);
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

// The entries of a tile of a kind that few are, by column: listed classes and sparse targets.
template <class T>
class Singles {
 public:
  struct Entry {
    int64_t row;
    bool listed;  // else a target
    T mass;
  };

  Singles(
      int64_t rows, int64_t cols, int64_t offset, const Targets<T>& targets, const Sets<T>& sets)
      : begin_(cols + 2) {
    // f(column, entry), row after row, and of a row the listed ones first.
    const auto for_each = [&](auto f) {
      for (int64_t i = 0; i < rows; ++i) {
        sets.for_listed(i, offset, cols, [&](int64_t j) { f(j, Entry{i, true, T(0)}); });
        targets.for_sparse(i, offset, cols, [&](int64_t j, T b) { f(j, Entry{i, false, b}); });
      }
    };
    for_each([&](int64_t column, const Entry&) { ++begin_[column + 2]; });
    for (int64_t j = 2; j < cols + 2; ++j) begin_[j] += begin_[j - 1];
    entries_.resize(begin_[cols + 1]);
    for_each([&](int64_t column, Entry entry) { entries_[begin_[column + 1]++] = entry; });
  }

  template <class F>
  void for_column(int64_t column, F f) const {
    for (int64_t k = begin_[column]; k < begin_[column + 1]; ++k) f(entries_[k]);
  }

 private:
  std::vector<int64_t> begin_;  // where the entries of a column begin
  std::vector<Entry> entries_;
};

// As row_grad of rows.h, for logits and out whose rows are adjacent: entry after entry of the
// vocabulary, so memory is met in order, and what is wanted of a column is summed while it is in
// the first-level cache.
template <bool kThreshold, class scalar_t, class T>
void column_grad(
    const scalar_t* logits, int64_t stride, scalar_t* out, int64_t out_stride, int64_t rows,
    int64_t cols, int64_t offset, const Transform<T>& transform, const Targets<T>& targets,
    const Sets<T>& sets, const bool* active, const T* norm, const T* coef,
    const ColumnSums<T>& wanted) {
  using Vec = Vectorized<T>;
  constexpr int64_t kLanes = Vec::size();
  const int64_t groups = Group<T>::count(rows);
  const Singles<T> singles(rows, cols, offset, targets, sets);
  const bool identity = transform.is_identity();
  const T* const logit_terms = coef + 5 * rows;
  const bool any_logit_term =
      std::any_of(logit_terms, logit_terms + rows, [](T rho) { return rho != T(0); });
  const Vec zero(T(0));
  // What a group of rows has in every column.
  struct Rows {
    Form<Vec> whole, set;
    Vec least, inactive, no_logit_term;
  };
  at::parallel_for(0, cols, grain_size(rows), [&](int64_t begin, int64_t end) {
    std::vector<Rows> of_group(groups);
    for (int64_t i = 0; i < groups; ++i) {
      const Group<T> group(i, rows);
      const auto lanes = [&](const T* from, int k) { return group.load(from + k * rows); };
      Rows& of = of_group[i];
      of.whole = Form<Vec>::load(norm, coef, 0, lanes);
      if (kThreshold) of.set = Form<Vec>::load(norm, coef, 1, lanes);
      if (kThreshold) of.least = group.load(sets.threshold);
      // z is left out where it is not asked for, not multiplied by zero: a masked entry has -inf.
      of.no_logit_term = of.whole.c.logit == zero;
      alignas(64) T switched_off[kLanes] = {};
      for (int64_t l = 0; l < group.lanes; ++l) {
        switched_off[l] = active != nullptr && !active[group.begin + l] ? T(1) : T(0);
      }
      of.inactive = Vec::loadu(switched_off) != zero;
    }
    std::vector<T> buffer(2 * groups * kLanes);
    T *const z = buffer.data(), *const g = z + groups * kLanes;
    for (int64_t j = begin; j < end; ++j) {
      const Vec bias(transform.bias == nullptr ? T(0) : transform.bias[j]);
      for (int64_t i = 0; i < groups; ++i) {
        const Group<T> group(i, rows);
        const Rows& of = of_group[i];
        Vec v = load_lanes<T>(logits + j * stride + group.begin, group.lanes);
        if (!identity) v = transform.apply(v, bias);
        v.store(z + group.begin);
        Form<Vec> mixed;
        const auto& form = kThreshold ? select(of.whole, of.set, v >= of.least, mixed) : of.whole;
        const Coefficients<Vec>& c = form.c;
        const Vec log_p = log_probability(v, form.max, form.log_sum);
        const Vec p = exponential(log_p);
        Vec grad = prob_gradient(p, at_least(log_p, static_cast<T>(kLogZero)), c);
        if (targets.dense != nullptr) {
          grad = grad + target_gradient(group.dense(targets, j), p, c);
        }
        grad =
            grad + (any_logit_term ? Vec::blendv(logit_gradient(v, c), c.constant, of.no_logit_term)
                                   : c.constant);
        grad.store(g + group.begin);
      }
      singles.for_column(j, [&](const typename Singles<T>::Entry& entry) {
        const int64_t i = entry.row;
        const auto value = [&](const T* from, int k) { return from[k * rows + i]; };
        const bool inside = entry.listed || sets.contains(i, offset + j, z[i]);
        const auto own = Form<T>::load(norm, coef, inside, value);
        if (entry.listed) {
          g[i] = entry_gradient(z[i], own, targets.dense_from(i, j));
        } else {
          const T p = std::exp(log_probability(z[i], own.max, own.log_sum));
          g[i] += target_gradient(entry.mass, p, own.c);
        }
      });
      for (int64_t i = 0; i < groups; ++i) {
        const Group<T> group(i, rows);
        Vec grad = Vec::loadu(g + group.begin);
        if (!identity) grad = transform.pull_back(grad, Vec::loadu(z + group.begin));
        if (active != nullptr) grad = Vec::blendv(grad, zero, of_group[i].inactive);
        if (wanted.sums != nullptr) grad.store(g + group.begin);
        store_lanes(grad, out + j * out_stride + group.begin, group.lanes);
      }
      if (wanted.sums != nullptr) wanted.of_column(j, g, rows);
    }
  });
}

// As sum_of_rows of rows.h, for gradients whose rows are adjacent.
template <class T>
void sum_of_columns(
    const T* grad, int64_t stride, int64_t rows, int64_t cols, const ColumnSums<T>& wanted) {
  at::parallel_for(0, cols, grain_size(rows), [&](int64_t begin, int64_t end) {
    for (int64_t j = begin; j < end; ++j) wanted.of_column(j, grad + j * stride, rows);
  });
}

}  // namespace CPU_CAPABILITY
}  // namespace tightrope::cpu
