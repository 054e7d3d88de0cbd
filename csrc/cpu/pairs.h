// Products of bfloat16 matrices with a float32 result, where the CPU has instructions for them.
//
// PyTorch rounds such a product to bfloat16, and what is converted to float32 first runs at a half
// to an eighth of the speed. Its own building block, brgemm of oneDNN, writes float32. It wants one
// operand in pairs: of two entries that follow each other along the inner dimension, side by side.
#pragma once

#include <ATen/Parallel.h>
#include <c10/util/BFloat16.h>
#include <c10/util/Exception.h>
#include <torch/version.h>

#include <algorithm>
#include <cstdint>
#include <exception>
#include <vector>

// libtorch exports it from 2.11 on.
#if defined(CPU_CAPABILITY_AVX512) && (TORCH_VERSION_MAJOR > 2 || TORCH_VERSION_MINOR >= 11)
#  define TIGHTROPE_PAIRS 1
#  include <ATen/native/CPUBlas.h>
#else
#  define TIGHTROPE_PAIRS 0
#endif

namespace tightrope::cpu {
inline namespace CPU_CAPABILITY {

constexpr int64_t kPairBlock = 64;  // rows of a that a thread takes at a time

// out [rows, cols] = a [rows, inner] times b, which lies as [inner / 2, cols, 2]. a has row stride
// `stride`, out has `cols`; inner is even.
inline void pair_product(
    const at::BFloat16* a, int64_t stride, const at::BFloat16* b, float* out, int64_t rows,
    int64_t cols, int64_t inner) {
#if TIGHTROPE_PAIRS
  const int64_t blocks = (rows + kPairBlock - 1) / kPairBlock;
  at::parallel_for(0, blocks, 1, [&](int64_t begin, int64_t end) {
    for (int64_t block = begin; block < end; ++block) {
      const int64_t first = block * kPairBlock, count = std::min(kPairBlock, rows - first);
      at::native::cpublas::brgemm(
          count, cols, inner, stride, cols, cols, false, a + first * stride, b, out + first * cols,
          true);
    }
    at::native::cpublas::brgemm_release(true);
  });
#else
  TORCH_CHECK(false, "tightrope: this build has no products of pairs");
#endif
}

// Whether there are, on this CPU: PyTorch has no question that says so, and brgemm throws.
inline bool has_pair_products() {
#if TIGHTROPE_PAIRS
  constexpr int64_t kSize = 32;
  try {
    const std::vector<at::BFloat16> ones(kSize * kSize, at::BFloat16(1.0f));
    std::vector<float> out(kSize * kSize);
    pair_product(ones.data(), kSize, ones.data(), out.data(), kSize, kSize, kSize);
    return out.front() == kSize && out.back() == kSize;
  } catch (const std::exception&) {
    return false;
  }
#else
  return false;
#endif
}

}  // namespace CPU_CAPABILITY
}  // namespace tightrope::cpu
