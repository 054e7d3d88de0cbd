// The CUDA row kernels on the CPU, for the tests: as a library for tests/simt_rows.py, and with
// -DSANITIZE as a program that runs them over buffers of exact size, for AddressSanitizer and
// UndefinedBehaviorSanitizer.
#include "simt.h"
// After simt.h, which stands in for CUDA.
#include "../../csrc/cuda/launch.cuh"

using namespace tightrope;
using namespace tightrope::cuda;

// Mirrored by `Call` in tests/simt_rows.py.
struct Call {
  int64_t dtype;  // 0: bfloat16, 1: float16, 2: float32, 3: float64
  int64_t seed, skip_barrier;
  int64_t sms, shared_per_sm, shared_per_block, clusters;
  int64_t threads;  // at most; 0: as planned
  void* logits;
  int64_t stride, rows, cols, offset;
  void* bias;
  double logit_scale, softcap;
  int64_t* index;
  void* dense;
  int64_t dense_stride;
  int64_t* topk_index;
  void* topk_prob;
  int64_t topk;
  bool* active;
  void* out;
  int64_t out_stride;
  void *norm, *coef, *upstream, *partial;
  int64_t* argmax;
  int64_t read, written, runs, kept;  // results
};

template <class scalar_t>
RowArgs<scalar_t> arguments(const Call& c) {
  using T = Arithmetic<scalar_t>;
  const auto pointer = [](void* p) { return static_cast<T*>(p); };
  return {
      static_cast<const scalar_t*>(c.logits),
      c.stride,
      c.rows,
      static_cast<int>(c.cols),
      c.offset,
      pointer(c.bias),
      static_cast<T>(c.logit_scale),
      static_cast<T>(c.softcap),
      c.softcap == 0 ? T(0) : T(1) / static_cast<T>(c.softcap),
      c.index,
      pointer(c.dense),
      c.dense_stride,
      c.topk_index,
      pointer(c.topk_prob),
      static_cast<int>(c.topk),
      c.active};
}

template <class scalar_t>
void run(int kernel, Call& c) {
  using T = Arithmetic<scalar_t>;
  const Device device{int(c.sms), int(c.shared_per_sm), int(c.shared_per_block), c.clusters != 0};
  const RowArgs<scalar_t> args = arguments<scalar_t>(c);
  const auto limit = [&](Runs& runs) {
    if (c.threads != 0) runs.threads = std::min(runs.threads, static_cast<int>(c.threads));
    c.runs = runs.count;
  };
  if (kernel == 0) {
    Runs runs = plan_stats<scalar_t>(c.rows, args.cols, device);
    limit(runs);
    std::vector<T> split(runs.count > 1 ? runs.count * kPartialFields * c.rows : 0);
    std::vector<int64_t> best(runs.count > 1 ? runs.count * c.rows : 0);
    const StatsOut<T> out{static_cast<T*>(c.partial), c.argmax, split.data(), best.data()};
    row_stats(args, out, runs, nullptr);
  } else if (kernel == 1) {
    Runs runs = plan_grad<scalar_t>(args.cols);
    limit(runs);
    row_grad(
        args, static_cast<scalar_t*>(c.out), c.out_stride, static_cast<const T*>(c.norm),
        static_cast<const T*>(c.coef), runs, nullptr);
  } else {
    LossPlan plan =
        plan_loss<scalar_t>(c.rows, args.cols, loss_fixed_bytes<scalar_t>(args.sparse()), device);
    limit(plan.runs);
    c.kept = plan.kept;
    row_loss_grad(
        args, static_cast<scalar_t*>(c.out), c.out_stride, static_cast<T*>(c.partial), c.argmax,
        static_cast<const T*>(c.upstream), plan, nullptr);
  }
}

extern "C" void simt_run(int kernel, Call* call) {
  simt::options = {static_cast<unsigned>(call->seed), static_cast<int>(call->skip_barrier)};
  simt::traffic = {};
  switch (call->dtype) {
    case 0:
      run<bf16>(kernel, *call);
      break;
    case 1:
      run<fp16>(kernel, *call);
      break;
    case 2:
      run<float>(kernel, *call);
      break;
    default:
      run<double>(kernel, *call);
  }
  call->read = simt::traffic.read;
  call->written = simt::traffic.written;
}

// What a divergent barrier looks like, for the test of the check itself.
extern "C" void simt_diverge(int how) {
  simt::launch({1, 1, 1}, 64, 1, 16, [how] {
    if (how == 0 && threadIdx.x == 3) return;
    if (how == 1 && threadIdx.x == 3) {
      __syncthreads();
      return;
    }
    if (how == 2 && threadIdx.x < 32 && threadIdx.x != 3) {
      __shfl_xor_sync(0xffffffffu, 1.0f, 1);
    }
    __syncthreads();
  });
}
