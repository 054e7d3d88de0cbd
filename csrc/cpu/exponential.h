// e^x of a vector of floats, inline.
//
// PyTorch's vectors call Sleef for it, once a vector, and a call keeps the compiler from
// interleaving the row kernels' work. Here x = n ln 2 + r with |r| <= ln 2 / 2, and e^r = 1 + r +
// r^2 q(r), where q is the polynomial of degree 4 of least relative error (3.1e-9), found by
// Lawson's iteration. The few steps that PyTorch's vectors take many instructions for are here
// for each instruction set; they give the same bits.
#pragma once

#include <ATen/cpu/vec/functional.h>
#include <ATen/cpu/vec/vec.h>

#include <cstdint>

namespace tightrope::cpu {
inline namespace CPU_CAPABILITY {

// max(x, least) and min(x, most) of no NaN with any x. NaN passes: the instructions give their
// second operand where there is one, and PyTorch's `maximum` takes five in their place.
template <class T>
at::vec::Vectorized<T> at_least(const at::vec::Vectorized<T>& x, T least) {
  return at::vec::maximum(x, at::vec::Vectorized<T>(least));
}
template <class T>
at::vec::Vectorized<T> at_most(const at::vec::Vectorized<T>& x, T most) {
  return at::vec::minimum(x, at::vec::Vectorized<T>(most));
}
#if defined(CPU_CAPABILITY_AVX512)
inline at::vec::Vectorized<float> at_least(const at::vec::Vectorized<float>& x, float least) {
  return _mm512_max_ps(_mm512_set1_ps(least), x);
}
inline at::vec::Vectorized<float> at_most(const at::vec::Vectorized<float>& x, float most) {
  return _mm512_min_ps(_mm512_set1_ps(most), x);
}
#elif defined(CPU_CAPABILITY_AVX2)
inline at::vec::Vectorized<float> at_least(const at::vec::Vectorized<float>& x, float least) {
  return _mm256_max_ps(_mm256_set1_ps(least), x);
}
inline at::vec::Vectorized<float> at_most(const at::vec::Vectorized<float>& x, float most) {
  return _mm256_min_ps(_mm256_set1_ps(most), x);
}
#endif

// e 2^n for e in [0.7, 1.5] and whole n in [-151, 129], rounded once.
inline at::vec::Vectorized<float> times_power_of_two(
    const at::vec::Vectorized<float>& e, const at::vec::Vectorized<float>& n) {
#if defined(CPU_CAPABILITY_AVX512)
  return _mm512_scalef_ps(e, n);
#else
  using Vec = at::vec::Vectorized<float>;
  using Int = at::vec::Vectorized<int32_t>;
  const auto power_of_two = [](const Vec& k) {  // 2^k for whole k in [-126, 127]
    const Int exponent = at::vec::convert_to_int_of_same_size<float>(k) + Int(127);
    return at::vec::cast<float, int32_t>(exponent << Int(23));
  };
  // In two steps, each by a normal number also where the result is not one.
  const Vec half = (n * Vec(0.5f)).floor();
  return e * power_of_two(half) * power_of_two(n - half);
#endif
}

inline at::vec::Vectorized<float> exponential(const at::vec::Vectorized<float>& x) {
  using Vec = at::vec::Vectorized<float>;
  // Beyond these the result is 0 and infinity.
  const Vec bounded = at_most(at_least(x, -104.0f), 89.0f);
  const Vec n = (bounded * Vec(1.44269504f)).round();
  // ln 2 in two parts, of which the first has so few bits that n times it is exact.
  const Vec r =
      at::vec::fmadd(n, Vec(-1.42860682e-6f), at::vec::fmadd(n, Vec(-0.693145752f), bounded));
  Vec q = at::vec::fmadd(Vec(1.38144672e-3f), r, Vec(8.36878084e-3f));
  q = at::vec::fmadd(q, r, Vec(4.16683927e-2f));
  q = at::vec::fmadd(q, r, Vec(1.66665196e-1f));
  q = at::vec::fmadd(q, r, Vec(4.99999940e-1f));
  return times_power_of_two(at::vec::fmadd(r * r, q, r) + Vec(1.0f), n);
}

inline at::vec::Vectorized<double> exponential(const at::vec::Vectorized<double>& x) {
  return x.exp();
}

}  // namespace CPU_CAPABILITY
}  // namespace tightrope::cpu
