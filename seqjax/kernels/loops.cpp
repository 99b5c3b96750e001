// The loops of seqjax.sequence._partition for LSTM, GRU and tanh networks in float32: the forward pass through a chunk;
// the backward recurrence of lambda_t = dL/ds_t; and the recomputation of an LSTM's c_t if only h_t was saved.
//
// Every step is one product with the recurrent weights and one pass over the units. The weights are packed into panels
// of eight units, with all gates of a unit next to each other. So the product with one panel is enough for the new
// state of its units. XLA moves the packing out of the loop over chunks. Threads share the rows of the batch, which are
// independent. If there are too few rows, the threads share units instead and wait for each other once per step.
//
// Names: of_x is the cotangent of x, dL/dx. A drive is the part of a gate's argument that does not depend on the state,
// and `recurrent` is the product with the recurrent weights.

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstring>
#include <memory>
#include <thread>
#include <vector>

#include "xla/ffi/api/ffi.h"

namespace ffi = xla::ffi;

namespace {

constexpr int W = 8;  // floats per vector; the compiler splits or joins vectors to match the width of the processor
typedef float V __attribute__((vector_size(4 * W), aligned(4), may_alias));
typedef int32_t I __attribute__((vector_size(4 * W), aligned(4), may_alias));

inline V splat(float x) { return V{x, x, x, x, x, x, x, x}; }
inline V load(const float* p) { return *reinterpret_cast<const V*>(p); }
inline void store(float* p, V v) { *reinterpret_cast<V*>(p) = v; }

inline V load(const float* p, int64_t count) {
  if (count >= W) return load(p);
  float part[W] = {};
  std::memcpy(part, p, 4 * count);
  return load(part);
}

inline void store(float* p, V v, int64_t count) {
  if (count >= W) return store(p, v);
  float part[W];
  store(part, v);
  std::memcpy(p, part, 4 * count);
}

// exp as 2^k exp(r) with |r| <= ln(2)/2, by the minimax polynomial of Cephes. NaN propagates.
inline V exponential(V x) {
  const V high = splat(88.0f), low = splat(-87.0f);
  x = x > high ? high : x;
  x = x < low ? low : x;
  const V shift = splat(12583039.0f);  // 1.5 * 2^23 rounds to a whole number; 127 is the exponent's bias
  V k = x * splat(1.44269504088896341f) + shift;
  const I power = reinterpret_cast<I>(k) << 23;
  k -= shift;
  V r = x - k * splat(0.693359375f) + k * splat(2.12194440e-4f);
  const V s = r * r;
  const V high_terms = (splat(1.9875691500e-4f) * r + splat(1.3981999507e-3f)) * s;
  const V middle_terms = splat(8.3334519073e-3f) * r + splat(4.1665795894e-2f);
  const V low_terms = splat(1.6666665459e-1f) * r + splat(5.0000001201e-1f);
  const V p = ((high_terms + middle_terms) * s + low_terms) * s + (r + splat(1.0f));
  return p * reinterpret_cast<V>(power);
}

inline V sigmoid(V x) { return splat(1.0f) / (splat(1.0f) + exponential(-x)); }

// tanh by the rational function of Eigen, accurate to two units in the last place.
inline V tangent(V x) {
  const V bound = splat(7.90531110763549805f);
  x = x > bound ? bound : x;
  x = x < -bound ? -bound : x;
  const V s = x * x, s2 = s * s, s4 = s2 * s2;
  const V p = (splat(-2.76076847742355e-16f) * s2 + (splat(2.00018790482477e-13f) * s + splat(-8.60467152213735e-11f))) * s4 +
              ((splat(5.12229709037114e-08f) * s + splat(1.48572235717979e-05f)) * s2 +
               (splat(6.37261928875436e-04f) * s + splat(4.89352455891786e-03f)));
  const V q = (splat(1.19825839466702e-06f) * s + splat(1.18534705686654e-04f)) * s2 +
              (splat(2.26843463243900e-03f) * s + splat(4.89352518554385e-03f));
  return x * p / q;
}

// Forces a vector into a register, because the compiler would read it from memory again for every row.
inline void keep(V& v) {
#ifdef __AVX__
  asm volatile("" : "+x"(v));
#endif
}

// One k of sum[product][row][column] += a[row][k] panel[product][k][column], where the panels are `apart` floats apart.
template <int P, int R, int N>
inline void add_product(const float* a, int64_t stride, const float* panel, int64_t apart, V (&sum)[P][R][N]) {
  for (int p = 0; p < P; ++p) {
    V columns[N];
    for (int v = 0; v < N; ++v) {
      columns[v] = load(panel + p * apart + v * W);
      if (R > 1) keep(columns[v]);
    }
    for (int r = 0; r < R; ++r) {
      const V x = splat(a[r * stride]);
      for (int v = 0; v < N; ++v) sum[p][r][v] += x * columns[v];
    }
  }
}

// sum_k a[row][k] panel[product][k][column] for R rows and N vectors of columns of P products, with all sums in
// registers. Six rows of two vectors, or four rows of three, fit into sixteen registers and hide the latency of an
// addition. Not inlined, because together with other code the compiler runs out of registers inside the loop.
template <int P, int R, int N>
__attribute__((noinline)) void product(const float* a, int64_t stride, const float* panel, int64_t depth,
                                       V (*sum)[R][N]) {
  // If there are few sums, each is split into several, to hide the latency of an addition.
  constexpr int sets = P * R * N >= 8 ? 1 : P * R * N >= 4 ? 2 : 4;
  const int64_t apart = depth * N * W;
  V all[sets][P][R][N] = {};
  int64_t k = 0;
  for (; k + sets <= depth; k += sets)
    for (int i = 0; i < sets; ++i) add_product<P, R, N>(a + k + i, stride, panel + (k + i) * N * W, apart, all[i]);
  for (; k < depth; ++k) add_product<P, R, N>(a + k, stride, panel + k * N * W, apart, all[0]);
  for (int p = 0; p < P; ++p)
    for (int r = 0; r < R; ++r)
      for (int v = 0; v < N; ++v) {
        sum[p][r][v] = all[0][p][r][v];
        for (int i = 1; i < sets; ++i) sum[p][r][v] += all[i][p][r][v];
      }
}

// Calls body(R, row) for blocks of R <= `most` rows that cover first..last, with blocks as equal as possible.
template <int most, class Body>
inline void in_blocks(int64_t first, int64_t last, Body&& body) {
  while (first < last) {
    const int64_t left = last - first, blocks = (left + most - 1) / most, height = (left + blocks - 1) / blocks;
    auto call = [&](auto rows) {
      if constexpr (decltype(rows)::value <= most)
        if (height == decltype(rows)::value) body(rows, first);
    };
    call(std::integral_constant<int, 1>{});
    call(std::integral_constant<int, 2>{});
    call(std::integral_constant<int, 3>{});
    call(std::integral_constant<int, 4>{});
    call(std::integral_constant<int, 5>{});
    call(std::integral_constant<int, 6>{});
    first += height;
  }
}

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

// Runs body(part, parts, barrier) on this thread and on the threads of XLA's pool that arrive within a short time,
// which is longer for more work. The number of parts is the number of threads that arrived, so no thread waits for
// another one that is busy elsewhere.
template <class Body>
void in_parallel(ffi::ThreadPool& pool, int64_t wanted, int64_t work, const Body& body) {
  struct Shared {
    std::atomic<int> joined{0}, parts{0}, left{0};
    Barrier barrier;
  };
  constexpr int closed = 1 << 20;
  wanted = std::min<int64_t>(wanted, pool.num_threads());
  auto shared = std::make_shared<Shared>();
  if (wanted <= 1) return body(0, 1, shared->barrier);
  const auto caller = std::this_thread::get_id();
  for (int64_t i = 1; i < wanted; ++i)
    pool.Schedule([shared, caller, &body] {
      if (std::this_thread::get_id() == caller) return;  // a thread of the pool would wait for itself
      const int mine = shared->joined.fetch_add(1) + 1;
      if (mine >= closed) return;
      int parts;
      while ((parts = shared->parts.load(std::memory_order_acquire)) == 0) {
      }
      body(mine, parts, shared->barrier);
      shared->left.fetch_add(1, std::memory_order_release);
    });
  const int64_t patience = 20000 + std::min<int64_t>(work / 1000, 200000);
  for (int64_t spins = 0; shared->joined.load() < wanted - 1 && spins < patience; ++spins) {
  }
  const int parts = 1 + shared->joined.fetch_add(closed);
  shared->parts.store(parts, std::memory_order_release);
  body(0, parts, shared->barrier);
  for (int spins = 0; shared->left.load(std::memory_order_acquire) < parts - 1; ++spins)
    if (spins > 4000) std::this_thread::yield();
}

struct Range {
  int64_t first, last;
};

inline Range share(int64_t size, int part, int parts) { return {size * part / parts, size * (part + 1) / parts}; }

struct Sizes {
  int64_t time, batch, n;
  bool reverse;
  int64_t step(int64_t i) const { return reverse ? time - 1 - i : i; }
};

// A cell has: the number of gates; the size of its panel of packed weights, in vectors of eight units; the columns of
// one product, in vectors; the number of rows per product; and the forward and backward passes over eight units. `a` is
// the argument of the gates. All arrays have one vector per gate.
struct LSTM {
  static constexpr int gates = 4, vectors = 1, columns = 2, rows = 6;
  static constexpr bool has_c = true, two_cotangents = false;
  struct Gates {
    V i, f, g, o;
  };
  static Gates activate(const V* a) { return {sigmoid(a[0]), sigmoid(a[1]), tangent(a[2]), sigmoid(a[3])}; }

  static V forward(const V* a, const V*, V, V& c) {
    const Gates s = activate(a);
    c = s.f * c + s.i * s.g;
    return s.o * tangent(c);
  }
  // Reads dL/dh_t and dL/dc_t. Writes dL/da_t and dL/dc_{t-1}, and returns the part of dL/dh_{t-1} that does not pass
  // through the product.
  static V backward(const V* a, const V*, V, V c, V of_h, V& of_c, V* of_a, V*) {
    const Gates s = activate(a);
    const V one = splat(1.0f), t = tangent(s.f * c + s.i * s.g);
    const V through = of_c + of_h * s.o * (one - t * t);
    of_a[0] = through * s.g * s.i * (one - s.i);
    of_a[1] = through * c * s.f * (one - s.f);
    of_a[2] = through * s.i * (one - s.g * s.g);
    of_a[3] = of_h * t * s.o * (one - s.o);
    of_c = through * s.f;
    return V{};
  }
};

struct Vanilla {
  static constexpr int gates = 1, vectors = 2, columns = 2, rows = 6;
  static constexpr bool has_c = false, two_cotangents = false;
  static V forward(const V* a, const V*, V, V&) { return tangent(a[0]); }
  static V backward(const V* a, const V*, V, V, V of_h, V&, V* of_a, V*) {
    const V h = tangent(a[0]);
    of_a[0] = of_h * (splat(1.0f) - h * h);
    return V{};
  }
};

// With the reset gate after the product, and with the update gate z as the factor of the old state. `a` is drive +
// recurrent, except for the candidate: a[2] is only its drive, and recurrent[2] is its recurrent product.
struct GRU {
  static constexpr int gates = 3, vectors = 1, columns = 3, rows = 4;
  static constexpr bool has_c = false, two_cotangents = true;
  static V forward(const V* a, const V* recurrent, V h, V&) {
    const V r = sigmoid(a[0]), z = sigmoid(a[1]), candidate = tangent(a[2] + r * recurrent[2]);
    return candidate + z * (h - candidate);
  }
  static V backward(const V* a, const V* recurrent, V h, V, V of_h, V&, V* of_a, V* of_recurrent) {
    const V one = splat(1.0f);
    const V r = sigmoid(a[0]), z = sigmoid(a[1]), candidate = tangent(a[2] + r * recurrent[2]);
    of_a[2] = of_h * (one - z) * (one - candidate * candidate);
    of_a[1] = of_h * (h - candidate) * z * (one - z);
    of_a[0] = of_a[2] * recurrent[2] * r * (one - r);
    of_recurrent[0] = of_a[0];
    of_recurrent[1] = of_a[1];
    of_recurrent[2] = of_a[2] * r;
    return of_h * z;
  }
};

// a = drive + recurrent, except for the candidate of a cell that needs the two separately.
template <class Cell>
inline void join(const V* drive, const V* recurrent, V* a) {
  for (int g = 0; g < Cell::gates; ++g)
    a[g] = Cell::two_cotangents && g == Cell::gates - 1 ? drive[g] : drive[g] + recurrent[g];
}

// Whether threads share rows, which needs no synchronization. They do not if there are few rows, or if the weights are
// so large that each thread would load all of them into its cache at every step.
inline bool by_rows(const Sizes& s, int gates) { return s.batch >= 8 && 4 * gates * s.n * s.n <= (1 << 20); }

// The number of multiplications of a loop.
inline int64_t work(const Sizes& s, int gates) { return s.time * s.batch * s.n * s.n * gates; }

// Several threads only if they save more time than their start takes. Threads that share units also wait for each other
// at every step, which takes as long as thousands of multiplications.
inline int64_t threads(const Sizes& s, int gates, int64_t most) {
  return work(s, gates) > 1000000 && (by_rows(s, gates) || work(s, gates) / s.time > 10000) ? most : 1;
}

template <class Cell>
void run_forward(Sizes s, ffi::ThreadPool& pool, const float* drive, const float* panels, const float* bias,
                 const float* h_0, const float* c_0, float* h, float* c) {
  constexpr int G = Cell::gates, U = Cell::vectors, N = Cell::columns, parts_of_panel = G * U / N;
  const int64_t n = s.n, state = s.batch * n, sub = n * N * W, count = (n + U * W - 1) / (U * W);
  const bool rowwise = by_rows(s, G);
  in_parallel(pool, threads(s, G, rowwise ? s.batch / 4 : count / 2), work(s, G), [&](int part, int parts, Barrier& barrier) {
    const Range rows = rowwise ? share(s.batch, part, parts) : Range{0, s.batch};
    const Range mine = rowwise ? Range{0, count} : share(count, part, parts);
    const float *h_before = h_0, *c_before = c_0;
    for (int64_t i = 0; i < s.time; ++i) {
      const int64_t t = s.step(i);
      float *h_t = h + t * state, *c_t = Cell::has_c ? c + t * state : nullptr;
      for (int64_t p = mine.first; p < mine.last; ++p)
        in_blocks<Cell::rows>(rows.first, rows.last, [&](auto height, int64_t row) {
          constexpr int R = decltype(height)::value;
          V sums[parts_of_panel][R][N];
          constexpr int P = R == 1 ? parts_of_panel : 1;  // one row has too few sums to hide their latency
          for (int k = 0; k < parts_of_panel; k += P)
            product<P, R, N>(h_before + row * n, n, panels + (p * parts_of_panel + k) * sub, n, sums + k);
          for (int r = 0; r < R; ++r)
            for (int w = 0; w < U; ++w) {
              const int64_t u = (p * U + w) * W, left = n - u, at = (row + r) * n + u;
              if (left <= 0) continue;
              const float* d = drive + ((t * s.batch + row + r) * G) * n + u;
              V drives[G], recurrent[G], a[G], cell = Cell::has_c ? load(c_before + at, left) : V{};
              for (int g = 0; g < G; ++g) {
                const int column = w * G + g;
                drives[g] = load(d + g * n, left);
                recurrent[g] = sums[column / N][r][column % N];
                if (bias) recurrent[g] += load(bias + g * n + u, left);
              }
              join<Cell>(drives, recurrent, a);
              store(h_t + at, Cell::forward(a, recurrent, load(h_before + at, left), cell), left);
              if (Cell::has_c) store(c_t + at, cell, left);
            }
        });
      h_before = h_t;
      c_before = c_t;
      if (!rowwise) barrier.wait(parts);
    }
  });
}

// of_h and of_c are lambda of the state after the chunk on entry, and lambda of the state before the chunk on return.
template <class Cell>
void run_backward(Sizes s, ffi::ThreadPool& pool, const float* drive, const float* recurrent, const float* panels,
                  const float* h_before, const float* c_before, const float* of_kept, float* of_h, float* of_c,
                  float* of_drive, float* of_recurrent) {
  constexpr int G = Cell::gates, N = 2, R_MAX = 6;
  const int64_t n = s.n, state = s.batch * n, wide = (n + N * W - 1) / (N * W);
  const bool rowwise = by_rows(s, G);
  float* passes = Cell::two_cotangents ? of_recurrent : of_drive;  // the cotangent that the product reads
  in_parallel(pool, threads(s, G, rowwise ? s.batch / 4 : wide / 2), work(s, G), [&](int part, int parts, Barrier& barrier) {
    const Range rows = rowwise ? share(s.batch, part, parts) : Range{0, s.batch};
    const Range mine = rowwise ? Range{0, wide} : share(wide, part, parts);
    for (int64_t i = s.time - 1; i >= 0; --i) {
      const int64_t t = s.step(i);
      for (int64_t row = rows.first; row < rows.last; ++row)
        for (int64_t u = mine.first * N * W; u < std::min(n, mine.last * N * W); u += W) {
          const int64_t count = std::min<int64_t>(W, n - u), at = row * n + u, here = t * state + at;
          const int64_t gate = ((t * s.batch + row) * G) * n + u;
          V d[G], r[G], a[G], of_a[G], of_r[G], of_cell = Cell::has_c ? load(of_c + at, count) : V{};
          for (int g = 0; g < G; ++g) {
            d[g] = load(drive + gate + g * n, count);
            r[g] = load(recurrent + gate + g * n, count);
          }
          join<Cell>(d, r, a);
          const V of = load(of_h + at, count) + load(of_kept + here, count);
          const V cell = Cell::has_c ? load(c_before + here, count) : V{};
          store(of_h + at, Cell::backward(a, r, load(h_before + here, count), cell, of, of_cell, of_a, of_r), count);
          if (Cell::has_c) store(of_c + at, of_cell, count);
          for (int g = 0; g < G; ++g) {
            store(of_drive + gate + g * n, of_a[g], count);
            if (Cell::two_cotangents) store(of_recurrent + gate + g * n, of_r[g], count);
          }
        }
      if (!rowwise) barrier.wait(parts);
      for (int64_t p = mine.first; p < mine.last; ++p)
        in_blocks<R_MAX>(rows.first, rows.last, [&](auto height, int64_t row) {
          constexpr int R = decltype(height)::value;
          V sum[1][R][N];
          product<1, R, N>(passes + (t * s.batch + row) * G * n, G * n, panels + p * G * n * N * W, G * n, sum);
          for (int r = 0; r < R; ++r)
            for (int v = 0; v < N; ++v) {
              const int64_t u = (p * N + v) * W, count = std::min<int64_t>(W, n - u);
              if (count <= 0) continue;
              float* to = of_h + (row + r) * n + u;
              store(to, load(to, count) + sum[0][r][v], count);
            }
        });
    }
  });
}

// c_{t-1} of every step of an LSTM's chunk, step by step from c_0. All products with the weights are known.
void run_replay(Sizes s, ffi::ThreadPool& pool, const float* drive, const float* recurrent, const float* c_0,
                float* c_before) {
  const int64_t n = s.n, state = s.batch * n;
  in_parallel(pool, s.time * state > 100000 ? s.batch : 1, s.time * state, [&](int part, int parts, Barrier&) {
    const Range rows = share(s.batch, part, parts);
    for (int64_t i = 0; i < s.time; ++i) {
      const int64_t t = s.step(i), next = s.step(i + 1);
      for (int64_t row = rows.first; row < rows.last; ++row)
        for (int64_t u = 0; u < n; u += W) {
          const int64_t left = n - u, at = row * n + u, gate = (t * s.batch + row) * 4 * n + u;
          if (i == 0) store(c_before + t * state + at, load(c_0 + at, left), left);
          if (i + 1 == s.time) continue;
          V a[4];
          for (int g = 0; g < 3; ++g) a[g] = load(drive + gate + g * n, left) + load(recurrent + gate + g * n, left);
          const V c = sigmoid(a[1]) * load(c_before + t * state + at, left) + sigmoid(a[0]) * tangent(a[2]);
          store(c_before + next * state + at, c, left);
        }
    }
  });
}

using F32 = ffi::Buffer<ffi::F32>;
using Out = ffi::ResultBuffer<ffi::F32>;

// Calls body(piece) for every piece, on several threads if there are many floats in total.
template <class Body>
void for_pieces(ffi::ThreadPool& pool, int64_t pieces, int64_t floats, const Body& body) {
  in_parallel(pool, floats > 100000 ? pieces : 1, floats, [&](int part, int parts, Barrier&) {
    const Range mine = share(pieces, part, parts);
    for (int64_t p = mine.first; p < mine.last; ++p) body(p);
  });
}

ffi::Error expected(int64_t floats, Out panels) {
  if (static_cast<int64_t>(panels->element_count()) == floats) return ffi::Error::Success();
  return ffi::Error(ffi::ErrorCode::kInvalidArgument, "the panels of the kernel have another size than their caller gave");
}

// Packs W_hh (G n, n) in the order in which the forward loop reads it: [panel][product][k][column][8].
template <class Cell>
ffi::Error pack(ffi::ThreadPool& pool, F32 weights, Out panels) {
  constexpr int G = Cell::gates, U = Cell::vectors, N = Cell::columns;
  const int64_t n = weights.dimensions()[1], columns = (n + U * W - 1) / (U * W) * U * G;
  const float* from = weights.typed_data();
  float* to = panels->typed_data();
  if (ffi::Error error = expected(columns * n * W, panels); error.failure()) return error;
  for_pieces(pool, columns, columns * n * W, [&](int64_t column) {
    const int64_t g = column % G, first = column / G * W, units = std::min<int64_t>(W, n - first);
    const float* rows = from + (g * n + first) * n;
    float* panel = to + column / N * n * N * W + column % N * W;
    for (int64_t k = 0; k < n; ++k, panel += N * W)
      if (units == W)
        for (int64_t j = 0; j < W; ++j) panel[j] = rows[j * n + k];
      else
        for (int64_t j = 0; j < W; ++j) panel[j] = j < units ? rows[j * n + k] : 0.0f;
  });
  return ffi::Error::Success();
}

// Packs W_hh (G n, n) in the order in which the backward loop reads it: [column / 16][row][16].
ffi::Error pack_backward(ffi::ThreadPool pool, F32 weights, Out panels) {
  constexpr int64_t N = 2 * W;
  const int64_t depth = weights.dimensions()[0], n = weights.dimensions()[1], wide = (n + N - 1) / N;
  if (ffi::Error error = expected(wide * depth * N, panels); error.failure()) return error;
  for_pieces(pool, wide, depth * n, [&](int64_t p) {
    const int64_t units = std::min(N, n - p * N);
    const float* from = weights.typed_data() + p * N;
    float* to = panels->typed_data() + p * depth * N;
    for (int64_t k = 0; k < depth; ++k, from += n, to += N)
      for (int64_t j = 0; j < N; ++j) to[j] = j < units ? from[j] : 0.0f;
  });
  return ffi::Error::Success();
}

Sizes sizes(F32 states, bool reverse) {
  const auto d = states.dimensions();
  return {d[0], d[1], d[2], reverse};
}

// Calls run with the cell that has this number of gates.
template <class Run>
void of_gates(int64_t gates, Run&& run) {
  if (gates == 4) run(LSTM{});
  if (gates == 3) run(GRU{});
  if (gates == 1) run(Vanilla{});
}

ffi::Error pack_forward(ffi::ThreadPool pool, int64_t gates, F32 weights, Out panels) {
  ffi::Error error = ffi::Error::Success();
  of_gates(gates, [&](auto cell) { error = pack<decltype(cell)>(pool, weights, panels); });
  return error;
}

ffi::Error forward(ffi::ThreadPool pool, int64_t gates, bool reverse, F32 drive, F32 panels, F32 bias, F32 h_0, F32 c_0,
                   Out h, Out c) {
  const auto d = drive.dimensions();
  const Sizes s{d[0], d[1], h_0.dimensions()[1], reverse};
  const float* b = bias.element_count() ? bias.typed_data() : nullptr;
  of_gates(gates, [&](auto cell) {
    run_forward<decltype(cell)>(s, pool, drive.typed_data(), panels.typed_data(), b, h_0.typed_data(),
                                c_0.typed_data(), h->typed_data(), c->typed_data());
  });
  return ffi::Error::Success();
}

ffi::Error backward(ffi::ThreadPool pool, int64_t gates, bool reverse, F32 drive, F32 recurrent, F32 panels,
                    F32 h_before, F32 c_before, F32 of_kept, F32 of_h, F32 of_c, Out of_h_0, Out of_c_0, Out of_drive,
                    Out of_recurrent) {
  std::memcpy(of_h_0->typed_data(), of_h.typed_data(), of_h.size_bytes());
  std::memcpy(of_c_0->typed_data(), of_c.typed_data(), of_c.size_bytes());
  of_gates(gates, [&](auto cell) {
    run_backward<decltype(cell)>(sizes(h_before, reverse), pool, drive.typed_data(), recurrent.typed_data(),
                                 panels.typed_data(), h_before.typed_data(), c_before.typed_data(),
                                 of_kept.typed_data(), of_h_0->typed_data(), of_c_0->typed_data(),
                                 of_drive->typed_data(), of_recurrent->typed_data());
  });
  return ffi::Error::Success();
}

ffi::Error replay(ffi::ThreadPool pool, bool reverse, F32 drive, F32 recurrent, F32 c_0, Out c_before) {
  const auto d = c_before->dimensions();
  run_replay({d[0], d[1], d[2], reverse}, pool, drive.typed_data(), recurrent.typed_data(), c_0.typed_data(),
             c_before->typed_data());
  return ffi::Error::Success();
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(seqjax_replay, replay,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Attr<bool>("reverse")
                                  .Arg<F32>()
                                  .Arg<F32>()
                                  .Arg<F32>()
                                  .Ret<F32>());
XLA_FFI_DEFINE_HANDLER_SYMBOL(seqjax_pack_forward, pack_forward,
                              ffi::Ffi::Bind().Ctx<ffi::ThreadPool>().Attr<int64_t>("gates").Arg<F32>().Ret<F32>());
XLA_FFI_DEFINE_HANDLER_SYMBOL(seqjax_pack_backward, pack_backward,
                              ffi::Ffi::Bind().Ctx<ffi::ThreadPool>().Arg<F32>().Ret<F32>());
XLA_FFI_DEFINE_HANDLER_SYMBOL(seqjax_forward, forward,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Attr<int64_t>("gates")
                                  .Attr<bool>("reverse")
                                  .Arg<F32>()
                                  .Arg<F32>()
                                  .Arg<F32>()
                                  .Arg<F32>()
                                  .Arg<F32>()
                                  .Ret<F32>()
                                  .Ret<F32>());
XLA_FFI_DEFINE_HANDLER_SYMBOL(seqjax_backward, backward,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Attr<int64_t>("gates")
                                  .Attr<bool>("reverse")
                                  .Arg<F32>()
                                  .Arg<F32>()
                                  .Arg<F32>()
                                  .Arg<F32>()
                                  .Arg<F32>()
                                  .Arg<F32>()
                                  .Arg<F32>()
                                  .Arg<F32>()
                                  .Ret<F32>()
                                  .Ret<F32>()
                                  .Ret<F32>()
                                  .Ret<F32>());
