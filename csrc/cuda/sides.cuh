// Which entries of a row are in its set of classes.
#pragma once

#include "row.cuh"

namespace tightrope::cuda {

// How many of n ascending classes are below `least`.
TIGHTROPE_DEVICE int count_below(const int64_t* classes, int n, int64_t least) {
  int low = 0;
  while (low < n) {
    const int middle = low + (n - low) / 2;
    if (classes[middle] < least) {
      low = middle + 1;
    } else {
      n = middle;
    }
  }
  return low;
}

// The set of a row, as far as it lies in columns begin .. end of a tile.
template <class T>
struct Members {
  T threshold;             // NaN, which no logit reaches, where classes are listed
  const int64_t* classes;  // those in these columns
  int count;
  int64_t offset;

  TIGHTROPE_DEVICE
  Members(const SideArgs<T>& which, int64_t row, int64_t tile_offset, int begin, int end)
      : threshold(std::numeric_limits<T>::quiet_NaN()),
        classes(nullptr),
        count(0),
        offset(tile_offset) {
    if (which.threshold != nullptr) threshold = which.threshold[row];
    if (which.classes != nullptr) {
      const int64_t* all = which.classes + row * which.listed;
      const int before = count_below(all, which.listed, offset + begin);
      classes = all + before;
      count = count_below(classes, which.listed - before, offset + end);
    }
  }

  // Bit k: whether column + k, whose logit is z[k], is in the set. Listed twice, it is so once.
  template <int N>
  TIGHTROPE_DEVICE unsigned among(const T* z, int column) const {
    unsigned in = 0;
#pragma unroll
    for (int k = 0; k < N; ++k) in |= static_cast<unsigned>(z[k] >= threshold) << k;
    const int64_t first = offset + column;
    for (int i = count_below(classes, count, first); i < count && classes[i] < first + N; ++i) {
      in |= 1u << static_cast<int>(classes[i] - first);
    }
    return in;
  }
};

}  // namespace tightrope::cuda
