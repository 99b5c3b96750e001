// The functions that XLA calls, for the variant of the loops that this process has chosen, and their threads.

#include <atomic>
#include <cstring>
#include <functional>
#include <memory>
#include <thread>
#include <utility>
#include <vector>

#if defined(__x86_64__)
#include <cpuid.h>
#endif

#include "loops.h"
#include "xla/ffi/api/ffi.h"

namespace ffi = xla::ffi;

namespace seqjax {

struct Barrier {
  std::atomic<int> arrived{0}, round{0};
  void wait(int parts) {
    if (parts == 1) return;
    const int mine = round.load(std::memory_order_relaxed);
    if (arrived.fetch_add(1, std::memory_order_acq_rel) + 1 == parts) {
      arrived.store(0, std::memory_order_relaxed);
      round.store(mine + 1, std::memory_order_release);
      return;
    }
    for (int spins = 0; round.load(std::memory_order_acquire) == mine; ++spins)
      if (spins > 4000) std::this_thread::yield();
  }
};

#if defined(__x86_64__)
extern const Loops x86_64_v2, x86_64_v3, x86_64_v4;
#elif defined(__aarch64__)
extern const Loops neon;
#endif

namespace {

struct Variant {
  const char* name;
  const Loops* loops;
  bool is_supported;
};

#if defined(__x86_64__)
// By cpuid itself and not by __builtin_cpu_supports, which needs a runtime that not every compiler brings.
struct Processor {
  unsigned leaf_1 = 0, leaf_7 = 0, states = 0;
  Processor() {
    unsigned a, b, c, d;
    if (__get_cpuid(1, &a, &b, &c, &d)) leaf_1 = c;
    if (__get_cpuid_count(7, 0, &a, &b, &c, &d)) leaf_7 = b;
    // Which registers the operating system saves.
    if (leaf_1 & bit_OSXSAVE) asm volatile("xgetbv" : "=a"(states), "=d"(d) : "c"(0));
  }
  bool has(unsigned of_leaf_1, unsigned of_leaf_7, unsigned of_states) const {
    return (leaf_1 & of_leaf_1) == of_leaf_1 && (leaf_7 & of_leaf_7) == of_leaf_7 && (states & of_states) == of_states;
  }
};

constexpr unsigned v2 = bit_SSSE3 | bit_SSE4_1 | bit_SSE4_2 | bit_POPCNT, v3 = v2 | bit_AVX | bit_FMA | bit_MOVBE | bit_F16C;
constexpr unsigned v3_leaf_7 = bit_AVX2 | bit_BMI | bit_BMI2;
constexpr unsigned v4_leaf_7 = v3_leaf_7 | bit_AVX512F | bit_AVX512BW | bit_AVX512CD | bit_AVX512DQ | bit_AVX512VL;
constexpr unsigned ymm = 0x6, zmm = 0xe6;  // the bits of xgetbv
const Processor processor;
#endif

// The fastest variant first.
const Variant variants[] = {
#if defined(__x86_64__)
    {"x86-64-v4", &x86_64_v4, processor.has(v3, v4_leaf_7, zmm)},
    {"x86-64-v3", &x86_64_v3, processor.has(v3, v3_leaf_7, ymm)},
    {"x86-64-v2", &x86_64_v2, processor.has(v2, 0, 0)},
#elif defined(__aarch64__)
    {"neon", &neon, true},
#endif
};

const Loops* loops = nullptr;

// Runs body on this thread and on the threads of XLA's pool that arrive within a short time, which is longer for more
// work. The number of parts is the number of threads that arrived, so no thread waits for another one that is busy
// elsewhere.
void run_in_parallel(void* threads, int64_t wanted, int64_t work, void (*body)(const void*, int, int, Barrier*),
                     const void* argument) {
  struct Shared {
    std::atomic<int> joined{0}, parts{0}, left{0};
    Barrier barrier;
  };
  constexpr int closed = 1 << 20;
  auto& pool = *static_cast<ffi::ThreadPool*>(threads);
  wanted = std::min<int64_t>(wanted, pool.num_threads());
  if (wanted <= 1) {
    Barrier alone;
    return body(argument, 0, 1, &alone);
  }
  const auto shared = std::make_shared<Shared>();
  const auto caller = std::this_thread::get_id();
  for (int64_t i = 1; i < wanted; ++i)
    pool.Schedule([shared, caller, body, argument] {
      if (std::this_thread::get_id() == caller) return;  // a thread of the pool would wait for itself
      const int mine = shared->joined.fetch_add(1) + 1;
      if (mine >= closed) return;
      int parts;
      while ((parts = shared->parts.load(std::memory_order_acquire)) == 0) {
      }
      body(argument, mine, parts, &shared->barrier);
      shared->left.fetch_add(1, std::memory_order_release);
    });
  const int64_t patience = 20000 + std::min<int64_t>(work / 1000, 200000);
  for (int64_t spins = 0; shared->joined.load() < wanted - 1 && spins < patience; ++spins) {
  }
  const int parts = 1 + shared->joined.fetch_add(closed);
  shared->parts.store(parts, std::memory_order_release);
  body(argument, 0, parts, &shared->barrier);
  for (int spins = 0; shared->left.load(std::memory_order_acquire) < parts - 1; ++spins)
    if (spins > 4000) std::this_thread::yield();
}

Pool pool_of(ffi::ThreadPool& threads) {
  return {&threads, run_in_parallel, [](Barrier* barrier, int parts) { barrier->wait(parts); }};
}

using F32 = ffi::Buffer<ffi::F32>;
using Flag = ffi::Buffer<ffi::PRED>;
using S32 = ffi::Buffer<ffi::S32>;
using Out = ffi::ResultBuffer<ffi::F32>;

// An argument that a cell does not have is an empty buffer.
template <class Buffer>
auto data(const Buffer& buffer) {
  return buffer.element_count() ? buffer.typed_data() : nullptr;
}
float* data(Out& buffer) { return buffer->element_count() ? buffer->typed_data() : nullptr; }

ffi::Error pack(ffi::ThreadPool threads, bool backward, int64_t cell, F32 weights, Out panels) {
  const int64_t n = weights.dimensions()[1];
  const auto run = backward ? loops->pack_backward : loops->pack_forward;
  const Pool pool = pool_of(threads);
  if (run(pool, Cell(cell), n, nullptr, nullptr) > static_cast<int64_t>(panels->element_count()))
    return ffi::Error(ffi::ErrorCode::kInvalidArgument, "the panels of the kernel are larger than expected");
  run(pool, Cell(cell), n, weights.typed_data(), panels->typed_data());
  return ffi::Error::Success();
}

Sizes sizes(ffi::Span<const int64_t> d, int64_t n, bool reverse, bool batch_major) {
  return {d[batch_major], d[!batch_major], n, reverse, batch_major};
}

// The cotangents of the state start from those of the state after the last step, and those of the initial state from 0.
void begin(const F32& of_h, const F32& of_c, Out& of_h_0, Out& of_c_0, Out& of_initial_h, Out& of_initial_c) {
  std::memcpy(of_h_0->typed_data(), of_h.typed_data(), of_h.size_bytes());
  std::memcpy(of_c_0->typed_data(), of_c.typed_data(), of_c.size_bytes());
  std::memset(of_initial_h->typed_data(), 0, of_initial_h->size_bytes());
  std::memset(of_initial_c->typed_data(), 0, of_initial_c->size_bytes());
}

constexpr int64_t BLOCK = 100000000;  // multiplications in a block of steps, about a millisecond

// The gates may be in the same memory as the drives. With tokens, the drives are the rows of a table.
ffi::Error forward(ffi::ThreadPool threads, int64_t cell, bool reverse, bool saves, F32 drive, F32 drive_bias, F32 panels,
                   F32 bias, F32 h_0, F32 c_0, F32 initial_h, F32 initial_c, Flag valid, Flag reset, S32 tokens, Out h,
                   Out c, Out gates, Out candidate) {
  const Sizes s = sizes(h->dimensions(), h_0.dimensions()[1], reverse, saves);
  std::vector<float> buffer_h(saves ? 2 * h_0.element_count() : 0), buffer_c(saves ? 2 * c_0.element_count() : 0);
  const Pool pool = pool_of(threads);
  // Whole sequences run in blocks of steps, because a thread that is busy elsewhere can join only between two of them.
  const int64_t of_step = s.batch * static_cast<int64_t>(panels.element_count()), steps = saves ? std::max<int64_t>(BLOCK / of_step, 1) : s.time;
  for (int64_t first = 0; first < s.time; first += steps)
    loops->forward(pool, Cell(cell),
                   {s, {data(valid), data(reset), data(initial_h), data(initial_c)}, first, std::min(first + steps, s.time),
                    data(drive), data(drive_bias), data(panels), data(bias), data(tokens), {data(h_0), data(c_0)},
                    {data(h), data(c)}, data(gates), data(candidate), {buffer_h.data(), buffer_c.data()}});
  return ffi::Error::Success();
}

ffi::Error backward(ffi::ThreadPool threads, int64_t cell, bool reverse, F32 drive, F32 drive_bias, F32 recurrent,
                    F32 panels, F32 h_before, F32 c_before, F32 of_outputs, F32 of_h, F32 of_c, F32 initial_h,
                    F32 initial_c, Flag valid, Flag reset, Out of_h_0, Out of_c_0, Out of_initial_h, Out of_initial_c,
                    Out of_drive, Out of_recurrent) {
  begin(of_h, of_c, of_h_0, of_c_0, of_initial_h, of_initial_c);
  const Sizes s = sizes(drive.dimensions(), h_before.dimensions()[2], reverse, false);
  loops->backward(pool_of(threads), Cell(cell),
                  {s, {data(valid), data(reset), data(initial_h), data(initial_c)}, 0, s.time, false,
                   data(drive), data(drive_bias), data(recurrent), data(panels), data(of_outputs), {},
                   {data(h_before), data(c_before)}, {data(of_h_0), data(of_c_0)},
                   {data(of_initial_h), data(of_initial_c)}, data(of_drive), data(of_recurrent), {}});
  return ffi::Error::Success();
}

// The backward loop of whole sequences, in blocks of steps whose rows stay in a cache until the gradient of the weights
// has read them. The cotangents of the drives may be in the same memory as the gates.
ffi::Error backward_from_gates(ffi::ThreadPool threads, int64_t cell, bool reverse, F32 gates, F32 candidate, F32 panels,
                               F32 h_0, F32 c_0, F32 h, F32 c, F32 of_outputs, F32 of_h, F32 of_c, F32 initial_h,
                               F32 initial_c, Flag valid, Flag reset, S32 tokens, Out of_h_0, Out of_c_0,
                               Out of_initial_h, Out of_initial_c, Out of_drive, Out of_weights, Out of_bias,
                               Out of_table) {
  begin(of_h, of_c, of_h_0, of_c_0, of_initial_h, of_initial_c);
  const int64_t n = h.dimensions()[2], outputs = gates.dimensions()[2];
  const Sizes s = sizes(gates.dimensions(), n, reverse, true);
  const int64_t rows = std::min<int64_t>(std::max<int64_t>((1 << 18) / outputs, 256), 512);
  const int64_t steps = std::min(std::max<int64_t>(rows / s.batch, 1), s.time);
  const int64_t gate_count = outputs / n, lanes = 16, padded = (n + lanes - 1) / lanes * lanes, stride = outputs + lanes;
  const int64_t of_products = steps * s.batch * gate_count * padded, operands = steps * s.batch * padded;
  std::vector<float> memory(of_products + operands + 2 * s.batch * stride + lanes);
  float* begin_of_memory = memory.data() + (64 - reinterpret_cast<uintptr_t>(memory.data()) % 64) % 64 / sizeof(float);
  const StepRows of_rows = {begin_of_memory, begin_of_memory + of_products, begin_of_memory + of_products + operands, stride};
  std::memset(of_weights->typed_data(), 0, of_weights->size_bytes());
  std::memset(of_bias->typed_data(), 0, of_bias->size_bytes());
  std::memset(of_table->typed_data(), 0, of_table->size_bytes());
  const Pool pool = pool_of(threads);
  for (int64_t last = s.time; last > 0; last -= steps) {
    const int64_t first = std::max<int64_t>(last - steps, 0);
    loops->backward(pool, Cell(cell),
                    {s, {data(valid), data(reset), data(initial_h), data(initial_c)}, first, last, true,
                     data(gates), nullptr, data(candidate), data(panels), data(of_outputs), {data(h_0), data(c_0)},
                     {data(h), data(c)}, {data(of_h_0), data(of_c_0)}, {data(of_initial_h), data(of_initial_c)},
                     data(of_drive), nullptr, of_rows});
    if (of_weights->element_count())
      loops->gradient(pool, {(last - first) * s.batch, gate_count, n, of_rows, data(of_weights), data(of_bias)});
    if (of_table->element_count())
      loops->table_gradient(pool, {s, outputs, first, last, data(of_drive), data(tokens), data(of_table)});
  }
  return ffi::Error::Success();
}

ffi::Error replay(ffi::ThreadPool threads, bool reverse, F32 drive, F32 drive_bias, F32 recurrent, F32 c_0,
                  F32 initial_c, Flag valid, Flag reset, Out c_before) {
  loops->replay(pool_of(threads), {sizes(drive.dimensions(), c_0.dimensions()[1], reverse, false),
                                   {data(valid), data(reset), nullptr, data(initial_c)},
                                   data(drive), data(drive_bias), data(recurrent), data(c_0), data(c_before)});
  return ffi::Error::Success();
}

// A binding with further arguments and results, all float32, except for the mask and the resets.
template <int count, class Binding>
auto arguments(Binding&& binding) {
  if constexpr (count == 1)
    return std::move(binding).template Arg<F32>();
  else
    return arguments<count - 1>(std::move(binding).template Arg<F32>());
}
template <class Binding>
auto flags(Binding&& binding) {
  return std::move(binding).template Arg<Flag>().template Arg<Flag>();
}
template <int count, class Binding>
auto results(Binding&& binding) {
  if constexpr (count == 1)
    return std::move(binding).template Ret<F32>();
  else
    return results<count - 1>(std::move(binding).template Ret<F32>());
}
auto threads() { return ffi::Ffi::Bind().Ctx<ffi::ThreadPool>(); }

}  // namespace
}  // namespace seqjax

// All else is hidden, so that nothing clashes with another library in the process.
#pragma GCC visibility push(default)

// The name of the k-th variant that this processor can run, the fastest first; null after the last one.
extern "C" const char* seqjax_variant(int k) {
  for (const auto& variant : seqjax::variants)
    if (variant.is_supported && k-- == 0) return variant.name;
  return nullptr;
}

// Chooses the variant of this process. Returns whether this processor can run it.
extern "C" bool seqjax_choose(const char* name) {
  for (const auto& variant : seqjax::variants)
    if (variant.is_supported && std::strcmp(variant.name, name) == 0) {
      seqjax::loops = variant.loops;
      return true;
    }
  return false;
}

using namespace seqjax;

XLA_FFI_DEFINE_HANDLER_SYMBOL(seqjax_pack, pack,
                              results<1>(arguments<1>(threads().Attr<bool>("backward").Attr<int64_t>("cell"))));
XLA_FFI_DEFINE_HANDLER_SYMBOL(seqjax_forward, forward,
                              results<4>(flags(arguments<8>(threads()
                                                               .Attr<int64_t>("cell")
                                                               .Attr<bool>("reverse")
                                                               .Attr<bool>("saves")))
                                             .Arg<S32>()));
XLA_FFI_DEFINE_HANDLER_SYMBOL(seqjax_backward, backward,
                              results<6>(flags(arguments<11>(threads().Attr<int64_t>("cell").Attr<bool>("reverse")))));
XLA_FFI_DEFINE_HANDLER_SYMBOL(seqjax_backward_from_gates, backward_from_gates,
                              results<8>(flags(arguments<12>(threads().Attr<int64_t>("cell").Attr<bool>("reverse")))
                                             .Arg<S32>()));
XLA_FFI_DEFINE_HANDLER_SYMBOL(seqjax_replay, replay,
                              results<1>(flags(arguments<5>(threads().Attr<bool>("reverse")))));

#pragma GCC visibility pop
