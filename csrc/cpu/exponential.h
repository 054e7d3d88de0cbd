// e^x of a vector of floats, inline.
//
// PyTorch's vectors call Sleef for it, once a vector, and a call keeps the compiler from
// interleaving the row kernels' work. Here x = n ln 2 + r with |r| <= ln 2 / 2, and e^r = 1 + r +
// r^2 q(r), where q is the polynomial of degree 4 of least relative error (3.1e-9), found by
// Lawson's iteration.
#pragma once

#include <ATen/cpu/vec/functional.h>
#include <ATen/cpu/vec/vec.h>

#include <cstdint>

namespace tightrope::cpu {
inline namespace CPU_CAPABILITY {

// 2^n for whole n in [-126, 127].
inline at::vec::Vectorized<float> power_of_two(const at::vec::Vectorized<float>& n) {
  using Int = at::vec::Vectorized<int32_t>;
  const Int exponent = at::vec::convert_to_int_of_same_size<float>(n) + Int(127);
  return at::vec::cast<float, int32_t>(exponent << Int(23));
}

inline at::vec::Vectorized<float> exponential(const at::vec::Vectorized<float>& x) {
  using Vec = at::vec::Vectorized<float>;
  // Beyond these the result is 0 and infinity. NaN passes: `maximum` and `minimum` keep it.
  const Vec bounded = at::vec::minimum(at::vec::maximum(x, Vec(-104.0f)), Vec(89.0f));
  const Vec n = (bounded * Vec(1.44269504f)).round();
  // ln 2 in two parts, of which the first has so few bits that n times it is exact.
  const Vec r =
      at::vec::fmadd(n, Vec(-1.42860682e-6f), at::vec::fmadd(n, Vec(-0.693145752f), bounded));
  Vec q = at::vec::fmadd(Vec(1.38144672e-3f), r, Vec(8.36878084e-3f));
  q = at::vec::fmadd(q, r, Vec(4.16683927e-2f));
  q = at::vec::fmadd(q, r, Vec(1.66665196e-1f));
  q = at::vec::fmadd(q, r, Vec(4.99999940e-1f));
  const Vec e = at::vec::fmadd(r * r, q, r) + Vec(1.0f);
  // In two steps, each by a normal number also where the result is not one.
  const Vec half = (n * Vec(0.5f)).floor();
  return e * power_of_two(half) * power_of_two(n - half);
}

inline at::vec::Vectorized<double> exponential(const at::vec::Vectorized<double>& x) {
  return x.exp();
}

}  // namespace CPU_CAPABILITY
}  // namespace tightrope::cpu
