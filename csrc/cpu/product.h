// Products of float32 matrices, for CPUs on which the library that PyTorch calls stays behind.
//
// One operand goes by in panels, three vectors wide and zero past its end, so that the innermost
// loop meets memory in order; of the other one entry at a time is spread over a vector, so that it
// may lie in any way. A result is written where it is wanted, and added up in an order that depends
// on the inner dimension alone: not on the threads, nor on the rows beside it.
#pragma once

#include <ATen/Parallel.h>
#include <ATen/cpu/vec/functional.h>
#include <ATen/cpu/vec/vec.h>

#include <algorithm>
#include <cstdint>
#include <type_traits>
#include <vector>

namespace tightrope::cpu {
inline namespace CPU_CAPABILITY {

using Lanes = at::vec::Vectorized<float>;
constexpr int64_t kPanel = 3 * Lanes::size();
// Rows of a block of sums that stays in registers: of 32 where there are 32.
constexpr int64_t kTall = Lanes::size() == 16 ? 8 : 4;
// Inner entries that are summed before the sums are put down: of few, all columns stay in the
// second-level cache beside the rows that they meet; of more, a panel does.
constexpr int64_t kInner = 192, kInnerOfPanels = 640;
// So many rows keep several threads busy.
constexpr int64_t kMany = 128;
// Elements of panels that a thread goes over for each block of rows: in the second-level cache.
constexpr int64_t kCached = 224 * 1024;

// The panels that `cols` columns make.
inline int64_t panel_count(int64_t cols) {
  return (cols + kPanel - 1) / kPanel;
}

// A matrix whose entry (i, k) is data[i * row + k * step].
template <class E>
struct Strided {
  const E* data;
  int64_t row, step;

  Strided from(int64_t i, int64_t k) const { return {data + i * row + k * step, row, step}; }
};

// Columns of a matrix, kPanel at a time.
struct Panels {
  const float* data;
  int64_t apart, next;  // from one to the next of them, and of its inner entries
};

// out [kRows, cols] = or += a [kRows, inner] times a panel [inner, kPanel], cols at most kVectors
// vectors.
template <int kRows, int kVectors>
void multiply_block(
    Strided<float> a, const float* panel, int64_t next, int64_t inner, float* out, int64_t stride,
    int64_t cols, bool add) {
  Lanes sums[kRows][kVectors];
#pragma GCC unroll 8
  for (int i = 0; i < kRows; ++i) {
#pragma GCC unroll 3
    for (int v = 0; v < kVectors; ++v) {
      __builtin_prefetch(out + i * stride + v * Lanes::size(), 1);
      sums[i][v] = Lanes(0.0f);
    }
  }
  const float* entry = a.data;
  for (int64_t k = 0; k < inner; ++k, entry += a.step, panel += next) {
    Lanes b[kVectors];
#pragma GCC unroll 3
    for (int v = 0; v < kVectors; ++v) b[v] = Lanes::loadu(panel + v * Lanes::size());
#pragma GCC unroll 8
    for (int i = 0; i < kRows; ++i) {
      const Lanes spread(entry[i * a.row]);
#pragma GCC unroll 3
      for (int v = 0; v < kVectors; ++v) sums[i][v] = at::vec::fmadd(spread, b[v], sums[i][v]);
    }
  }
  const int64_t last = cols - (kVectors - 1) * Lanes::size();
#pragma GCC unroll 8
  for (int i = 0; i < kRows; ++i) {
#pragma GCC unroll 3
    for (int v = 0; v < kVectors; ++v) {
      float* const to = out + i * stride + v * Lanes::size();
      const int64_t count = v + 1 < kVectors ? Lanes::size() : last;
      if (count == Lanes::size()) {
        (add ? sums[i][v] + Lanes::loadu(to) : sums[i][v]).store(to);
      } else {
        (add ? sums[i][v] + Lanes::loadu(to, count) : sums[i][v]).store(to, count);
      }
    }
  }
}

// The same of any number of rows.
template <int kVectors>
void multiply_panel(
    Strided<float> a, const float* panel, int64_t next, int64_t inner, float* out, int64_t stride,
    int64_t rows, int64_t cols, bool add) {
  int64_t i = 0;
  const auto go = [&](auto count) {
    for (; i + count <= rows; i += count) {
      multiply_block<count, kVectors>(
          a.from(i, 0), panel, next, inner, out + i * stride, stride, cols, add);
    }
  };
  go(std::integral_constant<int, kTall>());
  go(std::integral_constant<int, 4>());
  go(std::integral_constant<int, 2>());
  go(std::integral_constant<int, 1>());
}

// Brings what is wanted next into the second-level cache, some of it in each of so many steps: rows
// of `cols`, `apart` elements from each other.
class Ahead {
 public:
  Ahead() = default;
  template <class E>
  Ahead(const E* from, int64_t rows, int64_t cols, int64_t apart, int64_t steps)
      : from_(reinterpret_cast<const char*>(from)),
        lines_((cols * static_cast<int64_t>(sizeof(E)) + kLine - 1) / kLine),
        apart_(apart * static_cast<int64_t>(sizeof(E))),
        left_(rows * lines_),
        each_((left_ + steps - 1) / std::max<int64_t>(steps, 1)) {}

  void next() {
    for (int64_t n = std::min(each_, left_); n > 0; --n, --left_) {
      __builtin_prefetch(from_ + line_ * kLine, 0, 2);
      if (++line_ == lines_) line_ = 0, from_ += apart_;
    }
  }

 private:
  static constexpr int64_t kLine = 64;  // bytes
  const char* from_ = nullptr;
  int64_t lines_ = 0, apart_ = 0, left_ = 0, each_ = 0, line_ = 0;
};

// out [rows, cols] = or += a [rows, inner] times panels.
template <class... Aheads>
void multiply_panels(
    Strided<float> a, Panels panels, int64_t inner, float* out, int64_t stride, int64_t rows,
    int64_t cols, bool add, Aheads&... ahead) {
  for (int64_t first = 0; first < cols; first += kPanel, panels.data += panels.apart) {
    (ahead.next(), ...);
    const int64_t count = std::min(kPanel, cols - first);
    const auto run = count > 2 * Lanes::size() ? multiply_panel<3>
                     : count > Lanes::size()   ? multiply_panel<2>
                                               : multiply_panel<1>;
    run(a, panels.data, panels.next, inner, out + first, stride, rows, count, add);
  }
}

// Packs b [inner, cols], of float32 or what is converted to it, in panels [ceil(cols / kPanel),
// inner, kPanel].
template <class S>
void pack_panels(Strided<S> b, int64_t inner, int64_t cols, float* panels) {
  for (int64_t first = 0; first < cols; first += kPanel, panels += inner * kPanel) {
    const int64_t count = std::min(kPanel, cols - first);
    if (count < kPanel) std::fill_n(panels, inner * kPanel, 0.0f);
    for (int64_t k = 0; k < inner; ++k) {
      const S* const from = b.from(k, first).data;
      float* const to = panels + k * kPanel;
      if (b.step == 1) {
        for (int64_t j = 0; j < count; ++j) to[j] = static_cast<float>(from[j]);
      } else {
        for (int64_t j = 0; j < count; ++j) to[j] = static_cast<float>(from[j * b.step]);
      }
    }
  }
}

// Calls f(begin, end) for parts of [0, size), one a thread, in multiples of `unit`.
template <class F>
void for_parts(int64_t size, int64_t unit, int64_t grain, F f) {
  at::parallel_for(0, (size + unit - 1) / unit, grain, [&](int64_t begin, int64_t end) {
    f(begin * unit, std::min(end * unit, size));
  });
}

// Rows that go over panels together, of so many entries along the inner dimension: few where the
// panels stay in cache, since the rows then stay in the first-level one.
inline int64_t rows_together(int64_t inner, int64_t cols) {
  return inner * cols <= kCached ? kTall : 8 * kTall;
}

// How many are worth a thread, of units that cost so many products each.
inline int64_t units_of(int64_t products) {
  return 1 + (1 << 20) / (products + 1);
}

// out [rows, cols] = or += a [rows, inner] times what `pack_panels` made of the other.
inline void product_of_panels(
    Strided<float> a, const float* panels, int64_t inner, float* out, int64_t stride, int64_t rows,
    int64_t cols, bool add) {
  const int64_t depth = std::max<int64_t>((inner + kInnerOfPanels - 1) / kInnerOfPanels, 1);
  const int64_t most = (inner + depth - 1) / depth, together = rows_together(most, cols);
  for_parts(rows, kTall, units_of(kTall * cols * inner), [&](int64_t begin, int64_t end) {
    for (int64_t k = 0; k < inner; k += most) {
      const int64_t count = std::min(most, inner - k);
      for (int64_t i = begin; i < end; i += together) {
        const int64_t here = std::min(together, end - i);
        Ahead ahead;
        if (a.step == 1 && i + here < end) {
          const int64_t next = std::min(here, end - i - here);
          ahead = {a.from(i + here, k).data, next, count, a.row, panel_count(cols)};
        }
        multiply_panels(
            a.from(i, k), {panels + k * kPanel, inner * kPanel, kPanel}, count, out + i * stride,
            stride, here, cols, add || k > 0, ahead);
      }
    }
  });
}

// kTall rows of a, or what there is of them, as memory [inner, kTall]: they meet many panels, which
// would push them out of the first-level cache where they lie apart.
inline Strided<float> gathered_rows(Strided<float> a, int64_t rows, int64_t inner, float* memory) {
  if (a.row == 1 && rows == kTall) {
    for (int64_t k = 0; k < inner; ++k) std::copy_n(a.from(0, k).data, kTall, memory + k * kTall);
    return {memory, 1, kTall};
  }
  for (int64_t k = 0; k < inner; ++k) {
    for (int64_t i = 0; i < rows; ++i) memory[k * kTall + i] = a.from(i, k).data[0];
  }
  return {memory, 1, kTall};
}

// Rows [begin, end) of out [.., cols] = or += a [.., inner] times panels; next: what comes after
// them. memory: of kTall * inner elements.
inline void multiply_rows(
    Strided<float> a, Panels panels, int64_t inner, float* out, int64_t stride, int64_t begin,
    int64_t end, int64_t cols, bool add, Ahead next, float* memory) {
  for (int64_t i = begin; i < end; i += kTall) {
    const int64_t here = std::min(kTall, end - i);
    Ahead of_a;
    if (a.row == 1 && i + here < end) {
      const int64_t more = std::min(kTall, end - i - here);
      of_a = {a.from(i + here, 0).data, inner, more, a.step, panel_count(cols)};
    }
    multiply_panels(
        gathered_rows(a.from(i, 0), here, inner, memory), panels, inner, out + i * stride, stride,
        here, cols, add, next, of_a);
  }
}

// Steps in which so many rows go over panels.
inline int64_t steps_of(int64_t rows, int64_t cols) {
  return panel_count(cols) * ((rows + kTall - 1) / kTall);
}

// What of b [inner, cols] follows the entries [k, k + kInner).
template <class S>
Ahead following(Strided<S> b, int64_t k, int64_t inner, int64_t cols, int64_t steps) {
  const int64_t next = k + kInner;
  if (b.step != 1 || next >= inner) return {};
  return {b.from(next, 0).data, std::min(kInner, inner - next), cols, b.row, steps};
}

// out [rows, cols] = or += a [rows, inner] times b [inner, cols], in whole vectors that lie as a
// panel's: each thread has some of the rows.
inline void product_of_whole(
    Strided<float> a, Strided<float> b, int64_t inner, float* out, int64_t stride, int64_t rows,
    int64_t cols, bool add) {
  for_parts(rows, kTall, units_of(kTall * cols * inner), [&](int64_t begin, int64_t end) {
    std::vector<float> memory(kTall * kInner);
    const int64_t steps = steps_of(end - begin, cols);
    for (int64_t k = 0; k < inner; k += kInner) {
      const Panels panels{b.from(k, 0).data, kPanel, b.row};
      multiply_rows(
          a.from(0, k), panels, std::min(kInner, inner - k), out, stride, begin, end, cols,
          add || k > 0, following(b, k, inner, cols, steps), memory.data());
    }
  });
}

// The same of any b. Each thread has some of the columns, which it packs as it goes.
template <class S>
void product(
    Strided<float> a, Strided<S> b, int64_t inner, float* out, int64_t stride, int64_t rows,
    int64_t cols, bool add) {
  if constexpr (std::is_same_v<S, float>) {
    if (rows >= kMany && b.step == 1 && cols % Lanes::size() == 0) {
      return product_of_whole(a, b, inner, out, stride, rows, cols, add);
    }
  }
  for_parts(cols, kPanel, units_of(kPanel * rows * inner), [&](int64_t begin, int64_t end) {
    const int64_t width = end - begin, steps = steps_of(rows, width);
    std::vector<float> memory((panel_count(width) * kPanel + kTall) * kInner);
    float* const packed = memory.data() + kTall * kInner;
    for (int64_t k = 0; k < inner; k += kInner) {
      const int64_t count = std::min(kInner, inner - k);
      pack_panels(b.from(k, begin), count, width, packed);
      multiply_rows(
          a.from(0, k), {packed, count * kPanel, kPanel}, count, out + begin, stride, 0, rows,
          width, add || k > 0, following(b.from(0, begin), k, inner, width, steps), memory.data());
    }
  });
}

}  // namespace CPU_CAPABILITY
}  // namespace tightrope::cpu
