// Logits that are scored as they are made.
//
// A thread takes a lot of the vocabulary. It makes a block of its logits and takes their statistics
// before they leave its cache, and waits for nobody in between. Each lot has a `partial` of its
// own, which are merged in order: what comes out does not depend on the threads.
#pragma once

#include "columns.h"
#include "product.h"

namespace tightrope::cpu {
inline namespace CPU_CAPABILITY {

constexpr int64_t kLot = 2 * kColumnBlock;
// Lots that a thread takes before what they gave is merged: more would hold more memory.
constexpr int64_t kLotsOfThread = 8;

// The statistics of some lots, each a `partial` and an argmax of all rows.
class Lots {
 public:
  Lots(int64_t count, int64_t rows)
      : rows_(rows), partials_(count * kPartialFields * rows), best_(count * rows) {}

  float* partial(int64_t lot) { return partials_.data() + lot * kPartialFields * rows_; }
  int64_t* argmax(int64_t lot) { return best_.data() + lot * rows_; }

  // Before a lot's first block.
  void reset(int64_t lot) {
    std::fill_n(partial(lot), kPartialFields * rows_, 0.0f);
    std::fill_n(partial(lot), rows_, -std::numeric_limits<float>::infinity());
    std::fill_n(argmax(lot), rows_, int64_t(-1));
  }

  void merge_into(int64_t lots, const bool* active, float* partial_of, int64_t* argmax_of) {
    at::parallel_for(0, rows_, grain_size(64 * lots), [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        if (active != nullptr && !active[i]) continue;
        auto row = load_partial(partial_of, rows_, i);
        for (int64_t lot = 0; lot < lots; ++lot) {
          const auto part = load_partial(partial(lot), rows_, i);
          if (is_new_maximum(argmax_of[i], part.max, row.max)) argmax_of[i] = argmax(lot)[i];
          row = merge(row, part);
        }
        store_partial(row, partial_of, rows_, i);
      }
    });
  }

 private:
  int64_t rows_;
  std::vector<float> partials_;
  std::vector<int64_t> best_;
};

// As row_stats of the logits [rows, cols] that product(first, n, z) makes: of entries [first, first
// + n), to z [n, rows]. out [cols, rows]: keeps them; or null. inner: of the product, for its cost.
template <class Product>
void product_stats(
    Product product, int64_t inner, float* out, int64_t rows, int64_t cols, int64_t offset,
    const Transform<float>& transform, const Targets<float>& targets, const bool* active,
    float* partial, int64_t* argmax) {
  const int64_t count = (cols + kLot - 1) / kLot;
  const int64_t together = std::min<int64_t>(count, kLotsOfThread * at::get_num_threads());
  Lots lots(together, rows);
  for (int64_t start = 0; start < count; start += together) {
    const int64_t here = std::min(together, count - start);
    at::parallel_for(0, here, units_of(kLot * rows * inner), [&](int64_t begin, int64_t end) {
      std::vector<float> memory(out == nullptr ? kColumnBlock * rows : 0);
      for (int64_t lot = begin; lot < end; ++lot) {
        lots.reset(lot);
        const int64_t last = std::min((start + lot + 1) * kLot, cols);
        for (int64_t first = (start + lot) * kLot; first < last; first += kColumnBlock) {
          const int64_t n = std::min(kColumnBlock, last - first);
          float* const z = out == nullptr ? memory.data() : out + first * rows;
          product(first, n, z);
          column_stats<float, float>(
              z, rows, rows, n, offset + first, transform.from(first), targets, active,
              lots.partial(lot), lots.argmax(lot));
        }
      }
    });
    lots.merge_into(here, active, partial, argmax);
  }
}

}  // namespace CPU_CAPABILITY
}  // namespace tightrope::cpu
