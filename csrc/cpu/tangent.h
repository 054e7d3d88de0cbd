// What the kernels of second order share: a row's form with its derivative, and the sums along a
// direction.
#pragma once

#include <array>

#include "common.h"

namespace tightrope::cpu {
inline namespace CPU_CAPABILITY {

// A row's form and its derivative. V may be a vector.
template <class V>
struct MovingForm {
  Form<V> form;
  V norm;             // derivative of the log of the sum
  Coefficients<V> c;  // derivatives of the coefficients

  // value(tensor, field): as for Form; norm_tangent [1, rows] and coef_tangent [kCoefficients,
  // rows], or of the set's, which follow them.
  template <class T, class Value>
  static MovingForm load(
      const T* norm, const T* norm_tangent, const T* coef, const T* coef_tangent, int side,
      Value value) {
    const auto c = [&](int k) { return value(coef_tangent, kCoefficients * side + k); };
    return {
        Form<V>::load(norm, coef, side, value),
        value(norm_tangent, side),
        {c(0), c(1), c(2), c(3), c(4), c(5), c(6)}};
  }
};

// As `select` of forms.
template <class V>
const MovingForm<V>& select(
    const MovingForm<V>& rest, const MovingForm<V>& set, const V& inside, MovingForm<V>& mixed) {
  if (is_none(inside)) return rest;
  const auto pick = [&](const V& a, const V& b) { return V::blendv(a, b, inside); };
  mixed = rest;
  select(rest.form, set.form, inside, mixed.form);
  mixed.norm = pick(rest.norm, set.norm);
  mixed.c.prob = pick(rest.c.prob, set.c.prob);
  mixed.c.prob_log_prob = pick(rest.c.prob_log_prob, set.c.prob_log_prob);
  mixed.c.prob_square = pick(rest.c.prob_square, set.c.prob_square);
  mixed.c.target_prob = pick(rest.c.target_prob, set.c.target_prob);
  return mixed;
}

// dloss/dz of an entry and its derivative.
template <class V>
struct Moved {
  V grad, tangent;
};

// Of an entry of logit z that moves by `moved`, but for target mass. no_logit, no_logit_tangent:
// where z is left out, not multiplied by zero, as a masked entry has -inf. pick(a, b, no): b where
// `no` holds.
template <class V, class No, class Pick>
Moved<V> moved_gradient(
    const V& z, const V& moved, const V& p, const V& log_p, const MovingForm<V>& f,
    const No& no_logit, const No& no_logit_tangent, Pick pick) {
  const Coefficients<V>& c = f.form.c;
  const V delta = moved - f.norm;
  const V of_logit = pick(logit_gradient(z, c), c.constant, no_logit);
  const V still = c.logit * moved + f.c.constant;
  const V of_logit_tangent =
      pick(logit_gradient_tangent(z, moved, c, f.c), still, no_logit_tangent);
  return {
      prob_gradient(p, log_p, c) + of_logit,
      prob_gradient_tangent(p, log_p, delta, c, f.c) + of_logit_tangent};
}

// What target mass b at an entry adds to that.
template <class V>
void add_target_gradient(
    Moved<V>& to, const V& b, const V& moved, const V& p, const MovingForm<V>& f) {
  to.grad = to.grad + target_gradient(b, p, f.form.c);
  to.tangent = to.tangent + target_gradient_tangent(b, p, V(moved - f.norm), f.form.c, f.c);
}

// Of one entry of the set, its dense mass included. dense: the mass, or null.
template <class T>
Moved<T> entry_moved(T z, T moved, const MovingForm<T>& f, const T* dense) {
  const T log_p = log_probability(z, f.form.max, f.form.log_sum), p = std::exp(log_p);
  const auto pick = [](T a, T b, bool no) { return no ? b : a; };
  Moved<T> out = moved_gradient<T>(
      z, moved, p, maximum(log_p, T(kLogZero)), f, f.form.c.logit == T(0), f.c.logit == T(0), pick);
  if (dense != nullptr) add_target_gradient(out, *dense, moved, p, f);
  return out;
}

// The maximum and the log of the sum of a row's side.
template <class V>
struct Norm {
  V max, log_sum;

  template <class T, class Value>
  static Norm load(const T* norm, int side, Value value) {
    return {value(norm, 2 * side), value(norm, 2 * side + 1)};
  }
};

// Sums along a direction, one in each lane.
template <class T>
struct LaneSums : TangentSums<Vectorized<T>> {
  using Vec = Vectorized<T>;

  LaneSums() {
    const Vec zero(T(0));
    static_cast<TangentSums<Vec>&>(*this) = {zero, zero, zero, zero, zero, zero, zero};
  }

  // One entry in each lane, of dense target mass b, where there is such. All that is added is
  // linear in what moves, so an entry of the other side is one that does not.
  void add(const Vec& z, const Vec& moved, const Vec& p, const Vec& log_p, const Vec* b) {
    const Vec zero(T(0));
    const Vec finite = Vec::blendv(z, zero, z == Vec(-std::numeric_limits<T>::infinity()));
    add_moved<Vec>(*this, finite, moved, p, log_p);
    if (b != nullptr) add_moved_target<Vec>(*this, *b, moved, p);
  }
};

// The sums of both sides of some entries, one in each lane.
template <class T>
struct SidesLaneSums {
  using Vec = Vectorized<T>;
  LaneSums<T> rest, set;

  // live: lanes that hold an entry, the first ones.
  void add(
      const Vec& z, const Vec& moved, const Norm<Vec>& of_rest, const Norm<Vec>& of_set,
      const Vec& least, const Vec* b, int64_t live) {
    const Vec zero(T(0)), log_zero(static_cast<T>(kLogZero));
    const Vec inside = z >= least;
    const bool alone = is_none(inside);
    const auto pick = [&](const Vec& a, const Vec& b) {
      return alone ? a : Vec::blendv(a, b, inside);
    };
    const Vec log_p =
        log_probability(z, pick(of_rest.max, of_set.max), pick(of_rest.log_sum, of_set.log_sum));
    const Vec p =
        live < Vec::size() ? Vec::set(zero, exponential(log_p), live) : exponential(log_p);
    const Vec bounded = at::vec::maximum(log_p, log_zero);
    if (alone) {
      rest.add(z, moved, p, bounded, b);
      return;
    }
    rest.add(z, Vec::blendv(moved, zero, inside), p, bounded, b);
    set.add(z, Vec::blendv(zero, moved, inside), p, bounded, b);
  }
};

// Adds an entry to the sums of its side [kTangentSums, rows] of row i. mass: of a target there, or
// null. whole: also what is no target's.
template <class T>
void add_entry_sums(
    T* sums, int64_t rows, int64_t i, T z, T moved, const Norm<T>& norm, const T* mass,
    bool whole) {
  TangentSums<T> one = {0, 0, 0, 0, 0, 0, 0};
  const T log_p = log_probability(z, norm.max, norm.log_sum), p = std::exp(log_p);
  const T finite = z == -std::numeric_limits<T>::infinity() ? T(0) : z;
  if (whole) add_moved<T>(one, finite, moved, p, maximum(log_p, T(kLogZero)));
  if (mass != nullptr) add_moved_target<T>(one, *mass, moved, p);
  const T fields[kTangentSums] = {one.prob,        one.prob_log_prob, one.prob_square, one.target,
                                  one.target_prob, one.constant,      one.logit};
  for (int f = 0; f < kTangentSums; ++f) sums[f * rows + i] += fields[f];
}

// The fields of lane sums, in order.
template <class T>
std::array<Vectorized<T>, kTangentSums> fields_of(const LaneSums<T>& s) {
  return {s.prob, s.prob_log_prob, s.prob_square, s.target, s.target_prob, s.constant, s.logit};
}

}  // namespace CPU_CAPABILITY
}  // namespace tightrope::cpu
