// Runs CUDA kernels on a CPU, from the very sources that nvcc compiles, so that tests need no GPU.
//
// A thread is a ucontext fibre. Fibres run one at a time, each until it waits for others: at a
// barrier, a shuffle or a cluster barrier. The threads of a block, and the blocks of a cluster,
// exist together; the clusters of a grid follow one another. What it checks that a GPU would not:
//   - a barrier or shuffle that not every thread reaches, or that threads reach at different
//   places, aborts
//     with those places named;
//   - `options.seed` chooses who runs next at random, so that a result that depends on the order of
//   threads
//     (a missing barrier) changes with the seed; seed 0 runs threads in ascending order;
//   - `options.skip_barrier` leaves out one barrier, so that a test can see that this is noticed;
//   - shared memory is NaN bits before a block starts and after it ends, and has its exact size, so
//   that
//     AddressSanitizer sees an access past its end.
// Only what the kernels of csrc/cuda use is here. Compile with -fno-strict-aliasing.
#pragma once

#define TIGHTROPE_SIMT 1

#include <ucontext.h>

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <new>
#include <random>
#include <source_location>
#include <vector>

#if defined(__SANITIZE_ADDRESS__)
#  include <sanitizer/asan_interface.h>
#  include <sanitizer/common_interface_defs.h>
#endif

#define __global__
#define __device__
#define __forceinline__ inline
#define __launch_bounds__(...)

namespace simt {

struct Dim {
  unsigned x = 1, y = 1, z = 1;
};
struct Options {
  unsigned seed = 0;
  int skip_barrier = -1;  // leave out each thread's barrier number n
};
struct Traffic {
  int64_t read = 0, written = 0;  // bytes of logits and gradients in global memory
};
inline Options options;
inline Traffic traffic;

constexpr unsigned kLanes = 32;
constexpr size_t kStackBytes = 128 << 10;
using Place = std::source_location;

struct Warp {
  uint64_t slot[2][kLanes];
  unsigned arrived = 0;
  Place places[kLanes];
};

struct Thread;

struct Block {
  Dim index;
  std::vector<Warp> warps;
  unsigned arrived = 0, ended = 0;
  unsigned char* shared = nullptr;
  size_t shared_bytes = 0;
};

struct Thread {
  ucontext_t context;
  Block* block = nullptr;
  unsigned number = 0;
  enum { kReady, kBarrier, kShuffle, kCluster, kEnded } state = kReady;
  Place place;
  int barriers = 0;
  unsigned shuffles = 0;
  bool arrived_at_cluster = false;
  uint64_t cluster_phase = 0;
};

struct Machine {
  ucontext_t scheduler;
  std::vector<std::unique_ptr<unsigned char[]>> stacks;
  std::vector<Thread> threads;
  std::vector<Block> blocks;
  std::vector<Thread*> ready;
  const std::function<void()>* body = nullptr;
  Thread* current = nullptr;
  unsigned block_threads = 0, cluster_arrived = 0;
  uint64_t cluster_phase = 0;
  const void* scheduler_stack = nullptr;
  size_t scheduler_stack_bytes = 0;
};
inline Machine machine;

inline Dim thread_index, block_index, block_dim, grid_dim;

[[noreturn]] inline void fail(const char* what, const Place& a, const Place& b) {
  std::fprintf(
      stderr, "simt: %s: %s:%u and %s:%u\n", what, a.file_name(), unsigned(a.line()), b.file_name(),
      unsigned(b.line()));
  std::abort();
}

// AddressSanitizer has to be told when the stack changes.
inline void switch_context(ucontext_t* from, ucontext_t* to, [[maybe_unused]] bool last = false) {
#if defined(__SANITIZE_ADDRESS__)
  const bool to_scheduler = to == &machine.scheduler;
  const void* bottom = to_scheduler ? machine.scheduler_stack : to->uc_stack.ss_sp;
  const size_t size = to_scheduler ? machine.scheduler_stack_bytes : to->uc_stack.ss_size;
  void* fake = nullptr;
  __sanitizer_start_switch_fiber(last ? nullptr : &fake, bottom, size);
  swapcontext(from, to);
  __sanitizer_finish_switch_fiber(
      fake, from == &machine.scheduler ? nullptr : &machine.scheduler_stack,
      from == &machine.scheduler ? nullptr : &machine.scheduler_stack_bytes);
#else
  swapcontext(from, to);
#endif
}

// Gives way to other threads until someone makes this one ready again.
inline void park(decltype(Thread::state) state, const Place& place) {
  Thread* me = machine.current;
  me->state = state;
  me->place = place;
  switch_context(&me->context, &machine.scheduler);
}

inline void wake(Thread& thread) {
  thread.state = Thread::kReady;
  machine.ready.push_back(&thread);
}

inline Thread& thread_of(const Block& block, unsigned number) {
  return machine.threads[(&block - machine.blocks.data()) * machine.block_threads + number];
}

inline void barrier(const Place& place) {
  Thread* me = machine.current;
  if (me->barriers++ == options.skip_barrier) return;
  Block& block = *me->block;
  if (++block.arrived < machine.block_threads) return park(Thread::kBarrier, place);
  block.arrived = 0;
  for (unsigned i = 0; i < machine.block_threads; ++i) {
    Thread& other = thread_of(block, i);
    if (&other == me) continue;
    if (other.place.line() != place.line()) fail("divergent barrier", other.place, place);
    wake(other);
  }
}

// Every lane of the warp gives a value; the result is the value of `source`.
template <class T>
T exchange(T value, unsigned source, const Place& place) {
  static_assert(sizeof(T) <= sizeof(uint64_t));
  Thread* me = machine.current;
  const unsigned lane = me->number % kLanes;
  Warp& warp = me->block->warps[me->number / kLanes];
  // Two sets of slots in turn: a lane that runs ahead writes the other set.
  auto& slot = warp.slot[me->shuffles++ % 2];
  std::memcpy(&slot[lane], &value, sizeof(T));
  warp.places[lane] = place;
  if (++warp.arrived < kLanes) {
    park(Thread::kShuffle, place);
  } else {
    warp.arrived = 0;
    for (unsigned i = 0; i < kLanes; ++i) {
      if (warp.places[i].line() != place.line()) fail("divergent shuffle", warp.places[i], place);
      if (i != lane) wake(thread_of(*me->block, me->number - lane + i));
    }
  }
  T out;
  std::memcpy(&out, &slot[source], sizeof(T));
  return out;
}

inline void cluster_arrive(const Place& place) {
  Thread* me = machine.current;
  if (me->arrived_at_cluster) fail("second arrival at a cluster barrier", me->place, place);
  me->arrived_at_cluster = true;
  me->cluster_phase = machine.cluster_phase;
  if (++machine.cluster_arrived < machine.threads.size()) return;
  machine.cluster_arrived = 0;
  ++machine.cluster_phase;
  for (Thread& other : machine.threads) {
    if (other.state == Thread::kCluster) wake(other);
  }
}

inline void cluster_wait(const Place& place) {
  Thread* me = machine.current;
  if (!me->arrived_at_cluster) fail("wait without arrival at a cluster barrier", me->place, place);
  if (me->cluster_phase == machine.cluster_phase) park(Thread::kCluster, place);
  me->arrived_at_cluster = false;
}

inline void* map_shared(const void* mine, unsigned rank) {
  const Block& block = *machine.current->block;
  const size_t offset = static_cast<const unsigned char*>(mine) - block.shared;
  if (rank >= machine.blocks.size() || offset >= block.shared_bytes) std::abort();
  return machine.blocks[rank].shared + offset;
}

inline void run_thread() {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(
      nullptr, &machine.scheduler_stack, &machine.scheduler_stack_bytes);
#endif
  (*machine.body)();
  Thread* me = machine.current;
  me->state = Thread::kEnded;
  Block& block = *me->block;
  if (++block.ended == machine.block_threads) std::memset(block.shared, 0xff, block.shared_bytes);
  switch_context(&me->context, &machine.scheduler, true);
}

inline void run_cluster() {
  std::mt19937 random(options.seed);
  while (!machine.ready.empty()) {
    // Waiting threads go to the end of the queue; seed 0 takes them in turn.
    const size_t pick = options.seed == 0 ? 0 : random() % machine.ready.size();
    Thread* next = machine.ready[pick];
    if (options.seed == 0) {
      machine.ready.erase(machine.ready.begin());
    } else {
      machine.ready[pick] = machine.ready.back();
      machine.ready.pop_back();
    }
    machine.current = next;
    thread_index = {next->number, 0, 0};
    block_index = next->block->index;
    switch_context(&machine.scheduler, &next->context);
  }
  const Thread* stuck = nullptr;
  for (const Thread& thread : machine.threads) {
    if (thread.state != Thread::kEnded) stuck = &thread;
  }
  if (stuck == nullptr) return;
  for (const Thread& thread : machine.threads) {
    if (thread.state != stuck->state || thread.place.line() != stuck->place.line()) {
      fail("divergent barrier: threads wait that others never reach", stuck->place, thread.place);
    }
  }
  fail("threads wait for ever", stuck->place, stuck->place);
}

// Runs body() for every thread of a grid. grid.x must be a multiple of the cluster size.
inline void launch(
    Dim grid, unsigned threads, unsigned cluster, size_t shared, std::function<void()> body) {
  if (threads % kLanes != 0 || cluster == 0 || grid.x % cluster != 0) std::abort();
  machine.body = &body;
  machine.block_threads = threads;
  block_dim = {threads, 1, 1};
  grid_dim = grid;
  while (machine.stacks.size() < size_t(threads) * cluster) {
    machine.stacks.push_back(std::make_unique_for_overwrite<unsigned char[]>(kStackBytes));
  }
  for (unsigned y = 0; y < grid.y; ++y) {
    for (unsigned x = 0; x < grid.x; x += cluster) {
      machine.blocks = std::vector<Block>(cluster);
      machine.threads = std::vector<Thread>(size_t(threads) * cluster);
      machine.cluster_arrived = 0;
      for (unsigned b = 0; b < cluster; ++b) {
        Block& block = machine.blocks[b];
        block.index = {x + b, y, 0};
        block.warps = std::vector<Warp>(threads / kLanes);
        block.shared_bytes = shared;
        block.shared = static_cast<unsigned char*>(::operator new(shared, std::align_val_t(16)));
        std::memset(block.shared, 0xff, shared);
      }
      for (size_t i = 0; i < machine.threads.size(); ++i) {
        Thread& thread = machine.threads[i];
        thread.block = &machine.blocks[i / threads];
        thread.number = static_cast<unsigned>(i % threads);
        getcontext(&thread.context);
        thread.context.uc_stack.ss_sp = machine.stacks[i].get();
        thread.context.uc_stack.ss_size = kStackBytes;
        thread.context.uc_link = nullptr;
#if defined(__SANITIZE_ADDRESS__)
        __asan_unpoison_memory_region(machine.stacks[i].get(), kStackBytes);
#endif
        makecontext(&thread.context, run_thread, 0);
        wake(thread);
      }
      run_cluster();
      for (Block& block : machine.blocks) ::operator delete(block.shared, std::align_val_t(16));
    }
  }
}

}  // namespace simt

#define threadIdx simt::thread_index
#define blockIdx simt::block_index
#define blockDim simt::block_dim
#define gridDim simt::grid_dim

inline void __syncthreads(simt::Place place = simt::Place::current()) {
  simt::barrier(place);
}

template <class T>
T __shfl_xor_sync(unsigned mask, T value, int lanes, simt::Place place = simt::Place::current()) {
  if (mask != 0xffffffffu) std::abort();
  return simt::exchange(value, (simt::machine.current->number % simt::kLanes) ^ lanes, place);
}

inline void __cluster_barrier_arrive(simt::Place place = simt::Place::current()) {
  simt::cluster_arrive(place);
}
inline void __cluster_barrier_wait(simt::Place place = simt::Place::current()) {
  simt::cluster_wait(place);
}
inline void* __cluster_map_shared_rank(const void* p, unsigned rank) {
  return simt::map_shared(p, rank);
}
