// row_loss_grad: statistics, coefficients and gradient of whole rows in one launch, each logit read
// from HBM once and each gradient written once.
//
// A row belongs to one block, or from compute capability 9.0 on to a cluster of up to eight blocks
// that take a run of it each. A block keeps the vectors of its run in shared memory, as they came,
// while it takes the statistics. The blocks of a cluster read each other's statistics through
// distributed shared memory, every one in the same order, so all hold the same bits and none sends
// anything back. The gradient pass then reads shared memory. What does not fit is read again: so
// soon after the first time that it comes out of L2. Where all of a row is kept, nothing of it is
// read after the first write to it, by any block: then a narrower gradient may lie in the memory of
// the logits, at the front of each row. The kernel knows no loss: it is given a row's
// upstream gradients as the small functions of the statistics in `Upstream` (row_math.h).
//
// Occupancy: 512 threads and two blocks an SM, so at most 64 registers a thread (the general
// instance and float64: one block, 128 registers). The launcher picks the smallest cluster whose
// runs leave room for two blocks in an SM's shared memory, so that one block reads while another
// writes. 48 bytes in flight a thread are 48 KiB an SM (see row_stats.cuh for what is enough).
#pragma once

#include "row_grad.cuh"
#include "row_stats.cuh"

namespace tightrope::cuda {

// Vectors in flight. With four, the instances for 16-bit logits spill on sm_80.
template <class scalar_t>
constexpr int kLossAheadOf = sizeof(scalar_t) == 8 ? 2 : 3;

template <class T>
struct LossShared {
  Part<T> warps[kLossThreads / kWarp];
  Part<T> block;  // read by the other blocks of the cluster
  Form<T> form;
};

template <class T>
TIGHTROPE_HD constexpr int loss_shared_bytes(int sparse) {
  return (static_cast<int>(sizeof(LossShared<T>)) + 15) / 16 * 16 + staged_bytes<T>(sparse);
}

#if defined(TIGHTROPE_SIMT) || (defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900)
#  define TIGHTROPE_HAS_CLUSTERS 1
#endif

// The statistics of the whole row, in the first warp of every block of its cluster. By all threads.
template <class T>
TIGHTROPE_DEVICE Part<T> cluster_reduce(const Part<T>& mine, Part<T>* block, int cluster) {
  Part<T> part = mine;
#ifdef TIGHTROPE_HAS_CLUSTERS
  if (threadIdx.x == 0) *block = mine;
  __cluster_barrier_arrive();
  __cluster_barrier_wait();
  if (threadIdx.x < kWarp) {
    part = Part<T>();
    if (static_cast<int>(threadIdx.x) < cluster) {
      part = *static_cast<const Part<T>*>(__cluster_map_shared_rank(block, threadIdx.x));
    }
    part = warp_reduce(part, true);
  }
  __cluster_barrier_arrive();  // this block has read; waited for before it may end
#endif
  return part;
}

// grid: rows * cluster blocks, clusters along x; a block takes `run` columns and keeps at most
// `kept` vectors. partial [kPartialFields, rows] and argmax [rows] are written, not merged into.
template <class scalar_t, class out_t, bool kPlain>
__global__ void __launch_bounds__(kLossThreads, kLean<scalar_t, kPlain> ? 2 : 1)
    row_loss_grad_kernel(
        const RowArgs<scalar_t> a, out_t* out, int64_t out_stride, Arithmetic<scalar_t>* partial,
        int64_t* argmax, const Arithmetic<scalar_t>* upstream, int cluster, int run, int kept) {
  using T = Arithmetic<scalar_t>;
  constexpr int kPer = kLanes<scalar_t>;
  const int64_t row = blockIdx.x / cluster;
  const int rank = blockIdx.x % cluster;
  const int begin = a.cols / run < rank ? a.cols : rank * run;
  const int end = a.cols - begin < run ? a.cols : begin + run;
  if (a.active != nullptr && !a.active[row]) {  // the same for all of the cluster
    write_zeros(out + row * out_stride + begin, end - begin);
    return;
  }
  unsigned char* memory = shared_memory();
  auto* shared = reinterpret_cast<LossShared<T>*>(memory);
  const Staged<T> staged = staged_at<T>(memory + loss_shared_bytes<T>(0), a.sparse());
  auto* store = reinterpret_cast<Vector*>(memory + loss_shared_bytes<T>(a.sparse()));

  const scalar_t* start = a.logits + row * a.stride + begin;
  const Span<scalar_t> span(start, end - begin);
  const T* dense = a.dense == nullptr ? nullptr : a.dense + row * a.dense_stride;
  scalar_t edge{};
  if (static_cast<int>(threadIdx.x) < span.edges()) {
    edge = load_one(start + span.edge_column(threadIdx.x));
  }
  stage_sparse<kPlain>(a, row, begin, end, staged);
  Part<T> part = sweep<kPlain, kLossAheadOf<scalar_t>>(
      a, start, begin, span, dense, edge, [=](int v, const Vector& raw) {
        if (v < kept) store[v] = raw;
      });
  part = block_reduce(part, !kPlain && dense != nullptr, shared->warps);
  if (threadIdx.x < kWarp) add_sparse(a, row, staged, part.sums);
  if (cluster > 1) part = cluster_reduce(part, &shared->block, cluster);
  if (threadIdx.x == 0) {
    const Summary<T> summary = summarise(part.sums, a.index != nullptr);
    const auto value = [&](int k) { return upstream[k * a.rows + row]; };
    const Upstream<T> up{value(0), value(1), value(2), value(3), value(4), value(5),
                         value(6), value(7), value(8), value(9), value(10)};
    shared->form = {
        summary.max, summary.log_sum, coefficients(summary, up, static_cast<T>(a.cols))};
    if (rank == 0) {
      store_sums(part.sums, partial, a.rows, row);
      argmax[row] = part.best == kNowhere ? int64_t(-1) : static_cast<int64_t>(part.best);
    }
  }
  __syncthreads();
  const Form<T> form = shared->form;
  const scalar_t* body = start + span.head;
  out_t* out_row = out + row * out_stride;
  // A thread reads the vectors that it kept itself. Shared memory is near: two at a time are
  // enough.
  write_gradients<kPlain, 2>(a, form, begin, span, dense, edge, out_row + begin, [=](int v) {
    return v < kept ? store[v] : load_vector(body + int64_t(v) * kPer);
  });
  if (a.sparse() > 0) {
    __syncthreads();  // after the other entries
    write_sparse<kPlain>(a, form, row, staged, out_row);
  }
#ifdef TIGHTROPE_HAS_CLUSTERS
  if (cluster > 1) __cluster_barrier_wait();  // no other block still reads this one's statistics
#endif
}

}  // namespace tightrope::cuda
