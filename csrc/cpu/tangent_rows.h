// Second order of tiles whose rows are contiguous: rows.h along a direction.
#pragma once

#include "rows.h"
#include "tangent.h"

namespace tightrope::cpu {
inline namespace CPU_CAPABILITY {

// Converts n raw values to logits in `z`, and their direction to that of the logits in `moved`.
template <class scalar_t, class T>
void load_moving_block(
    const scalar_t* raw, const scalar_t* tangent, int64_t first, int64_t n,
    const Transform<T>& transform, T* z, T* moved) {
  using Vec = Vectorized<T>;
  constexpr int64_t kLanes = Vec::size();
  load_row_block(raw, first, n, transform, z);
  at::vec::convert(tangent + first, moved, n);
  for (int64_t j = 0; j < n; j += kLanes) {
    const int64_t lanes = std::min(kLanes, n - j);
    transform.push_forward(Vec::loadu(moved + j, lanes), Vec::loadu(z + j, lanes))
        .store(moved + j, lanes);
  }
}

// Adds what logits [rows, cols] that move by tangent [rows, cols] contribute to sums [kTangentSums,
// rows], or with sets twice that: of the rest, then of the set. norm as for row_grad. Rows with
// active[i] false keep what they have.
template <class scalar_t, class T>
void row_tangent(
    const scalar_t* logits, int64_t stride, const scalar_t* tangent, int64_t tangent_stride,
    int64_t rows, int64_t cols, int64_t offset, const Transform<T>& transform,
    const Targets<T>& targets, const Sets<T>& sets, const bool* active, const T* norm, T* sums) {
  using Vec = Vectorized<T>;
  constexpr int64_t kLanes = Vec::size();
  at::parallel_for(0, rows, grain_size(cols), [&](int64_t begin, int64_t end) {
    alignas(64) T z[kRowBlock];
    alignas(64) T moved[kRowBlock];
    for (int64_t i = begin; i < end; ++i) {
      if (active != nullptr && !active[i]) continue;
      T* const side[2] = {sums, sums + kTangentSums * rows};
      const auto value = [&](const T* from, int k) { return from[k * rows + i]; };
      const auto lanes = [&](const T* from, int k) { return Vec(from[k * rows + i]); };
      const auto rest = Norm<T>::load(norm, 0, value);
      const auto set = sets.any() ? Norm<T>::load(norm, 1, value) : rest;
      const auto rest_lanes = Norm<Vec>::load(norm, 0, lanes);
      const auto set_lanes = sets.any() ? Norm<Vec>::load(norm, 1, lanes) : rest_lanes;
      const Vec least(sets.least(i));
      for (int64_t first = 0; first < cols; first += kRowBlock) {
        const int64_t n = std::min(kRowBlock, cols - first);
        load_moving_block(
            logits + i * stride, tangent + i * tangent_stride, first, n, transform, z, moved);
        const T* dense = targets.dense_from(i, first);
        targets.for_sparse(i, offset + first, n, [&](int64_t column, T mass) {
          const bool inside = sets.contains(i, offset + first + column, z[column]);
          const Norm<T>& own = inside ? set : rest;
          add_entry_sums(side[inside], rows, i, z[column], moved[column], own, &mass, false);
        });
        sets.for_listed(i, offset + first, n, [&](int64_t column) {
          const T* const mass = dense == nullptr ? nullptr : dense + column;
          add_entry_sums(side[1], rows, i, z[column], moved[column], set, mass, true);
          moved[column] = T(0);
        });
        SidesLaneSums<T> block;
        for (int64_t j = 0; j < n; j += kLanes) {
          const int64_t count = std::min(kLanes, n - j);
          Vec b;
          if (dense != nullptr) b = Vec::loadu(dense + j, count);
          block.add(
              Vec::loadu(z + j, count), Vec::loadu(moved + j, count), rest_lanes, set_lanes, least,
              dense == nullptr ? nullptr : &b, count);
        }
        const LaneSums<T>* const both[2] = {&block.rest, &block.set};
        for (int s = 0; s < (sets.threshold == nullptr ? 1 : 2); ++s) {
          const auto fields = fields_of(*both[s]);
          for (int f = 0; f < kTangentSums; ++f) side[s][f * rows + i] += horizontal_sum(fields[f]);
        }
      }
    }
  });
}

// Writes dloss/draw of logits [rows, cols] that move by tangent to out, or nowhere where that is
// null, and its derivative to out_tangent; they may be the logits and the tangent. Both pairs have
// their strides in common. norm_tangent [1, rows], coef_tangent [kCoefficients, rows], or with sets
// the rest's, then the set's; all else as for row_grad.
template <bool kThreshold, class scalar_t, class T>
void row_grad_tangent(
    const scalar_t* logits, int64_t stride, const scalar_t* tangent, int64_t tangent_stride,
    scalar_t* out, int64_t out_stride, scalar_t* out_tangent, int64_t out_tangent_stride,
    int64_t rows, int64_t cols, int64_t offset, const Transform<T>& transform,
    const Targets<T>& targets, const Sets<T>& sets, const bool* active, const T* norm,
    const T* norm_tangent, const T* coef, const T* coef_tangent) {
  using Vec = Vectorized<T>;
  constexpr int64_t kLanes = Vec::size();
  at::parallel_for(0, rows, grain_size(cols), [&](int64_t begin, int64_t end) {
    alignas(64) T z[kRowBlock];
    alignas(64) T moved[kRowBlock];
    alignas(64) T g[kRowBlock];
    alignas(64) T gt[kRowBlock];
    const Vec log_zero(static_cast<T>(kLogZero));
    for (int64_t i = begin; i < end; ++i) {
      if (active != nullptr && !active[i]) {
        if (out != nullptr) std::fill_n(out + i * out_stride, cols, scalar_t(0));
        std::fill_n(out_tangent + i * out_tangent_stride, cols, scalar_t(0));
        continue;
      }
      const auto load = [&](auto like, int side, auto value) {
        return MovingForm<decltype(like)>::load(
            norm, norm_tangent, coef, coef_tangent, side, value);
      };
      const auto value = [&](const T* from, int k) { return from[k * rows + i]; };
      const auto lanes = [&](const T* from, int k) { return Vec(from[k * rows + i]); };
      const auto whole = load(T(), 0, value);
      const auto set = sets.any() ? load(T(), 1, value) : whole;
      const auto whole_lanes = load(Vec(), 0, lanes);
      const auto set_lanes = kThreshold ? load(Vec(), 1, lanes) : whole_lanes;
      const Vec least(sets.least(i));
      const bool no_logit = whole.form.c.logit == T(0), no_logit_tangent = whole.c.logit == T(0);
      const auto pick = [](const Vec& a, const Vec& b, bool no) { return no ? b : a; };
      for (int64_t first = 0; first < cols; first += kRowBlock) {
        const int64_t n = std::min(kRowBlock, cols - first);
        load_moving_block(
            logits + i * stride, tangent + i * tangent_stride, first, n, transform, z, moved);
        const T* dense = targets.dense_from(i, first);
        for (int64_t j = 0; j < n; j += kLanes) {
          const int64_t count = std::min(kLanes, n - j);
          const Vec v = Vec::loadu(z + j, count), m = Vec::loadu(moved + j, count);
          MovingForm<Vec> mixed;
          const auto& f =
              kThreshold ? select(whole_lanes, set_lanes, v >= least, mixed) : whole_lanes;
          const Vec log_p = log_probability(v, f.form.max, f.form.log_sum);
          const Vec p = exponential(log_p);
          Moved<Vec> grad = moved_gradient<Vec>(
              v, m, p, at::vec::maximum(log_p, log_zero), f, no_logit, no_logit_tangent, pick);
          if (dense != nullptr) {
            add_target_gradient<Vec>(grad, Vec::loadu(dense + j, count), m, p, f);
          }
          grad.grad.store(g + j, count);
          grad.tangent.store(gt + j, count);
        }
        sets.for_listed(i, offset + first, n, [&](int64_t column) {
          const T* const mass = dense == nullptr ? nullptr : dense + column;
          const Moved<T> grad = entry_moved(z[column], moved[column], set, mass);
          g[column] = grad.grad, gt[column] = grad.tangent;
        });
        targets.for_sparse(i, offset + first, n, [&](int64_t column, T mass) {
          const bool inside = sets.contains(i, offset + first + column, z[column]);
          const MovingForm<T>& f = inside ? set : whole;
          const T p = std::exp(log_probability(z[column], f.form.max, f.form.log_sum));
          Moved<T> grad{g[column], gt[column]};
          add_target_gradient<T>(grad, mass, moved[column], p, f);
          g[column] = grad.grad, gt[column] = grad.tangent;
        });
        if (!transform.is_identity()) {
          for (int64_t j = 0; j < n; j += kLanes) {
            const int64_t count = std::min(kLanes, n - j);
            const Vec v = Vec::loadu(z + j, count), grad = Vec::loadu(g + j, count);
            transform
                .pull_back_tangent(grad, Vec::loadu(gt + j, count), v, Vec::loadu(moved + j, count))
                .store(gt + j, count);
            transform.pull_back(grad, v).store(g + j, count);
          }
        }
        if (out != nullptr) at::vec::convert(g, out + i * out_stride + first, n);
        at::vec::convert(gt, out_tangent + i * out_tangent_stride + first, n);
      }
    }
  });
}

}  // namespace CPU_CAPABILITY
}  // namespace tightrope::cpu
