// Products of rows with packed weights, and how threads share the work. Each variant of the loops includes this file
// once. All is in an unnamed namespace, because variants must not share code.

#pragma once

#include "loops.h"
#include "vectors.h"

namespace seqjax {
namespace {

// One k of sum[product][row][column] += a[row][k] panel[product][k][column], where the panels are `apart` numbers
// apart.
template <int P, int R, int N>
inline void add_product(const real* const (&a)[R], int64_t k, const real* panel, int64_t apart, V (&sum)[P][R][N]) {
  for (int p = 0; p < P; ++p) {
    V columns[N];
    for (int v = 0; v < N; ++v) {
      columns[v] = load(panel + p * apart + (k * N + v) * W);
      if (R > 1) keep(columns[v]);
    }
    for (int r = 0; r < R; ++r) {
      const V x = splat(a[r][k]);
      for (int v = 0; v < N; ++v) sum[p][r][v] += x * columns[v];
    }
  }
}

// sum_k a[row][k] panel[product][k][column] for R rows and N vectors of columns of P products, with all sums in
// registers. Six rows of two vectors, or four rows of three, fit into sixteen registers and hide the latency of an
// addition. Fewer sums do not hide it, so they add up both halves of the k at the same time. More sums add up one half
// after the other, so that the result does not depend on the number of rows. Not inlined, because together with other
// code the compiler runs out of registers inside the loop.
template <int P, int R, int N>
__attribute__((noinline)) void product(const real* const (&rows)[R], const real* panel, int64_t depth, V (*sum)[R][N]) {
  const real* a[R];
  for (int r = 0; r < R; ++r) a[r] = rows[r];
  const int64_t apart = depth * N * W, half = depth < 16 ? 0 : depth / 2;
  V first[P][R][N] = {}, second[P][R][N] = {};
  int64_t k = 0;
  if (P * R * N < 8)
    for (; k < half; ++k) {
      add_product<P, R, N>(a, k, panel, apart, first);
      add_product<P, R, N>(a, half + k, panel, apart, second);
    }
  else
    for (; k < half; ++k) add_product<P, R, N>(a, k, panel, apart, first);
  for (k = P * R * N < 8 ? 2 * half : half; k < depth; ++k) add_product<P, R, N>(a, k, panel, apart, second);
  for (int p = 0; p < P; ++p)
    for (int r = 0; r < R; ++r)
      for (int v = 0; v < N; ++v) sum[p][r][v] = first[p][r][v] + second[p][r][v];
}

template <int n>
struct Number {
  static constexpr int value = n;
};

inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

// Calls body(R, row) for blocks of R <= `most` rows that cover first..last, with blocks as equal as possible.
template <int most, class Body>
inline void in_blocks(int64_t first, int64_t last, Body&& body) {
  while (first < last) {
    const int64_t left = last - first, blocks = (left + most - 1) / most, height = (left + blocks - 1) / blocks;
    auto call = [&](auto rows) {
      if constexpr (decltype(rows)::value <= most)
        if (height == decltype(rows)::value) body(rows, first);
    };
    call(Number<1>{});
    call(Number<2>{});
    call(Number<3>{});
    call(Number<4>{});
    call(Number<5>{});
    call(Number<6>{});
    call(Number<7>{});
    call(Number<8>{});
    call(Number<9>{});
    call(Number<10>{});
    call(Number<11>{});
    call(Number<12>{});
    first += height;
  }
}

// Calls body(part, parts, barrier) for up to `wanted` parts, on several threads. If `waits`, they use the barrier.
template <class Body>
void in_parallel(const Pool& pool, int64_t wanted, bool waits, int64_t work, const Body& body) {
  const auto call = [](const void* argument, int part, int parts, Barrier* barrier) {
    (*static_cast<const Body*>(argument))(part, parts, barrier);
  };
  pool.run(pool.threads, wanted, waits, work, call, &body);
}

struct Range {
  int64_t first, last;
};

inline Range share(int64_t size, int part, int parts) { return {size * part / parts, size * (part + 1) / parts}; }

// Whether threads share rows, which needs no synchronization. They do not if there are few rows, or if the weights are
// so large that each thread would load all of them into its cache at every step. On a busy machine, waiting is worse.
inline bool by_rows(const Pool& pool, const Sizes& s, int gates) {
  const int64_t bytes = int64_t(sizeof(real)) * gates * s.n * s.n;
  return s.batch >= 8 && (bytes <= (1 << 20) || pool.is_busy);
}

// The number of multiplications of some steps.
inline int64_t work(const Sizes& s, int gates, int64_t steps) { return steps * s.batch * s.n * s.n * gates; }

// Several threads only if they save more time than their start takes. Threads that share units also wait for each other
// at every step, which takes as long as thousands of multiplications.
inline int64_t threads(const Sizes& s, int gates, int64_t steps, bool rowwise, int64_t most) {
  return work(s, gates, steps) > 1000000 && (rowwise || work(s, gates, 1) > 10000) ? most : 1;
}

// Calls body(piece) for every piece, on several threads if there are many numbers in total.
template <class Body>
void for_pieces(const Pool& pool, int64_t pieces, int64_t numbers, const Body& body) {
  in_parallel(pool, numbers > 100000 ? pieces : 1, false, numbers, [&](int part, int parts, Barrier*) {
    const Range mine = share(pieces, part, parts);
    for (int64_t p = mine.first; p < mine.last; ++p) body(p);
  });
}

}  // namespace
}  // namespace seqjax
