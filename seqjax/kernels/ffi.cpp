// The functions that XLA calls, for the variant of the loops that this process has chosen, and their threads.

#include <time.h>

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
extern const Of<float>::Loops x86_64_v2_float, x86_64_v3_float, x86_64_v4_float;
extern const Of<double>::Loops x86_64_v2_double, x86_64_v3_double, x86_64_v4_double;
#elif defined(__aarch64__)
extern const Of<float>::Loops neon_float;
extern const Of<double>::Loops neon_double;
#endif

namespace {

struct Variant {
  const char* name;
  const Of<float>::Loops* of_float;
  const Of<double>::Loops* of_double;
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

constexpr unsigned v2 = bit_SSSE3 | bit_SSE4_1 | bit_SSE4_2 | bit_POPCNT,
                   v3 = v2 | bit_AVX | bit_FMA | bit_MOVBE | bit_F16C;
constexpr unsigned v3_leaf_7 = bit_AVX2 | bit_BMI | bit_BMI2;
constexpr unsigned v4_leaf_7 = v3_leaf_7 | bit_AVX512F | bit_AVX512BW | bit_AVX512CD | bit_AVX512DQ | bit_AVX512VL;
constexpr unsigned ymm = 0x6, zmm = 0xe6;  // the bits of xgetbv
const Processor processor;
#endif

// The fastest variant first.
const Variant variants[] = {
#if defined(__x86_64__)
    {"x86-64-v4", &x86_64_v4_float, &x86_64_v4_double, processor.has(v3, v4_leaf_7, zmm)},
    {"x86-64-v3", &x86_64_v3_float, &x86_64_v3_double, processor.has(v3, v3_leaf_7, ymm)},
    {"x86-64-v2", &x86_64_v2_float, &x86_64_v2_double, processor.has(v2, 0, 0)},
#elif defined(__aarch64__)
    {"neon", &neon_float, &neon_double, true},
#endif
};

const Variant* variant = nullptr;  // of this process

template <class real>
const typename Of<real>::Loops* loops_of() {
  if constexpr (sizeof(real) == sizeof(float))
    return variant->of_float;
  else
    return variant->of_double;
}

using Body = void (*)(const void*, int, int, Barrier*);

double seconds(clockid_t clock) {
  timespec now;
  clock_gettime(clock, &now);
  return now.tv_sec + 1e-9 * now.tv_nsec;
}

// Whether other processes take the processors away from our threads. It is believed for a while after threads were
// stopped twice within a short time, and for longer each time that the next attempt shows the same.
class Busy {
 public:
  bool now() const { return seconds(CLOCK_MONOTONIC) < until.load(std::memory_order_relaxed); }
  // Runs a part on this thread, and compares the time that passed with the time that the thread ran.
  void watch(Body body, const void* argument, int part, int parts, Barrier* barrier) {
    const double began = seconds(CLOCK_MONOTONIC), ran = seconds(CLOCK_THREAD_CPUTIME_ID);
    body(argument, part, parts, barrier);
    const double ended = seconds(CLOCK_MONOTONIC), passed = ended - began;
    const double stopped = passed - (seconds(CLOCK_THREAD_CPUTIME_ID) - ran);
    if (stopped > 1e-3 && stopped > 0.3 * passed) {  // a process that shares the processor runs for milliseconds
      if (ended - last.exchange(ended, std::memory_order_relaxed) > 0.1) return;
      const double longer = std::min(2 * period.load(std::memory_order_relaxed), 2.0);
      period.store(longer, std::memory_order_relaxed);
      until.store(ended + longer, std::memory_order_relaxed);
    } else if (passed > 1e-3 && !now()) {
      period.store(0.05, std::memory_order_relaxed);
    }
  }

 private:
  std::atomic<double> until{0}, last{0}, period{0.05};
} busy;

// Runs `parts` parts on this thread and on the threads of XLA's pool that come. Whoever is free takes the next part, so
// that no thread waits for one that has not come.
void run_parts(ffi::ThreadPool& pool, int threads, int parts, Body body, const void* argument) {
  struct Shared {
    std::atomic<int> next{0}, done{0};
  };
  const auto shared = std::make_shared<Shared>();
  // Not touched any more after the last part has been taken.
  const auto work = [=] {
    for (int part; (part = shared->next.fetch_add(1)) < parts;) {
      Barrier alone;
      busy.watch(body, argument, part, parts, &alone);
      shared->done.fetch_add(1, std::memory_order_release);
    }
  };
  for (int i = 1; i < threads; ++i) pool.Schedule([work] { work(); });
  work();
  for (int spins = 0; shared->done.load(std::memory_order_acquire) < parts; ++spins)
    if (spins > 4000) std::this_thread::yield();
}

// Runs a part on this thread and on each thread of XLA's pool that arrives within a short time, which is longer for
// more work. The number of parts is the number of threads that arrived, so no thread waits for another one that is busy
// elsewhere.
void run_together(ffi::ThreadPool& pool, int threads, int64_t work, Body body, const void* argument) {
  struct Shared {
    std::atomic<int> joined{0}, parts{0}, left{0};
    Barrier barrier;
  };
  constexpr int closed = 1 << 20;
  const auto shared = std::make_shared<Shared>();
  const auto caller = std::this_thread::get_id();
  for (int i = 1; i < threads; ++i)
    pool.Schedule([shared, caller, body, argument] {
      if (std::this_thread::get_id() == caller) return;  // a thread of the pool would wait for itself
      const int mine = shared->joined.fetch_add(1) + 1;
      if (mine >= closed) return;
      int parts;
      for (int spins = 0; (parts = shared->parts.load(std::memory_order_acquire)) == 0; ++spins)
        if (spins > 4000) std::this_thread::yield();
      busy.watch(body, argument, mine, parts, &shared->barrier);
      shared->left.fetch_add(1, std::memory_order_release);
    });
  const int64_t patience = 20000 + std::min<int64_t>(work / 1000, 200000);
  for (int64_t spins = 0; shared->joined.load() < threads - 1 && spins < patience; ++spins) {
  }
  const int parts = 1 + shared->joined.fetch_add(closed);
  shared->parts.store(parts, std::memory_order_release);
  busy.watch(body, argument, 0, parts, &shared->barrier);
  for (int spins = 0; shared->left.load(std::memory_order_acquire) < parts - 1; ++spins)
    if (spins > 4000) std::this_thread::yield();
}

// On a busy machine, threads that wait for each other at every step would wait for the processor, so one thread runs
// alone; and threads that do not wait take smaller parts, so that the last one is not waited for as long.
void run_in_parallel(void* threads, int64_t wanted, bool waits, int64_t work, Body body, const void* argument) {
  auto& pool = *static_cast<ffi::ThreadPool*>(threads);
  const int most = static_cast<int>(std::min<int64_t>(wanted, pool.num_threads()));
  const bool is_busy = most > 1 && busy.now();
  if (most <= 1 || (waits && is_busy)) {
    Barrier alone;
    return body(argument, 0, 1, &alone);
  }
  if (waits) return run_together(pool, most, work, body, argument);
  run_parts(pool, most, static_cast<int>(std::min<int64_t>(wanted, is_busy ? 4 * most : most)), body, argument);
}

Pool pool_of(ffi::ThreadPool& threads) {
  return {&threads, busy.now(), run_in_parallel, [](Barrier* barrier, int parts) { barrier->wait(parts); }};
}

using ffi::DataType;
using Flag = ffi::Buffer<ffi::PRED>;
using S32 = ffi::Buffer<ffi::S32>;
template <DataType D>
using In = ffi::Buffer<D>;
template <DataType D>
using Out = ffi::ResultBuffer<D>;
template <DataType D>
using Real = ffi::NativeType<D>;

// The numbers of one member of an ensemble. A buffer with more than `axes` axes has one part for each member, and
// another one is shared by all. An argument that a cell does not have is an empty buffer.
template <int axes, class Buffer>
auto data(Buffer& buffer, int64_t member) -> decltype(buffer.typed_data()) {
  const auto d = buffer.dimensions();
  if (!buffer.element_count()) return nullptr;
  return buffer.typed_data() + (d.size() > axes ? member * (static_cast<int64_t>(buffer.element_count()) / d[0]) : 0);
}
template <int axes, DataType D>
auto data(Out<D>& buffer, int64_t member) {
  return data<axes>(*buffer, member);
}

// The number of members, from a result, which always has one part for each.
template <int axes, DataType D>
int64_t members(Out<D>& result) {
  const auto d = result->dimensions();
  return d.size() > axes ? d[0] : 1;
}

// The k-th axis from the end.
template <class Buffer>
int64_t from_end(const Buffer& buffer, int k) {
  const auto d = buffer.dimensions();
  return d[d.size() - k];
}

void run_alone(void*, int64_t, bool, int64_t, Body body, const void* argument) {
  Barrier alone;
  body(argument, 0, 1, &alone);
}

// Calls run(pool, member) for each member: one member on each thread, or all threads on one member after another if
// there are fewer members than threads.
template <class Run>
void for_members(ffi::ThreadPool& threads, int64_t members, const Run& run) {
  const Pool pool = pool_of(threads);
  if (members < std::max<int64_t>(threads.num_threads(), 2)) {
    for (int64_t m = 0; m < members; ++m) run(pool, m);
    return;
  }
  struct Members {
    const Run& run;
    int64_t count;
  } all{run, members};
  const Body of_part = [](const void* argument, int part, int parts, Barrier*) {
    const auto& all = *static_cast<const Members*>(argument);
    const Pool alone = {nullptr, false, run_alone, [](Barrier*, int) {}};
    for (int64_t m = all.count * part / parts; m < all.count * (part + 1) / parts; ++m) all.run(alone, m);
  };
  pool.run(pool.threads, members, false, 0, of_part, &all);
}

template <DataType D>
ffi::Error pack(ffi::ThreadPool threads, bool backward, int64_t cell, In<D> weights, Out<D> panels) {
  const int64_t n = from_end(weights, 1), rows = from_end(weights, 2);
  const auto run = [&](const Pool& pool, const Real<D>* from, Real<D>* to) {
    const auto& loops = *loops_of<Real<D>>();
    return backward ? loops.pack_backward(pool, n, rows, from, to)
                    : loops.pack_forward(pool, Cell(cell), n, rows, from, to);
  };
  if (run(pool_of(threads), nullptr, nullptr) > from_end(*panels, 1))
    return ffi::Error(ffi::ErrorCode::kInvalidArgument, "the panels of the kernel are larger than expected");
  for_members(threads, members<1>(panels),
              [&](const Pool& pool, int64_t m) { run(pool, data<2>(weights, m), data<1>(panels, m)); });
  return ffi::Error::Success();
}

template <class Buffer>
Sizes sizes(const Buffer& steps, int64_t n, bool reverse, bool batch_major) {
  const int64_t first = from_end(steps, 3), second = from_end(steps, 2);
  return {batch_major ? second : first, batch_major ? first : second, n, reverse, batch_major};
}

// The cotangents of the state start from those of the state after the last step, and those of the initial state from 0.
template <DataType D>
void begin(const Sizes& s, Real<D>* of_state, const Real<D>* of_last, Real<D>* of_initial) {
  const size_t bytes = s.batch * s.n * sizeof(Real<D>);
  if (of_state) std::memcpy(of_state, of_last, bytes);
  if (of_initial) std::memset(of_initial, 0, bytes);
}

constexpr int64_t BLOCK = 100000000;  // multiplications in a block of steps, about a millisecond

// The gates may be in the same memory as the drives. With tokens, the drives are the rows of a table.
template <DataType D>
ffi::Error forward(ffi::ThreadPool threads, int64_t cell, bool reverse, bool saves, In<D> drive, In<D> drive_bias,
                   In<D> panels, In<D> bias, In<D> h_0, In<D> c_0, In<D> initial_h, In<D> initial_c, Flag valid,
                   Flag reset, S32 tokens, Out<D> h, Out<D> c, Out<D> gates, Out<D> candidate) {
  const Sizes s = sizes(*h, from_end(h_0, 1), reverse, saves);
  // Whole sequences run in blocks of steps, because a thread that is busy elsewhere can join only between two of them.
  const int64_t of_step = std::max<int64_t>(s.batch * from_end(panels, 1), 1),
                steps = saves ? std::max<int64_t>(BLOCK / of_step, 1) : s.time;
  for_members(threads, members<3>(h), [&](const Pool& pool, int64_t m) {
    const auto drives = tokens.element_count() ? data<2>(drive, m) : data<3>(drive, m);
    const int64_t buffered = saves ? 2 * s.batch * s.n : 0;
    std::vector<Real<D>> buffer_h(buffered), buffer_c(data<3>(c, m) ? buffered : 0);
    for (int64_t first = 0; first < s.time; first += steps)
      loops_of<Real<D>>()->forward(
          pool, Cell(cell),
          {s,
           {data<2>(valid, m), data<2>(reset, m), data<1>(initial_h, m), data<1>(initial_c, m)},
           first,
           std::min(first + steps, s.time),
           drives,
           data<1>(drive_bias, m),
           data<1>(panels, m),
           data<1>(bias, m),
           data<2>(tokens, m),
           {data<2>(h_0, m), data<2>(c_0, m)},
           {data<3>(h, m), data<3>(c, m)},
           data<3>(gates, m),
           data<3>(candidate, m),
           {buffer_h.data(), buffer_c.data()}});
  });
  return ffi::Error::Success();
}

template <DataType D>
ffi::Error backward(ffi::ThreadPool threads, int64_t cell, bool reverse, In<D> drive, In<D> drive_bias, In<D> recurrent,
                    In<D> panels, In<D> h_before, In<D> c_before, In<D> of_outputs, In<D> of_h, In<D> of_c,
                    In<D> initial_h, In<D> initial_c, Flag valid, Flag reset, Out<D> of_h_0, Out<D> of_c_0,
                    Out<D> of_initial_h, Out<D> of_initial_c, Out<D> of_drive, Out<D> of_recurrent) {
  const Sizes s = sizes(drive, from_end(h_before, 1), reverse, false);
  for_members(threads, members<3>(of_drive), [&](const Pool& pool, int64_t m) {
    begin<D>(s, data<2>(of_h_0, m), data<2>(of_h, m), data<2>(of_initial_h, m));
    begin<D>(s, data<2>(of_c_0, m), data<2>(of_c, m), data<2>(of_initial_c, m));
    loops_of<Real<D>>()->backward(pool, Cell(cell),
                                  {s,
                                   {data<2>(valid, m), data<2>(reset, m), data<1>(initial_h, m), data<1>(initial_c, m)},
                                   0,
                                   s.time,
                                   false,
                                   data<3>(drive, m),
                                   data<1>(drive_bias, m),
                                   data<3>(recurrent, m),
                                   data<1>(panels, m),
                                   data<3>(of_outputs, m),
                                   {},
                                   {data<3>(h_before, m), data<3>(c_before, m)},
                                   {data<2>(of_h_0, m), data<2>(of_c_0, m)},
                                   {data<2>(of_initial_h, m), data<2>(of_initial_c, m)},
                                   data<3>(of_drive, m),
                                   data<3>(of_recurrent, m),
                                   {}});
  });
  return ffi::Error::Success();
}

// The backward loop of whole sequences, in blocks of steps whose rows stay in a cache until the gradient of the weights
// has read them. The cotangents of the drives may be in the same memory as the gates.
template <DataType D>
ffi::Error backward_from_gates(ffi::ThreadPool threads, int64_t cell, bool reverse, In<D> gates, In<D> candidate,
                               In<D> panels, In<D> h_0, In<D> c_0, In<D> h, In<D> c, In<D> of_outputs, In<D> of_h,
                               In<D> of_c, In<D> initial_h, In<D> initial_c, Flag valid, Flag reset, S32 tokens,
                               Out<D> of_h_0, Out<D> of_c_0, Out<D> of_initial_h, Out<D> of_initial_c, Out<D> of_drive,
                               Out<D> of_weights, Out<D> of_bias, Out<D> of_table) {
  const int64_t n = from_end(h, 1), outputs = from_end(gates, 1);
  const Sizes s = sizes(gates, n, reverse, true);
  std::memset(of_weights->typed_data(), 0, of_weights->size_bytes());
  std::memset(of_bias->typed_data(), 0, of_bias->size_bytes());
  std::memset(of_table->typed_data(), 0, of_table->size_bytes());
  if (s.batch == 0 || n == 0) return ffi::Error::Success();  // the other results are empty
  const int64_t rows = std::min<int64_t>(std::max<int64_t>((1 << 18) / outputs, 256), 512);
  const int64_t steps = std::min(std::max<int64_t>(rows / s.batch, 1), s.time);
  const int64_t gate_count = outputs / n, lanes = 16, padded = (n + lanes - 1) / lanes * lanes,
                stride = outputs + lanes;
  const int64_t of_products = steps * s.batch * gate_count * padded, operands = steps * s.batch * padded;
  for_members(threads, members<3>(of_drive), [&](const Pool& pool, int64_t m) {
    std::vector<Real<D>> memory(of_products + operands + 2 * s.batch * stride + lanes);
    const uintptr_t begins = reinterpret_cast<uintptr_t>(memory.data());
    Real<D>* aligned = memory.data() + (64 - begins % 64) % 64 / sizeof(Real<D>);
    const typename Of<Real<D>>::StepRows of_rows = {aligned, aligned + of_products, aligned + of_products + operands,
                                                    stride};
    begin<D>(s, data<2>(of_h_0, m), data<2>(of_h, m), data<2>(of_initial_h, m));
    begin<D>(s, data<2>(of_c_0, m), data<2>(of_c, m), data<2>(of_initial_c, m));
    for (int64_t last = s.time; last > 0; last -= steps) {
      const int64_t first = std::max<int64_t>(last - steps, 0);
      loops_of<Real<D>>()->backward(
          pool, Cell(cell),
          {s,
           {data<2>(valid, m), data<2>(reset, m), data<1>(initial_h, m), data<1>(initial_c, m)},
           first,
           last,
           true,
           data<3>(gates, m),
           nullptr,
           data<3>(candidate, m),
           data<1>(panels, m),
           data<3>(of_outputs, m),
           {data<2>(h_0, m), data<2>(c_0, m)},
           {data<3>(h, m), data<3>(c, m)},
           {data<2>(of_h_0, m), data<2>(of_c_0, m)},
           {data<2>(of_initial_h, m), data<2>(of_initial_c, m)},
           data<3>(of_drive, m),
           nullptr,
           of_rows});
      if (of_weights->element_count())
        loops_of<Real<D>>()->gradient(
            pool, {(last - first) * s.batch, gate_count, n, of_rows, data<2>(of_weights, m), data<1>(of_bias, m)});
      if (of_table->element_count())
        loops_of<Real<D>>()->table_gradient(
            pool, {s, outputs, first, last, data<3>(of_drive, m), data<2>(tokens, m), data<2>(of_table, m)});
    }
  });
  return ffi::Error::Success();
}

template <DataType D>
ffi::Error replay(ffi::ThreadPool threads, bool reverse, In<D> drive, In<D> drive_bias, In<D> recurrent, In<D> c_0,
                  In<D> initial_c, Flag valid, Flag reset, Out<D> c_before) {
  const Sizes s = sizes(drive, from_end(c_0, 1), reverse, false);
  for_members(threads, members<3>(c_before), [&](const Pool& pool, int64_t m) {
    loops_of<Real<D>>()->replay(pool, {s,
                                       {data<2>(valid, m), data<2>(reset, m), nullptr, data<1>(initial_c, m)},
                                       data<3>(drive, m),
                                       data<1>(drive_bias, m),
                                       data<3>(recurrent, m),
                                       data<2>(c_0, m),
                                       data<3>(c_before, m)});
  });
  return ffi::Error::Success();
}

// A loop of instructions. `arrays` has the layout, the width and the number `of` of every array: the arguments, without
// the panels, the results and the scratch. `axes` has the axes of the arguments and results of one member. Results of
// rows begin as the array `of`, or as zeros.
template <DataType D>
ffi::Error units(ffi::ThreadPool threads, int64_t n, bool reverse, ffi::Span<const int64_t> arrays,
                 ffi::Span<const int64_t> axes, ffi::Span<const int32_t> code, ffi::Span<const int64_t> ends,
                 ffi::Span<const int64_t> products, ffi::RemainingArgs args, ffi::RemainingRets rets) {
  using U = Of<Real<D>>;
  const int64_t product_count = products.size() / 4, array_count = arrays.size() / 3;
  const int64_t arguments = args.size() - product_count, results = rets.size();
  const auto shape = (*rets.template get<In<D>>(0))->dimensions();
  const int64_t of_members = shape.size() > 3 ? shape[0] : 1;
  const Sizes s = {shape[shape.size() - 3], shape[shape.size() - 2], n, reverse, false};
  const auto numbers = [&](auto buffer, int64_t count, int64_t m) -> Real<D>* {
    const auto d = buffer.dimensions();
    const int64_t size = buffer.element_count();
    return buffer.typed_data() + (int64_t(d.size()) > count ? m * (size / d[0]) : 0);
  };
  for_members(threads, of_members, [&](const Pool& pool, int64_t m) {
    std::vector<typename U::UnitArray> found;
    std::vector<std::vector<Real<D>>> scratch;
    for (int64_t k = 0; k < array_count; ++k) {
      const int64_t layout = arrays[3 * k], width = arrays[3 * k + 1], of = arrays[3 * k + 2];
      Real<D>* data;
      if (k < arguments) {
        data = numbers(*args.template get<In<D>>(k), axes[k], m);
      } else if (k < arguments + results) {
        data = numbers(**rets.template get<In<D>>(k - arguments), axes[k], m);
        const size_t bytes = s.batch * width * sizeof(Real<D>);
        if (layout == U::rows && of >= 0) std::memcpy(data, found[of].data, bytes);
        if (layout == U::rows && of < 0) std::memset(data, 0, bytes);
      } else {
        scratch.emplace_back(s.batch * width);
        data = scratch.back().data();
      }
      found.push_back({data, layout, width, of});
    }
    std::vector<typename U::UnitProduct> multiplied;
    for (int64_t k = 0; k < product_count; ++k)
      multiplied.push_back({products[4 * k], products[4 * k + 1], products[4 * k + 2], products[4 * k + 3],
                            numbers(*args.template get<In<D>>(arguments + k), 1, m)});
    loops_of<Real<D>>()->units(
        pool, {s, array_count, product_count, found.data(), multiplied.data(), code.begin(), ends.begin()});
  });
  return ffi::Error::Success();
}

// A binding with further arguments and results, all of one type, except for the mask and the resets.
template <DataType D, int count, class Binding>
auto arguments(Binding&& binding) {
  if constexpr (count == 1)
    return std::move(binding).template Arg<In<D>>();
  else
    return arguments<D, count - 1>(std::move(binding).template Arg<In<D>>());
}
template <class Binding>
auto flags(Binding&& binding) {
  return std::move(binding).template Arg<Flag>().template Arg<Flag>();
}
template <DataType D, int count, class Binding>
auto results(Binding&& binding) {
  if constexpr (count == 1)
    return std::move(binding).template Ret<In<D>>();
  else
    return results<D, count - 1>(std::move(binding).template Ret<In<D>>());
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
      seqjax::variant = &variant;
      return true;
    }
  return false;
}

using namespace seqjax;

auto of_cell() { return threads().Attr<int64_t>("cell").Attr<bool>("reverse"); }

auto of_units() {
  using Numbers = ffi::Span<const int64_t>;
  return threads()
      .Attr<int64_t>("n")
      .Attr<bool>("reverse")
      .Attr<Numbers>("arrays")
      .Attr<Numbers>("axes")
      .Attr<ffi::Span<const int32_t>>("code")
      .Attr<Numbers>("ends")
      .Attr<Numbers>("products")
      .RemainingArgs()
      .RemainingRets();
}

// The functions for one type of numbers, whose names end in `suffix`.
#define SEQJAX_FUNCTIONS(suffix, D)                                                                                 \
  XLA_FFI_DEFINE_HANDLER_SYMBOL(                                                                                    \
      seqjax_pack##suffix, pack<D>,                                                                                 \
      (results<D, 1>(arguments<D, 1>(threads().Attr<bool>("backward").Attr<int64_t>("cell")))));                    \
  XLA_FFI_DEFINE_HANDLER_SYMBOL(seqjax_forward##suffix, forward<D>,                                                 \
                                (results<D, 4>(flags(arguments<D, 8>(of_cell().Attr<bool>("saves"))).Arg<S32>()))); \
  XLA_FFI_DEFINE_HANDLER_SYMBOL(seqjax_backward##suffix, backward<D>,                                               \
                                (results<D, 6>(flags(arguments<D, 11>(of_cell())))));                               \
  XLA_FFI_DEFINE_HANDLER_SYMBOL(seqjax_backward_from_gates##suffix, backward_from_gates<D>,                         \
                                (results<D, 8>(flags(arguments<D, 12>(of_cell())).Arg<S32>())));                    \
  XLA_FFI_DEFINE_HANDLER_SYMBOL(seqjax_replay##suffix, replay<D>,                                                   \
                                (results<D, 1>(flags(arguments<D, 5>(threads().Attr<bool>("reverse"))))));          \
  XLA_FFI_DEFINE_HANDLER_SYMBOL(seqjax_units##suffix, units<D>, of_units())

SEQJAX_FUNCTIONS(_float32, ffi::F32);
SEQJAX_FUNCTIONS(_float64, ffi::F64);

#pragma GCC visibility pop
