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

// Statistics of part of a row, sums of exponentials and shifts relative to `origin(max)`. The order
// is the layout of the `partial` tensors, [kPartialFields, rows]. Those marked * are kept times
// kSumScale.
template <class T>
struct Partial {
  T max = -std::numeric_limits<T>::infinity();
  T sum_exp = 0;         // sum e^d,        d_j = z_j - max
  T sum_exp_shift = 0;   // sum e^d d
  T sum_exp_square = 0;  // sum e^2d
  T target_shift = 0;    // sum b d *
  T target_exp = 0;      // sum b e^d
  T target_mass = 0;     // sum b
  T shift_sum = 0;       // sum d *
  T square_sum = 0;      // sum z^2
  T count = 0;           // entries seen
  T logit_sum = 0;       // sum z *: shift_sum + count * max would cancel
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

// Logits may be as large as their type allows (a mask of its lowest number, say). A difference of
// two, or a sum over the vocabulary, then overflows where the mean, which is what is wanted of it,
// does not. A power of two, so it changes no bit of sums that are far from that.
constexpr double kSumScale = 1.0 / 4294967296.0;

// The point that shifted sums refer to: the maximum, or 0 where no entry is possible (all -inf).
template <class T>
TIGHTROPE_HD T origin(T max) {
  return max == -std::numeric_limits<T>::infinity() ? T(0) : max;
}

// z - origin times kSumScale, which is sum_scale: finite for any two finite numbers.
template <class V>
TIGHTROPE_HD V scaled_shift(const V& z, const V& origin, const V& sum_scale) {
  return z * sum_scale - origin * sum_scale;
}
template <class T>
TIGHTROPE_HD T scaled_shift(T z, T origin) {
  return scaled_shift<T>(z, origin, static_cast<T>(kSumScale));
}

// Whether z - origin, z <= origin, overflows for some finite z.
template <class T>
TIGHTROPE_HD bool is_far(T origin) {
  using Limits = std::numeric_limits<T>;
  return origin > Limits::max() * Limits::epsilon() / 8;
}

// Scalar forms of operations that a vector type brings along (for at::vec's vectors they are found
// by argument-dependent lookup). `maximum` gives NaN if either side is NaN, which std::max does not
// promise.
TIGHTROPE_HD float fmadd(float a, float b, float c) {
  return a * b + c;
}
TIGHTROPE_HD double fmadd(double a, double b, double c) {
  return a * b + c;
}

TIGHTROPE_HD float maximum(float a, float b) {
#if defined(__CUDA_ARCH__)
  float out;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(out) : "f"(a), "f"(b));
  return out;
#else
  return (a > b || a != a) ? a : b;
#endif
}
TIGHTROPE_HD double maximum(double a, double b) {
  return (a > b || a != a) ? a : b;
}

// Adds one entry to sums relative to a maximum: d = z - origin(max), e = exp(d), and `bounded` is d
// or kLogZero, the larger one. T may be a vector. The caller adds d to shift_sum: past the end of a
// row a vector lane has e = 0, but no d that is 0; and where `is_far` the sum of d is not that of
// scaled shifts. sum_scale is kSumScale.
template <class T>
TIGHTROPE_HD void add_entry(
    Partial<T>& sums, const T& z, const T& bounded, const T& e, const T& sum_scale) {
  sums.logit_sum = fmadd(z, sum_scale, sums.logit_sum);
  sums.square_sum = fmadd(z, z, sums.square_sum);
  sums.sum_exp = sums.sum_exp + e;
  sums.sum_exp_shift = fmadd(e, bounded, sums.sum_exp_shift);
  sums.sum_exp_square = fmadd(e, e, sums.sum_exp_square);
}

// Adds target mass b at an entry of scaled shift `scaled`, which must be 0 where b is, so that
// 0 * -inf does not arise.
template <class T>
TIGHTROPE_HD void add_target(Partial<T>& sums, const T& b, const T& scaled, const T& e) {
  sums.target_shift = fmadd(b, scaled, sums.target_shift);
  sums.target_exp = fmadd(b, e, sums.target_exp);
  sums.target_mass = sums.target_mass + b;
}

// e^shift, which most often is 1: of two parts that are merged one has the larger maximum.
template <class T>
TIGHTROPE_HD T rescale(T shift) {
  return shift == T(0) ? T(1) : T(std::exp(shift));
}

// What the exponents of sums change by where another, larger maximum takes the place of theirs.
// Clamped where e^shift is 0: with -inf, or a shift times a sum that overflows, 0 * inf is NaN.
template <class T>
TIGHTROPE_HD T clamped_shift(T from, T to) {
  return maximum(origin(from) - origin(to), T(kLogZero));
}

// The same sums relative to another, larger maximum.
template <class T>
TIGHTROPE_HD Partial<T> rebase(const Partial<T>& part, T max) {
  Partial<T> out = part;
  out.max = max;
  const T shift = clamped_shift(part.max, max);
  const T scaled = scaled_shift(origin(part.max), origin(max));
  const T scale = part.sum_exp == T(0) ? T(0) : rescale(shift);
  out.sum_exp = scale * part.sum_exp;
  out.sum_exp_shift = scale * (part.sum_exp_shift + shift * part.sum_exp);
  out.sum_exp_square = scale * scale * part.sum_exp_square;
  out.target_shift = part.target_shift + scaled * part.target_mass;
  out.target_exp = scale * part.target_exp;
  out.shift_sum = part.shift_sum + scaled * part.count;
  return out;
}

// Merge the statistics of two disjoint parts of one row. Associative, so a row may be cut anywhere.
template <class T>
TIGHTROPE_HD Partial<T> merge(const Partial<T>& a, const Partial<T>& b) {
  const T max = maximum(a.max, b.max);
  Partial<T> out = rebase(a, max);
  const Partial<T> other = rebase(b, max);
  out.sum_exp += other.sum_exp;
  out.sum_exp_shift += other.sum_exp_shift;
  out.sum_exp_square += other.sum_exp_square;
  out.target_shift += other.target_shift;
  out.target_exp += other.target_exp;
  out.target_mass += other.target_mass;
  out.shift_sum += other.shift_sum;
  out.square_sum += other.square_sum;
  out.count += other.count;
  out.logit_sum += other.logit_sum;
  return out;
}

// One side of a row that a set of classes cuts in two, the set or the rest: sums as in a Partial,
// relative to the side's own maximum. Sides are laid out [kSideFields, rows]: the set's fields,
// then the rest's.
template <class T>
struct Side {
  T max = -std::numeric_limits<T>::infinity();
  T sum_exp = 0;
  T sum_exp_shift = 0;
};
constexpr int kSideFields = 6;

template <class T>
TIGHTROPE_HD Side<T> rebase(const Side<T>& side, T max) {
  const T shift = clamped_shift(side.max, max);
  const T scale = side.sum_exp == T(0) ? T(0) : rescale(shift);
  return {max, scale * side.sum_exp, scale * (side.sum_exp_shift + shift * side.sum_exp)};
}

template <class T>
TIGHTROPE_HD Side<T> merge(const Side<T>& a, const Side<T>& b) {
  const T max = maximum(a.max, b.max);
  const Side<T> x = rebase(a, max), y = rebase(b, max);
  return {max, x.sum_exp + y.sum_exp, x.sum_exp_shift + y.sum_exp_shift};
}

// A side of which one entry is seen.
template <class T>
TIGHTROPE_HD Side<T> side_of(T z) {
  return {z, z == -std::numeric_limits<T>::infinity() ? T(0) : z - z + T(1), T(0)};
}

// Whether the maximum `max`, found at entry `at`, goes before another as a row's argmax: the larger
// one, NaN above all, then the lower entry. An unsigned -1 stands for no entry.
template <class T, class Index>
TIGHTROPE_HD bool precedes(T max, Index at, T other, Index other_at) {
  const bool nan = max != max, other_nan = other != other;
  if (nan || other_nan) return nan && (!other_nan || at < other_at);
  return max > other || (max == other && at < other_at);
}

// What follows from the statistics of a whole row, as far as a gradient needs it.
template <class T>
struct Summary {
  T max, log_sum, entropy, collision, target_prob, target_mass;
};

// target_must_occur: the row has one target class. Where none was met the class is out of range,
// and the row's loss and gradient become NaN.
template <class T>
TIGHTROPE_HD Summary<T> summarise(const Partial<T>& row, bool target_must_occur) {
  const T log_sum = std::log(row.sum_exp);
  const bool lost = target_must_occur && row.target_mass == T(0);
  const T mass = lost ? std::numeric_limits<T>::quiet_NaN() : row.target_mass;
  return {
      row.max,
      log_sum,
      log_sum - row.sum_exp_shift / row.sum_exp,
      row.sum_exp_square / (row.sum_exp * row.sum_exp),
      lost ? mass : row.target_exp / row.sum_exp,
      mass};
}

// Upstream gradients of a row's statistics where they must be known before the statistics are: each
// is a constant or a small function of its statistic, which covers the built-in losses. The order
// is the layout of the `upstream` tensors, [kUpstreamFields, rows].
template <class T>
struct Upstream {
  T lse, lse_slope;             // g_lse = lse + lse_slope * lse of the row
  T collision, collision_rate;  // g_collision = collision + collision_rate / collision of the row
  T entropy, target_logit, target_prob, target_log_prob, mean_log_prob, logit_sum, logit_square_sum;
};
constexpr int kUpstreamFields = 11;

template <class T>
TIGHTROPE_HD Coefficients<T> coefficients(
    const Summary<T>& row, const Upstream<T>& up, T vocab_size) {
  const T lse = up.lse + (up.lse_slope == T(0) ? T(0) : up.lse_slope * (row.max + row.log_sum));
  // g_collision times the collision: a rate needs no division here.
  const T weighed = up.collision * row.collision + up.collision_rate;
  const T rate = up.collision_rate == T(0) ? T(0) : up.collision_rate / row.collision;
  Coefficients<T> c;
  c.prob = lse - up.entropy * row.entropy - 2 * weighed - up.target_prob * row.target_prob -
           up.target_log_prob * row.target_mass - up.mean_log_prob;
  c.prob_log_prob = -up.entropy;
  c.prob_square = 2 * (up.collision + rate);
  c.target = up.target_logit + up.target_log_prob;
  c.target_prob = up.target_prob;
  c.logit = 2 * up.logit_square_sum;
  c.constant = up.logit_sum + up.mean_log_prob / vocab_size;
  return c;
}

// log p of an entry. The maximum and the log of the sum are not added up first: z - max - log_sum
// keeps the precision of the difference.
template <class V>
TIGHTROPE_HD V log_probability(const V& z, const V& max, const V& log_sum) {
  return (z - max) - log_sum;
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

// Sums of a row along a direction of its logits, which the derivatives of its statistics are made
// of: `moved` is the direction at an entry. The statistics of the whole row are known, so p is
// normalised and the sums of disjoint parts simply add up. The order is the layout of the `sums`
// tensors, [kTangentSums, rows].
template <class V>
struct TangentSums {
  V prob, prob_log_prob, prob_square;  // sum p moved, sum p log p moved, sum p^2 moved
  V target, target_prob;               // sum b moved, sum b p moved
  V constant, logit;                   // sum moved, sum z moved
};
constexpr int kTangentSums = 7;

// Adds an entry. z must be finite: an impossible entry does not move, and counts as 0.
template <class V>
TIGHTROPE_HD void add_moved(
    TangentSums<V>& sums, const V& z, const V& moved, const V& p, const V& log_p) {
  const V weighed = p * moved;
  sums.prob = sums.prob + weighed;
  sums.prob_log_prob = fmadd(weighed, log_p, sums.prob_log_prob);
  sums.prob_square = fmadd(weighed, p, sums.prob_square);
  sums.constant = sums.constant + moved;
  sums.logit = fmadd(z, moved, sums.logit);
}

// Adds target mass b at that entry.
template <class V>
TIGHTROPE_HD void add_moved_target(TangentSums<V>& sums, const V& b, const V& moved, const V& p) {
  const V weighed = b * moved;
  sums.target = sums.target + weighed;
  sums.target_prob = fmadd(weighed, p, sums.target_prob);
}

// The derivatives of the three parts of dloss/dz_j along a direction: moved at the entry, delta of
// its log p, d of the coefficients.
template <class V>
TIGHTROPE_HD V prob_gradient_tangent(
    const V& p, const V& log_p, const V& delta, const Coefficients<V>& c,
    const Coefficients<V>& d) {
  const V form = c.prob + c.prob_log_prob * log_p + c.prob_square * p;
  const V changed = d.prob + d.prob_log_prob * log_p + d.prob_square * p;
  return p * (delta * (form + c.prob_log_prob + c.prob_square * p) + changed);
}
template <class V>
TIGHTROPE_HD V target_gradient_tangent(
    const V& b, const V& p, const V& delta, const Coefficients<V>& c, const Coefficients<V>& d) {
  return b * (d.target + p * (d.target_prob + c.target_prob * delta));
}
template <class V>
TIGHTROPE_HD V logit_gradient_tangent(
    const V& z, const V& moved, const Coefficients<V>& c, const Coefficients<V>& d) {
  return d.logit * z + c.logit * moved + d.constant;
}

// dz/du of the softcap z = cap tanh(u / cap), from z.
template <class V>
TIGHTROPE_HD V softcap_slope(const V& z, const V& inverse_cap) {
  const V t = z * inverse_cap;
  return V(1) - t * t;
}

// How a raw value becomes a logit, z = softcap tanh(logit_scale (x + bias) / softcap), from x +
// bias. capped: there is a softcap. tanh: that of V.
template <class V, class Tanh>
TIGHTROPE_HD V to_logit(
    const V& biased, const V& scale, bool capped, const V& cap, const V& inverse_cap, Tanh tanh) {
  const V u = biased * scale;
  return capped ? cap * tanh(u * inverse_cap) : u;
}

// dloss/dz to dloss/dx.
template <class V>
TIGHTROPE_HD V
to_raw_gradient(const V& grad, const V& z, const V& scale, bool capped, const V& inverse_cap) {
  const V scaled = grad * scale;
  return capped ? scaled * softcap_slope(z, inverse_cap) : scaled;
}

// The direction of a logit z, from that of its raw value.
template <class V>
TIGHTROPE_HD V
to_logit_tangent(const V& moved, const V& z, const V& scale, bool capped, const V& inverse_cap) {
  const V scaled = moved * scale;
  return capped ? scaled * softcap_slope(z, inverse_cap) : scaled;
}

// The derivative of to_raw_gradient, where dloss/dz moves by grad_tangent and z by moved.
template <class V>
TIGHTROPE_HD V to_raw_gradient_tangent(
    const V& grad, const V& grad_tangent, const V& z, const V& moved, const V& scale, bool capped,
    const V& inverse_cap) {
  const V scaled = grad_tangent * scale;
  if (!capped) return scaled;
  const V bend = (z * inverse_cap) * (moved * inverse_cap);
  return scaled * softcap_slope(z, inverse_cap) - V(2) * bend * (grad * scale);
}

}  // namespace tightrope
