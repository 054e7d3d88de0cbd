// Products of bfloat16 matrices with a float32 result, where the CPU has instructions for them.
//
// PyTorch rounds such a product to bfloat16, and what is converted to float32 first runs at a half
// to an eighth of the speed. Its own building block, brgemm of oneDNN, writes float32. It wants one
// operand in pairs: of two entries that follow each other along the inner dimension, side by side.
#pragma once

#include <ATen/Parallel.h>
#include <ATen/cpu/vec/functional.h>
#include <ATen/cpu/vec/vec.h>
#include <c10/util/BFloat16.h>
#include <c10/util/Exception.h>
#include <torch/version.h>

#include <algorithm>
#include <cstdint>
#include <exception>
#include <iterator>
#include <vector>

#include "product.h"

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
// Inner entries that are rounded and multiplied at a time: with the pairs that they meet, in the
// second-level cache.
constexpr int64_t kPairInner = 256;
// What is rounded is filled up with zeros to multiples of this along the inner dimension: brgemm
// keeps a kernel for each shape that it meets.
constexpr int64_t kPairMultiple = 32;

// Where b [inner, cols] becomes pairs, it has so many inner entries.
inline int64_t filled_inner(int64_t inner) {
  return (inner + kPairMultiple - 1) / kPairMultiple * kPairMultiple;
}

// Packs b [inner, cols], adjacent along the second, as [filled_inner(inner) / 2, cols, 2].
inline void pack_pairs(
    const at::BFloat16* b, int64_t stride, int64_t inner, int64_t cols, at::BFloat16* out) {
  at::parallel_for(0, filled_inner(inner) / 2, 1 + 32768 / (cols + 1), [&](int64_t i, int64_t end) {
    for (; i < end; ++i) {
      // Two bfloat16 are one number of 32 bits, the first one in its lower half.
      auto* const to = reinterpret_cast<uint32_t*>(out) + i * cols;
      const auto* const low = reinterpret_cast<const uint16_t*>(b + 2 * i * stride);
      const auto* const high = low + stride;
      if (2 * i + 1 < inner) {
        for (int64_t j = 0; j < cols; ++j) to[j] = low[j] | static_cast<uint32_t>(high[j]) << 16;
      } else if (2 * i < inner) {
        for (int64_t j = 0; j < cols; ++j) to[j] = low[j];
      } else {
        std::fill_n(to, cols, 0);
      }
    }
  });
}

#if TIGHTROPE_PAIRS
// Rounds a [rows, inner] to out [rows, filled_inner(inner)]. Rows that are adjacent to each other
// go by way of memory [kPairMultiple, kPairMultiple].
inline void round_rows(Strided<float> a, int64_t rows, int64_t inner, at::BFloat16* out) {
  const int64_t filled = filled_inner(inner);
  if (a.step == 1) {
    for (int64_t i = 0; i < rows; ++i, out += filled) {
      at::vec::convert(a.from(i, 0).data, out, inner);
      std::fill(out + inner, out + filled, at::BFloat16(0.0f));
    }
    return;
  }
  alignas(64) at::BFloat16 block[kPairMultiple * kPairMultiple];
  for (int64_t k = 0; k < filled; k += kPairMultiple) {
    const int64_t deep = std::min(kPairMultiple, inner - k);
    for (int64_t i = 0; i < rows; i += kPairMultiple) {
      const int64_t tall = std::min(kPairMultiple, rows - i);
      for (int64_t j = 0; j < deep; ++j) {
        at::vec::convert(a.from(i, k + j).data, block + j * kPairMultiple, tall);
      }
      std::fill(block + deep * kPairMultiple, std::end(block), at::BFloat16(0.0f));
      at::vec::transpose_mxn<at::BFloat16>(
          block, kPairMultiple, out + i * filled + k, filled, kPairMultiple, tall);
    }
  }
}

inline void multiply_pairs(
    const at::BFloat16* a, int64_t stride, const at::BFloat16* pairs, float* out, int64_t apart,
    int64_t rows, int64_t cols, int64_t inner, bool add) {
  // In few heights, of which brgemm keeps a kernel each.
  for (int64_t height = kPairBlock; rows > 0; height /= 2) {
    for (; rows >= height; rows -= height, a += height * stride, out += height * apart) {
      at::native::cpublas::brgemm(
          height, cols, inner, stride, cols, apart, add, a, pairs, out, true);
    }
  }
}
#endif

// out [rows, cols] = or += a [rows, inner] times b, which lies as [inner / 2, cols, 2]. a has row
// stride `stride`, out has `apart`; inner is even.
inline void pair_product(
    const at::BFloat16* a, int64_t stride, const at::BFloat16* pairs, float* out, int64_t apart,
    int64_t rows, int64_t cols, int64_t inner, bool add) {
#if TIGHTROPE_PAIRS
  for_parts(rows, kPairBlock, 1, [&](int64_t begin, int64_t end) {
    for (; begin < end; begin += kPairBlock) {
      multiply_pairs(
          a + begin * stride, stride, pairs, out + begin * apart, apart,
          std::min(kPairBlock, end - begin), cols, inner, add);
    }
    at::native::cpublas::brgemm_release(true);
  });
#else
  TORCH_CHECK(false, "tightrope: this build has no products of pairs");
#endif
}

// The same of a that is rounded first, and of what `pack_pairs` made of the other.
inline void rounded_product(
    Strided<float> a, const at::BFloat16* pairs, float* out, int64_t apart, int64_t rows,
    int64_t cols, int64_t inner, bool add) {
#if TIGHTROPE_PAIRS
  for_parts(rows, kPairMultiple / 2, 1, [&](int64_t begin, int64_t end) {
    std::vector<at::BFloat16> rounded(kPairBlock * kPairInner);
    for (int64_t k = 0; k < inner; k += kPairInner) {
      const int64_t deep = std::min(kPairInner, inner - k), filled = filled_inner(deep);
      for (int64_t i = begin; i < end; i += kPairBlock) {
        const int64_t tall = std::min(kPairBlock, end - i);
        round_rows(a.from(i, k), tall, deep, rounded.data());
        multiply_pairs(
            rounded.data(), filled, pairs + k * cols, out + i * apart, apart, tall, cols, filled,
            add || k > 0);
      }
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
    pair_product(ones.data(), kSize, ones.data(), out.data(), kSize, kSize, kSize, kSize, false);
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
