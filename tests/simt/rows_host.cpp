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
  int64_t dtype, out_dtype;  // 0: bfloat16, 1: float16, 2: float32, 3: float64
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
  void* threshold;
  int64_t* classes;
  int64_t listed;
  void* sides;
  int64_t read, written, runs, kept, shared, fuses;  // results
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
LossPlan loss_plan(Call& c) {
  const Device device{int(c.sms), int(c.shared_per_sm), int(c.shared_per_block), c.clusters != 0};
  const int sparse = c.index != nullptr ? 1 : static_cast<int>(c.topk);
  LossPlan plan =
      plan_loss<scalar_t>(c.rows, int(c.cols), loss_fixed_bytes<scalar_t>(sparse), device);
  c.runs = plan.runs.count;
  c.kept = plan.kept;
  c.shared = plan.shared;
  c.fuses =
      fuses<scalar_t>(c.rows, int(c.cols), loss_fixed_bytes<scalar_t>(sparse), device) ? 1 : 0;
  return plan;
}

template <class scalar_t, class out_t>
void run(int kernel, Call& c) {
  using T = Arithmetic<scalar_t>;
  const Device device{int(c.sms), int(c.shared_per_sm), int(c.shared_per_block), c.clusters != 0};
  const RowArgs<scalar_t> args = arguments<scalar_t>(c);
  const SideArgs<T> which{
      static_cast<const T*>(c.threshold), c.classes, static_cast<int>(c.listed)};
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
        args, which, static_cast<out_t*>(c.out), c.out_stride, static_cast<const T*>(c.norm),
        static_cast<const T*>(c.coef), runs, nullptr);
  } else if (kernel == 3) {
    Runs runs = plan_stats<scalar_t>(c.rows, args.cols, device);
    limit(runs);
    std::vector<T> split(runs.count > 1 ? runs.count * kSideFields * c.rows : 0);
    row_sides(args, which, SidesOut<T>{static_cast<T*>(c.sides), split.data()}, runs, nullptr);
  } else {
    LossPlan plan = loss_plan<scalar_t>(c);
    limit(plan.runs);
    row_loss_grad(
        args, static_cast<out_t*>(c.out), c.out_stride, static_cast<T*>(c.partial), c.argmax,
        static_cast<const T*>(c.upstream), plan, nullptr);
  }
}

template <class scalar_t>
void run(int kernel, Call& c) {
  if constexpr (std::is_same_v<scalar_t, float>) {
    if (c.out_dtype == 0) return run<float, bf16>(kernel, c);
    if (c.out_dtype == 1) return run<float, fp16>(kernel, c);
  }
  run<scalar_t, scalar_t>(kernel, c);
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

extern "C" void simt_plan_loss(Call* call) {
  switch (call->dtype) {
    case 0:
      loss_plan<bf16>(*call);
      break;
    case 1:
      loss_plan<fp16>(*call);
      break;
    case 2:
      loss_plan<float>(*call);
      break;
    default:
      loss_plan<double>(*call);
  }
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

#ifdef SANITIZE

// A heap buffer of exactly n elements, filled with small numbers.
template <class U>
struct Buffer {
  explicit Buffer(int64_t n) : data(new U[n]) {
    for (int64_t i = 0; i < n; ++i) {
      const double x = double(i * 7919 % 1009) / 256 - 2;
      if constexpr (sizeof(U) == 2) {
        data[i] =
            static_cast<U>(i * 7919 % 0x3c00);  // positive and finite, as bfloat16 and as float16
      } else {
        data[i] = static_cast<U>(x);
      }
    }
  }
  ~Buffer() { delete[] data; }
  U* data;
};

template <class scalar_t, class Bits, class OutBits = Bits>
int exercise(int dtype, bool overrun, int out_dtype) {
  using T = Arithmetic<scalar_t>;
  constexpr int64_t kRows = 2, kTopk = 3, kListed = 5;
  int runs = 0;
  for (const int64_t cols : {1, 2, 7, 8, 9, 31, 64, 257, 1023, 2500}) {
    for (int variant = 0; variant < 4; ++variant) {
      const int64_t lead = (variant * 3 + cols) % 8, stride = cols + variant;
      const int64_t size = lead + stride + cols - (overrun ? 1 : 0);
      Buffer<Bits> logits(size);
      Buffer<OutBits> out(size);
      Buffer<T> bias(cols), dense(kRows * cols), prob(kRows * kTopk);
      Buffer<T> upstream(kUpstreamFields * kRows), partial(kPartialFields * kRows);
      Buffer<T> sides(kSideFields * kRows), threshold(kRows);
      Buffer<int64_t> classes(kRows * kListed);
      Buffer<int64_t> argmax(kRows), index(kRows), topk(kRows * kTopk);
      Buffer<unsigned char> active(kRows);
      for (int i = 0; i < kRows; ++i) index.data[i] = (cols - 1) * i, active.data[i] = 1;
      for (int i = 0; i < kRows * kTopk; ++i) topk.data[i] = i % cols;
      // Ascending; the first of each row is outside of the vocabulary, and so may the last be.
      for (int i = 0; i < kRows * kListed; ++i) classes.data[i] = i % kListed * (cols / 4 + 1) - 1;
      active.data[0] = variant != 1;
      for (int kernel = 0; kernel < 4; ++kernel) {
        // Sets: in half of the variants listed, by a threshold in a quarter, and none (kernel 3
        // then takes all for the rest); as many norms and coefficients as there are sides.
        const bool listed = variant % 2 == 1, above = variant == 2 && cols % 2 == 0;
        const int64_t two = listed || above ? 2 : 1;
        Buffer<T> norm(2 * two * kRows), coef(kCoefficients * two * kRows);
        for (int f = 0; f < kSideFields * kRows; ++f) sides.data[f] = T(0);
        for (int f = 0; f < kPartialFields * kRows; ++f) partial.data[f] = T(0);
        Call c{};
        c.dtype = dtype;
        c.out_dtype = out_dtype;
        c.seed = variant;
        c.skip_barrier = -1;
        c.sms = variant % 2 == 0 ? 1 : 400;
        c.shared_per_sm = variant == 3 ? 4096 : 65536;
        c.shared_per_block = c.shared_per_sm - 1024;
        c.clusters = variant % 2;
        c.threads = 128;
        c.logits = logits.data + lead;
        c.stride = c.out_stride = stride;
        c.rows = kRows;
        c.cols = cols;
        c.logit_scale = 1;
        c.out = out.data + lead;
        // In place; a narrower gradient at the front of each row, where the row is kept.
        if (variant == 2 && (kernel == 2 || sizeof(Bits) == sizeof(OutBits))) {
          c.out = logits.data + lead;
          c.out_stride = stride * int64_t(sizeof(Bits) / sizeof(OutBits));
        }
        c.norm = norm.data;
        c.coef = coef.data;
        c.upstream = upstream.data;
        c.partial = partial.data;
        c.argmax = argmax.data;
        c.sides = sides.data;
        if (above) c.threshold = threshold.data;
        if (listed) c.classes = classes.data, c.listed = kListed;
        c.active = reinterpret_cast<bool*>(active.data);
        const int kind = (variant + kernel) % 4;
        if (kind == 1) c.index = index.data;
        if (kind == 2)
          c.dense = dense.data, c.dense_stride = cols, c.bias = bias.data, c.softcap = 5;
        if (kind == 3) c.topk_index = topk.data, c.topk_prob = prob.data, c.topk = kTopk;
        simt_run(kernel, &c);
        ++runs;
      }
    }
  }
  return runs;
}

int main(int argc, char**) {
  const bool overrun = argc > 1;  // one entry too few: the sanitizer must see it
  int runs = exercise<bf16, uint16_t>(0, overrun, 0) + exercise<fp16, uint16_t>(1, overrun, 1);
  runs += exercise<float, float>(2, overrun, 2) + exercise<double, double>(3, overrun, 3);
  runs += exercise<float, float, uint16_t>(2, overrun, 0);
  runs += exercise<float, float, uint16_t>(2, overrun, 1);
  std::printf("%d kernels ran\n", runs);
  return 0;
}

#endif
