// Storage types, 16-byte accesses and the few device functions that the row kernels stand on.
//
// Everything here also compiles with a host compiler behind tests/simt/simt.h, which defines
// TIGHTROPE_SIMT and supplies threads, barriers and shuffles: the tests run these very sources on a
// CPU. Storage types are bits, so that no CUDA header is needed for them.
#pragma once

#include <cstring>
#include <type_traits>

#include "rows.h"

#define TIGHTROPE_DEVICE __device__ __forceinline__

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 800
#  error "Tightrope's CUDA kernels need compute capability 8.0 or later: see TORCH_CUDA_ARCH_LIST"
#endif

namespace tightrope::cuda {

template <class To, class From>
TIGHTROPE_DEVICE To bits_as(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  memcpy(&to, &from, sizeof(To));
  return to;
}

TIGHTROPE_DEVICE float widen(bf16 x) {
  return bits_as<float>(static_cast<uint32_t>(x.bits) << 16);
}
TIGHTROPE_DEVICE float widen(float x) {
  return x;
}
TIGHTROPE_DEVICE double widen(double x) {
  return x;
}
TIGHTROPE_DEVICE float widen(fp16 x) {
#if defined(TIGHTROPE_SIMT)
  return static_cast<float>(bits_as<_Float16>(x.bits));
#else
  float out;
  asm("cvt.f32.f16 %0, %1;" : "=f"(out) : "h"(x.bits));
  return out;
#endif
}

// To storage, rounding to nearest even.
TIGHTROPE_DEVICE void narrow(float x, float* out) {
  *out = x;
}
TIGHTROPE_DEVICE void narrow(double x, double* out) {
  *out = x;
}
TIGHTROPE_DEVICE void narrow(float x, bf16* out) {
#if defined(TIGHTROPE_SIMT)
  const uint32_t bits = bits_as<uint32_t>(x);
  out->bits = x != x ? 0x7fff : static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
#else
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(out->bits) : "f"(x));
#endif
}
TIGHTROPE_DEVICE void narrow(float x, fp16* out) {
#if defined(TIGHTROPE_SIMT)
  out->bits = bits_as<uint16_t>(static_cast<_Float16>(x));
#else
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(out->bits) : "f"(x));
#endif
}

// e^x for shifts and log-probabilities, x <= 0: one multiplication and the hardware's base-2
// exponential. The product's rounding costs |x| 2^-24 relative, which at x = -20 is 1e-6 of a term
// of 2e-9; the exponential itself 2^-22. Half of the instructions of expf, which at bfloat16 rates
// would be the bottleneck. Results below 2^-126 are 0.
TIGHTROPE_DEVICE float exponential(float x) {
  const float scaled = x * 1.44269504088896341f;
#if defined(TIGHTROPE_SIMT)
  return std::exp2(scaled);
#else
  float out;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(out) : "f"(scaled));
  return out;
#endif
}
TIGHTROPE_DEVICE double exponential(double x) {
  return std::exp(x);
}

// A block's shared memory, of the size that it was launched with.
TIGHTROPE_DEVICE unsigned char* shared_memory() {
#if defined(TIGHTROPE_SIMT)
  return simt::machine.current->block->shared;
#else
  extern __shared__ __align__(16) unsigned char bytes[];
  return bytes;
#endif
}

// What one memory instruction moves.
struct alignas(kVectorBytes) Vector {
  uint32_t word[4];
};

// Every access of the kernels to logits and gradients in global memory is one of these five.
TIGHTROPE_DEVICE Vector load_vector(const void* from) {
#if defined(TIGHTROPE_SIMT)
  simt::traffic.read += kVectorBytes;
  return *static_cast<const Vector*>(from);
#else
  const uint4 raw = *static_cast<const uint4*>(from);
  return {{raw.x, raw.y, raw.z, raw.w}};
#endif
}
TIGHTROPE_DEVICE void store_vector(void* to, const Vector& v) {
#if defined(TIGHTROPE_SIMT)
  simt::traffic.written += kVectorBytes;
  *static_cast<Vector*>(to) = v;
#else
  *static_cast<uint4*>(to) = make_uint4(v.word[0], v.word[1], v.word[2], v.word[3]);
#endif
}
// Two of these are a vector: what four float32 values become when they are narrowed.
struct alignas(kVectorBytes / 2) HalfVector {
  uint32_t word[2];
};
TIGHTROPE_DEVICE void store_vector(void* to, const HalfVector& v) {
#if defined(TIGHTROPE_SIMT)
  simt::traffic.written += sizeof(v);
  *static_cast<HalfVector*>(to) = v;
#else
  *static_cast<uint2*>(to) = make_uint2(v.word[0], v.word[1]);
#endif
}
template <class scalar_t>
TIGHTROPE_DEVICE scalar_t load_one(const scalar_t* from) {
#if defined(TIGHTROPE_SIMT)
  simt::traffic.read += sizeof(scalar_t);
#endif
  return *from;
}
template <class scalar_t>
TIGHTROPE_DEVICE void store_one(scalar_t* to, scalar_t value) {
#if defined(TIGHTROPE_SIMT)
  simt::traffic.written += sizeof(scalar_t);
#endif
  *to = value;
}

TIGHTROPE_DEVICE bool aligned(const void* p, int bytes = kVectorBytes) {
  return reinterpret_cast<uintptr_t>(p) % bytes == 0;
}

// The lanes of a vector, in the type of the arithmetic.
template <class scalar_t, class T>
TIGHTROPE_DEVICE void unpack(const Vector& v, T* out) {
  scalar_t lanes[kLanes<scalar_t>];
  memcpy(lanes, &v, sizeof(v));
#pragma unroll
  for (int k = 0; k < kLanes<scalar_t>; ++k) out[k] = widen(lanes[k]);
}

// The gradients of a vector's N lanes to storage. wide: `to` is aligned to all of them.
template <int N, class out_t, class T>
TIGHTROPE_DEVICE void store_run(out_t* to, const T* values, bool wide) {
  using Packed = std::conditional_t<N * sizeof(out_t) == kVectorBytes, Vector, HalfVector>;
  static_assert(sizeof(Packed) == N * sizeof(out_t));
  out_t lanes[N];
#pragma unroll
  for (int k = 0; k < N; ++k) narrow(values[k], &lanes[k]);
  if (wide) {
    Packed packed;
    memcpy(&packed, lanes, sizeof(packed));
    store_vector(to, packed);
  } else {
#pragma unroll
    for (int k = 0; k < N; ++k) store_one(to + k, lanes[k]);
  }
}

// N consecutive values of a bias or of a dense target, which may be aligned in another way than the
// logits.
template <int N, class T>
TIGHTROPE_DEVICE void load_run(const T* from, T* out) {
  constexpr int kPer = kLanes<T>;
  if (N % kPer == 0 && aligned(from)) {
#pragma unroll
    for (int k = 0; k + kPer <= N; k += kPer) {
      const Vector v = *reinterpret_cast<const Vector*>(from + k);
      memcpy(out + k, &v, sizeof(v));
    }
  } else {
#pragma unroll
    for (int k = 0; k < N; ++k) out[k] = from[k];
  }
}

// A run of entries of one row, cut for 16-byte accesses: some entries before the first boundary,
// whole vectors, some entries after the last. The entries outside vectors are the edge, fewer
// than 32.
template <class scalar_t>
struct Span {
  int size, head, vectors;

  TIGHTROPE_DEVICE Span(const scalar_t* start, int n) : size(n) {
    constexpr int kPer = kLanes<scalar_t>;
    const int past =
        static_cast<int>(reinterpret_cast<uintptr_t>(start) % kVectorBytes / sizeof(scalar_t));
    head = past == 0 ? 0 : kPer - past;
    if (head > n) head = n;
    vectors = (n - head) / kPer;
  }
  TIGHTROPE_DEVICE int edges() const { return size - vectors * kLanes<scalar_t>; }
  TIGHTROPE_DEVICE int column(int vector) const { return head + vector * kLanes<scalar_t>; }
  TIGHTROPE_DEVICE int edge_column(int edge) const {
    return edge < head ? edge : edge + vectors * kLanes<scalar_t>;
  }
};

}  // namespace tightrope::cuda
