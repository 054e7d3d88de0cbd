// The arithmetic of one vocabulary row: the merge rule of partial statistics and the form of the
// gradient.
//
// Every C++ and CUDA kernel includes this header and none repeats what stands in it. The functions
// are templates over the value type, which is a scalar here and may be a vector register in a CPU
// kernel. The mathematics, with the names used here, is in docs/mathematics.md.
#pragma once

#include <cmath>
#include <limits>

#if defined(__CUDACC__) || defined(__HIPCC__)
#  define TIGHTROPE_HD __host__ __device__ inline
#else
#  define TIGHTROPE_HD inline
#endif

namespace tightrope {

// Statistics of part of a row, all sums relative to `origin(max)`. The order is the layout of the
// `partial` tensors, [kPartialFields, rows].
template <class T>
struct Partial {
  T max = -std::numeric_limits<T>::infinity();
  T sum_exp = 0;         // sum e^d,        d_j = z_j - max
  T sum_exp_shift = 0;   // sum e^d d
  T sum_exp_square = 0;  // sum e^2d
  T target_shift = 0;    // sum b d
  T target_exp = 0;      // sum b e^d
  T target_mass = 0;     // sum b
  T shift_sum = 0;       // sum d
  T square_sum = 0;      // sum z^2
  T count = 0;           // entries seen
  T logit_sum = 0;       // sum z: shift_sum + count * max would cancel
};
constexpr int kPartialFields = 11;

// The seven scalars of a row's gradient; the order is the layout of the `coef` tensors.
template <class V>
struct Coefficients {
  V prob, prob_log_prob, prob_square, target, target_prob, logit, constant;
};
constexpr int kCoefficients = 7;

// e^x is 0 in every supported type long before x reaches this; log-probabilities are clamped to it
// so that an impossible entry contributes 0 * finite = 0 and not 0 * -inf = NaN.
constexpr double kLogZero = -1e4;

// The point that shifted sums refer to: the maximum, or 0 where no entry is possible (all -inf).
template <class T>
TIGHTROPE_HD T origin(T max) {
  return max == -std::numeric_limits<T>::infinity() ? T(0) : max;
}

// Merge the statistics of two disjoint parts of one row. Associative, so a row may be cut anywhere.
template <class T>
TIGHTROPE_HD Partial<T> merge(const Partial<T>& a, const Partial<T>& b) {
  Partial<T> out;
  // A NaN on either side must survive, which std::max does not promise.
  out.max = (a.max > b.max || a.max != a.max) ? a.max : b.max;
  const T shift_a = origin(a.max) - origin(out.max);
  const T shift_b = origin(b.max) - origin(out.max);
  const T scale_a = a.sum_exp == T(0) ? T(0) : std::exp(shift_a);
  const T scale_b = b.sum_exp == T(0) ? T(0) : std::exp(shift_b);
  out.sum_exp = scale_a * a.sum_exp + scale_b * b.sum_exp;
  out.sum_exp_shift = scale_a * (a.sum_exp_shift + shift_a * a.sum_exp) +
                      scale_b * (b.sum_exp_shift + shift_b * b.sum_exp);
  out.sum_exp_square = scale_a * scale_a * a.sum_exp_square + scale_b * scale_b * b.sum_exp_square;
  out.target_shift =
      (a.target_shift + shift_a * a.target_mass) + (b.target_shift + shift_b * b.target_mass);
  out.target_exp = scale_a * a.target_exp + scale_b * b.target_exp;
  out.target_mass = a.target_mass + b.target_mass;
  out.shift_sum = (a.shift_sum + shift_a * a.count) + (b.shift_sum + shift_b * b.count);
  out.square_sum = a.square_sum + b.square_sum;
  out.count = a.count + b.count;
  out.logit_sum = a.logit_sum + b.logit_sum;
  return out;
}

// dloss/dz_j of an entry that carries no target mass, but for `logit` and `constant`.
template <class V>
TIGHTROPE_HD V prob_gradient(const V& p, const V& log_p, const Coefficients<V>& c) {
  return p * (c.prob + c.prob_log_prob * log_p + c.prob_square * p);
}

// What target mass b at an entry of probability p adds.
template <class V>
TIGHTROPE_HD V target_gradient(const V& b, const V& p, const Coefficients<V>& c) {
  return b * (c.target + c.target_prob * p);
}

// What the terms in the logits themselves add.
template <class V>
TIGHTROPE_HD V logit_gradient(const V& z, const Coefficients<V>& c) {
  return c.logit * z + c.constant;
}

// dz/du of the softcap z = cap tanh(u / cap), from z.
template <class V>
TIGHTROPE_HD V softcap_slope(const V& z, const V& inverse_cap) {
  const V t = z * inverse_cap;
  return V(1) - t * t;
}

}  // namespace tightrope
