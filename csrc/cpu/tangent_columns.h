// Second order of tiles whose columns are contiguous: columns.h along a direction.
#pragma once

#include "columns.h"
#include "tangent.h"

namespace tightrope::cpu {
inline namespace CPU_CAPABILITY {

// Half of a block of one tile, as there are two here and their results beside them.
constexpr int64_t kMovingBlock = kColumnBlock / 2;

// Converts n entries of a group to logits z [n, kLanes], and their direction to that of the logits.
template <class scalar_t, class T>
void load_moving_columns(
    const scalar_t* raw, int64_t stride, const scalar_t* tangent, int64_t tangent_stride,
    const Group<T>& group, int64_t first, int64_t n, const Transform<T>& transform, T* z,
    T* moved) {
  using Vec = Vectorized<T>;
  constexpr int64_t kLanes = Vec::size();
  load_column_block(raw, stride, group, first, n, transform, z);
  for (int64_t j = 0; j < n; ++j) {
    T* const lane = moved + j * kLanes;
    at::vec::convert(tangent + (first + j) * tangent_stride + group.begin, lane, group.lanes);
    transform.push_forward(Vec::loadu(lane, group.lanes), Vec::loadu(z + j * kLanes)).store(lane);
  }
}

// As row_tangent of tangent_rows.h, for logits and tangent whose rows are adjacent.
template <class scalar_t, class T>
void column_tangent(
    const scalar_t* logits, int64_t stride, const scalar_t* tangent, int64_t tangent_stride,
    int64_t rows, int64_t cols, int64_t offset, const Transform<T>& transform,
    const Targets<T>& targets, const Sets<T>& sets, const bool* active, const T* norm, T* sums) {
  using Vec = Vectorized<T>;
  constexpr int64_t kLanes = Vec::size();
  const Vec never(std::numeric_limits<T>::infinity());
  for_blocks<scalar_t, T>(rows, cols, [&](const Group<T>& group, int64_t first, int64_t n) {
    alignas(64) T z[kColumnBlock * kLanes];
    alignas(64) T moved[kColumnBlock * kLanes];
    T* const side[2] = {sums, sums + kTangentSums * rows};
    const auto lanes = [&](const T* from, int k) { return group.load(from + k * rows); };
    const auto rest = Norm<Vec>::load(norm, 0, lanes);
    const auto set = sets.any() ? Norm<Vec>::load(norm, 1, lanes) : rest;
    const Vec least = sets.threshold == nullptr ? never : group.load(sets.threshold);
    load_moving_columns(
        logits, stride, tangent, tangent_stride, group, first, n, transform, z, moved);
    for (int64_t l = 0; l < group.lanes; ++l) {
      const int64_t i = group.begin + l;
      if (active != nullptr && !active[i]) continue;
      const auto value = [&](const T* from, int k) { return from[k * rows + i]; };
      targets.for_sparse(i, offset + first, n, [&](int64_t column, T mass) {
        const int64_t at = column * kLanes + l;
        const bool inside = sets.contains(i, offset + first + column, z[at]);
        const auto own = Norm<T>::load(norm, inside, value);
        add_entry_sums(side[inside], rows, i, z[at], moved[at], own, &mass, false);
      });
      sets.for_listed(i, offset + first, n, [&](int64_t column) {
        const int64_t at = column * kLanes + l;
        const auto own = Norm<T>::load(norm, 1, value);
        const T* const mass = targets.dense_from(i, first + column);
        add_entry_sums(side[1], rows, i, z[at], moved[at], own, mass, true);
        moved[at] = T(0);
      });
    }
    SidesLaneSums<T> block;
    for (int64_t j = 0; j < n; ++j) {
      Vec b;
      if (targets.dense != nullptr) b = group.dense(targets, first + j);
      block.add(
          Vec::loadu(z + j * kLanes), Vec::loadu(moved + j * kLanes), rest, set, least,
          targets.dense == nullptr ? nullptr : &b, kLanes);
    }
    const LaneSums<T>* const both[2] = {&block.rest, &block.set};
    for (int s = 0; s < (sets.threshold == nullptr ? 1 : 2); ++s) {
      const auto fields = fields_of(*both[s]);
      for (int f = 0; f < kTangentSums; ++f) {
        alignas(64) T field[kLanes];
        fields[f].store(field);
        for (int64_t l = 0; l < group.lanes; ++l) {
          const int64_t i = group.begin + l;
          if (active == nullptr || active[i]) side[s][f * rows + i] += field[l];
        }
      }
    }
  });
}

// As row_grad_tangent of tangent_rows.h, for tiles whose rows are adjacent.
template <bool kThreshold, class scalar_t, class T>
void column_grad_tangent(
    const scalar_t* logits, int64_t stride, const scalar_t* tangent, int64_t tangent_stride,
    scalar_t* out, int64_t out_stride, scalar_t* out_tangent, int64_t out_tangent_stride,
    int64_t rows, int64_t cols, int64_t offset, const Transform<T>& transform,
    const Targets<T>& targets, const Sets<T>& sets, const bool* active, const T* norm,
    const T* norm_tangent, const T* coef, const T* coef_tangent) {
  using Vec = Vectorized<T>;
  constexpr int64_t kLanes = Vec::size();
  const Vec zero(T(0)), log_zero(static_cast<T>(kLogZero));
  for_blocks<scalar_t, T>(rows, cols, [&](const Group<T>& group, int64_t begin, int64_t size) {
    alignas(64) T z[kMovingBlock * kLanes];
    alignas(64) T moved[kMovingBlock * kLanes];
    alignas(64) T g[kMovingBlock * kLanes];
    alignas(64) T gt[kMovingBlock * kLanes];
    const auto load = [&](auto like, int side, auto value) {
      return MovingForm<decltype(like)>::load(norm, norm_tangent, coef, coef_tangent, side, value);
    };
    const auto lanes = [&](const T* from, int k) { return group.load(from + k * rows); };
    const auto whole = load(Vec(), 0, lanes);
    const auto set = kThreshold ? load(Vec(), 1, lanes) : whole;
    const Vec least = kThreshold ? group.load(sets.threshold) : zero;
    const Vec no_logit = whole.form.c.logit == zero, no_logit_tangent = whole.c.logit == zero;
    const auto pick = [](const Vec& a, const Vec& b, const Vec& no) {
      return Vec::blendv(a, b, no);
    };
    alignas(64) T switched_off[kLanes] = {};
    for (int64_t l = 0; l < group.lanes; ++l) {
      switched_off[l] = active != nullptr && !active[group.begin + l] ? T(1) : T(0);
    }
    const Vec inactive = Vec::loadu(switched_off) != zero;
    for (int64_t first = begin; first < begin + size; first += kMovingBlock) {
      const int64_t n = std::min(kMovingBlock, begin + size - first);
      load_moving_columns(
          logits, stride, tangent, tangent_stride, group, first, n, transform, z, moved);
      for (int64_t j = 0; j < n; ++j) {
        const Vec v = Vec::loadu(z + j * kLanes), m = Vec::loadu(moved + j * kLanes);
        MovingForm<Vec> mixed;
        const auto& f = kThreshold ? select(whole, set, v >= least, mixed) : whole;
        const Vec log_p = log_probability(v, f.form.max, f.form.log_sum);
        const Vec p = exponential(log_p);
        Moved<Vec> grad = moved_gradient<Vec>(
            v, m, p, at::vec::maximum(log_p, log_zero), f, no_logit, no_logit_tangent, pick);
        if (targets.dense != nullptr) {
          add_target_gradient<Vec>(grad, group.dense(targets, first + j), m, p, f);
        }
        grad.grad.store(g + j * kLanes);
        grad.tangent.store(gt + j * kLanes);
      }
      for (int64_t l = 0; l < group.lanes; ++l) {
        const int64_t i = group.begin + l;
        const auto value = [&](const T* from, int k) { return from[k * rows + i]; };
        sets.for_listed(i, offset + first, n, [&](int64_t column) {
          const int64_t at = column * kLanes + l;
          const T* const mass = targets.dense_from(i, first + column);
          const Moved<T> grad = entry_moved(z[at], moved[at], load(T(), 1, value), mass);
          g[at] = grad.grad, gt[at] = grad.tangent;
        });
        targets.for_sparse(i, offset + first, n, [&](int64_t column, T mass) {
          const int64_t at = column * kLanes + l;
          const bool inside = sets.contains(i, offset + first + column, z[at]);
          const auto f = load(T(), inside, value);
          const T p = std::exp(log_probability(z[at], f.form.max, f.form.log_sum));
          Moved<T> grad{g[at], gt[at]};
          add_target_gradient<T>(grad, mass, moved[at], p, f);
          g[at] = grad.grad, gt[at] = grad.tangent;
        });
      }
      for (int64_t j = 0; j < n; ++j) {
        T *const lane = g + j * kLanes, *const tangent_lane = gt + j * kLanes;
        const Vec v = Vec::loadu(z + j * kLanes), grad = Vec::loadu(lane);
        const Vec m = Vec::loadu(moved + j * kLanes);
        const Vec changed = transform.pull_back_tangent(grad, Vec::loadu(tangent_lane), v, m);
        Vec::blendv(changed, zero, inactive).store(tangent_lane);
        at::vec::convert(
            tangent_lane, out_tangent + (first + j) * out_tangent_stride + group.begin,
            group.lanes);
        if (out == nullptr) continue;
        Vec::blendv(transform.pull_back(grad, v), zero, inactive).store(lane);
        at::vec::convert(lane, out + (first + j) * out_stride + group.begin, group.lanes);
      }
    }
  });
}

}  // namespace CPU_CAPABILITY
}  // namespace tightrope::cpu
