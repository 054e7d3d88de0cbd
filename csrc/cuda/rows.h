// What a caller of the CUDA row kernels sees: arguments, launch plans and launchers, in plain C++.
//
// Free of CUDA and torch headers, so that the bindings compile without nvcc's front end, the
// kernels without torch, and the tests without either. The launchers are defined in launch.cuh,
// once per storage type. The plans are here because the caller allocates what they ask for; they
// depend on shapes and the device alone, so the order of every sum does too.
#pragma once

#include <algorithm>
#include <cstdint>

#include "../row_math.h"

struct CUstream_st;

namespace tightrope::cuda {

// bfloat16 and float16 as they lie in memory; layout-compatible with PyTorch's types.
struct bf16 {
  uint16_t bits;
};
struct fp16 {
  uint16_t bits;
};

// The dtype of statistics, coefficients and reductions.
template <class scalar_t>
struct ArithmeticOf {
  using type = float;
};
template <>
struct ArithmeticOf<double> {
  using type = double;
};
template <class scalar_t>
using Arithmetic = typename ArithmeticOf<scalar_t>::type;

constexpr int kWarp = 32;
constexpr int kVectorBytes = 16;
template <class scalar_t>
constexpr int kLanes = kVectorBytes / static_cast<int>(sizeof(scalar_t));

constexpr int kStatsThreads = 256;
constexpr int kGradThreads = 256;
constexpr int kLossThreads = 512;
constexpr int kMaxSplits = kWarp;  // the second stage of row_stats is one warp a row
constexpr int kMaxCluster = 8;     // the largest portable size
// Entries of a top-k target: their logits are staged in shared memory, at most 12 bytes each.
constexpr int kMaxTopk = 2048;

// Arguments of every row kernel. The contract is at the top of tightrope/backends/ops.py.
template <class scalar_t>
struct RowArgs {
  using T = Arithmetic<scalar_t>;
  const scalar_t* logits;  // [rows, cols], row stride `stride`
  int64_t stride;
  int64_t rows;
  int cols;
  int64_t offset;
  const T* bias;  // [cols] or null
  T logit_scale;
  T softcap, inverse_softcap;  // 0: none
  const int64_t* index;        // [rows] or null
  const T* dense;              // [rows, cols], row stride dense_stride, or null
  int64_t dense_stride;
  const int64_t* topk_index;  // [rows, topk] or null
  const T* topk_prob;         // [rows, topk]
  int topk;
  const bool* active;  // [rows] or null

  bool raw_are_logits() const { return bias == nullptr && logit_scale == T(1) && softcap == T(0); }
  // Whether the kernels' lean instance serves: raw values are logits, and targets are sparse.
  bool plain() const { return raw_are_logits() && dense == nullptr; }
  TIGHTROPE_HD int sparse() const { return index != nullptr ? 1 : topk; }
};

// Where the statistics of a tile go.
template <class T>
struct StatsOut {
  T* partial;             // [kPartialFields, rows], merged into
  int64_t* argmax;        // [rows], merged into
  T* split_partial;       // [splits, kPartialFields, rows] where a row is cut, else null
  int64_t* split_argmax;  // [splits, rows]: column in the tile, or -1
};

// Which entries of a row are in its set: of one kind, or none.
template <class T>
struct SideArgs {
  const T* threshold;      // [rows] or null: logits of at least this
  const int64_t* classes;  // [rows, listed] or null, ascending, from the start of the vocabulary
  int listed;

  TIGHTROPE_HD bool given() const { return threshold != nullptr || classes != nullptr; }
};

// Where the sides of a tile go.
template <class T>
struct SidesOut {
  T* sides;        // [kSideFields, rows], merged into
  T* split_sides;  // [splits, kSideFields, rows] where a row is cut, else null
};

// What a plan has to know of a device.
struct Device {
  int sms;
  int shared_per_sm;     // bytes
  int shared_per_block;  // bytes, at most, after opting in
  bool clusters;         // compute capability 9.0 on, and code made for it
};

struct Runs {
  int threads;  // a block
  int count;    // blocks a row
  int columns;  // of each but the last, a multiple of 256
};

// Enough warps for the columns, and no more.
inline int fitting_threads(int columns, int lanes, int most) {
  const int warps = (columns + kWarp * lanes - 1) / (kWarp * lanes);
  return std::clamp(warps * kWarp, 4 * kWarp, most);
}

// A row is cut into at most `most` runs of at least `least` columns, as many as `wanted` asks for.
inline Runs cut(int cols, int64_t wanted, int least, int most, int lanes, int threads) {
  const int64_t useful = std::max(1, cols / least);
  const int64_t count = std::clamp<int64_t>(std::min(wanted, useful), 1, most);
  int columns = static_cast<int>((cols + count - 1) / count);
  columns = (columns + 255) / 256 * 256;
  return {fitting_threads(columns, lanes, threads), (cols + columns - 1) / columns, columns};
}

// row_stats and row_sides: a row is cut only where rows alone would leave the device half empty.
template <class scalar_t>
Runs plan_stats(int64_t rows, int cols, const Device& device) {
  const int64_t wanted = (4 * device.sms + rows - 1) / rows;
  constexpr int kLanesHere = kLanes<scalar_t>;
  return cut(cols, wanted, 4 * kStatsThreads * kLanesHere, kMaxSplits, kLanesHere, kStatsThreads);
}

// row_grad: runs of about four steps of a block; there is nothing to merge.
template <class scalar_t>
Runs plan_grad(int cols) {
  constexpr int kLanesHere = kLanes<scalar_t>, kStep = 4 * kGradThreads * kLanesHere;
  return cut(cols, (cols + 4 * kStep - 1) / (4 * kStep), kStep, 65535, kLanesHere, kGradThreads);
}

struct LossPlan {
  Runs runs;   // count: blocks of a cluster, a power of two
  int kept;    // vectors that a block keeps in shared memory
  int shared;  // bytes of shared memory of a block
  bool whole;  // all of them are kept
};

// row_loss_grad. fixed: bytes of shared memory beside the vectors. A block may use half of an SM's,
// so that two fit; where even the largest cluster needs more, all that a block can have.
template <class scalar_t>
LossPlan plan_loss(int64_t rows, int cols, int fixed, const Device& device) {
  constexpr int kLanesHere = kLanes<scalar_t>,
                kReserved = 1024;  // what the system takes for each block
  const int most = device.clusters ? kMaxCluster : 1;
  const int half = std::min(device.shared_per_sm / 2 - kReserved, device.shared_per_block);
  const auto vectors = [&](int cluster) {
    const int columns = ((cols + cluster - 1) / cluster + 255) / 256 * 256;
    return std::min(columns, cols) / kLanesHere;
  };
  int cluster = 1;
  while (cluster < most && fixed + int64_t(vectors(cluster)) * kVectorBytes > half) cluster *= 2;
  // Few rows: spread each over more blocks, as long as every thread has a step's worth to do.
  while (cluster < most && rows * cluster * 2 <= device.sms &&
         cols / (cluster * 2) >= 4 * kLossThreads * kLanesHere) {
    cluster *= 2;
  }
  const bool fits = fixed + int64_t(vectors(cluster)) * kVectorBytes <= half;
  const int room = std::max(0, (fits ? half : device.shared_per_block) - fixed) / kVectorBytes;
  const int kept = std::min(room, vectors(cluster));
  const int columns = ((cols + cluster - 1) / cluster + 255) / 256 * 256;
  const int threads = fitting_threads(columns, kLanesHere, kLossThreads);
  return {{threads, cluster, columns}, kept, fixed + kept * kVectorBytes, kept == vectors(cluster)};
}

// Whether row_loss_grad is the better way for whole rows than row_stats and row_grad. It must read
// each logit once: a row that is read again, so long after the first time that an L2 of the
// device's size has lost most of it, gains nothing. And it moves two bytes at least where the
// others move three, so it must keep two thirds of the processors busy that row_stats would, which
// cuts few rows into more runs than a cluster has blocks.
template <class scalar_t>
bool fuses(int64_t rows, int cols, int fixed, const Device& device) {
  const LossPlan plan = plan_loss<scalar_t>(rows, cols, fixed, device);
  const auto busy = [&](int runs) { return std::min<int64_t>(device.sms, rows * runs); };
  const int apart = plan_stats<scalar_t>(rows, cols, device).count;
  return plan.whole && 3 * busy(plan.runs.count) >= 2 * busy(apart);
}

// The launchers: on the current device, in `stream`; the result is a cudaError_t. rows and cols are
// positive. `out` may be the logits.
template <class scalar_t>
int row_stats(
    const RowArgs<scalar_t>& args, const StatsOut<Arithmetic<scalar_t>>& out, const Runs& runs,
    CUstream_st* stream);

// By plan_stats. Targets are not looked at.
template <class scalar_t>
int row_sides(
    const RowArgs<scalar_t>& args, const SideArgs<Arithmetic<scalar_t>>& which,
    const SidesOut<Arithmetic<scalar_t>>& out, const Runs& runs, CUstream_st* stream);

// norm [2, rows], coef [kCoefficients, rows]; with a set [4, rows] and [2 kCoefficients, rows],
// those of the rest first. out_t: scalar_t, or for float also bf16 and fp16; then `out` may not
// share the memory of the logits.
template <class scalar_t, class out_t>
int row_grad(
    const RowArgs<scalar_t>& args, const SideArgs<Arithmetic<scalar_t>>& which, out_t* out,
    int64_t out_stride, const Arithmetic<scalar_t>* norm, const Arithmetic<scalar_t>* coef,
    const Runs& runs, CUstream_st* stream);

// Bytes of shared memory of row_loss_grad beside the vectors that it keeps.
template <class scalar_t>
int loss_fixed_bytes(int sparse);

// Whether the code that the current device runs was made for clusters: a build for 8.0 that a newer
// GPU translates was not, whatever the GPU can do.
template <class scalar_t>
bool loss_has_clusters();

// upstream [kUpstreamFields, rows]; partial [kPartialFields, rows] and argmax [rows] are written.
// out_t: as in row_grad; but under a plan that keeps whole rows, narrower gradients of a row may
// lie at the front of its logits.
template <class scalar_t, class out_t>
int row_loss_grad(
    const RowArgs<scalar_t>& args, out_t* out, int64_t out_stride, Arithmetic<scalar_t>* partial,
    int64_t* argmax, const Arithmetic<scalar_t>* upstream, const LossPlan& plan,
    CUstream_st* stream);

}  // namespace tightrope::cuda
