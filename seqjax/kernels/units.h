// The loops of any cell that acts unit by unit between its products, as instructions for vectors of units. Each variant
// of the loops includes this file once. All is in an unnamed namespace, because variants must not share code.
//
// An instruction is five numbers: the operation, the register of its result, and the registers that it reads. `load`
// and `store` have a register, an array and a position in it. A register has one vector for each of some rows. Booleans
// are the numbers 0 and 1.

#pragma once

#include "loops.h"
#include "products.h"
#include "vectors.h"

namespace seqjax {
namespace {

// In the order of seqjax.sequence._execution.instructions.OPERATIONS.
enum Operation : int32_t {
  op_load,
  op_store,
  op_add,
  op_sub,
  op_mul,
  op_div,
  op_neg,
  op_abs,
  op_sqrt,
  op_exp,
  op_tanh,
  op_logistic,
  op_max,
  op_min,
  op_eq,
  op_ne,
  op_lt,
  op_le,
  op_gt,
  op_ge,
  op_and,
  op_or,
  op_not,
  op_select,
  op_round
};
constexpr int operation_numbers = 5, register_count = 48, most_rows = has_32_registers ? 12 : 6, most_blocks = 16;

using Register = V[most_rows];

// Where the arrays are at one step.
struct Bases {
  real** base;
  int64_t* by_row;
  bool* by_unit;
};

inline V square_root(V x) {
  real numbers[W];
  store(numbers, x);
  for (int j = 0; j < W; ++j) numbers[j] = real(__builtin_sqrt(double(numbers[j])));
  return load(numbers);
}

// exp with infinity and zero beyond the range of `exponential`.
inline V wide_exponential(V x) {
  const V root = exponential(x * splat(real(0.5)));
  return root * root;
}

// To the nearest number of bfloat16, ties to even.
inline V rounded(V x) {
  if (sizeof(real) != sizeof(float)) return x;
  const I bits = reinterpret_cast<I>(x), is_odd = (bits >> 16) & 1;
  const I nearest = (bits + is_odd + 0x7fff) & ~0xffff;
  return x == x ? reinterpret_cast<V>(nearest) : x;
}

// Runs instructions for R rows from `row` on and the vector of units from `u` on, of which the first `left` exist.
__attribute__((noinline)) void execute(const int32_t* code, const int32_t* end, const Bases& bases, Register* registers,
                                       int R, int64_t row, int64_t u, int64_t left) {
  const V zero{}, one = splat(1);
  for (; code < end; code += operation_numbers) {
    V* d = registers[code[1]];
    if (code[0] <= op_store) {
      const int array = code[2];
      const int64_t by_row = bases.by_row[array];
      real* p = bases.base[array] + code[3] + (bases.by_unit[array] ? u : 0) + row * by_row;
      if (code[0] == op_store)
        for (int r = 0; r < R; ++r) store(p + r * by_row, d[r], left);
      else if (!bases.by_unit[array])
        for (int r = 0; r < R; ++r) d[r] = splat(p[r * by_row]);
      else if (left >= W)
        for (int r = 0; r < R; ++r) d[r] = load(p + r * by_row);
      else
        for (int r = 0; r < R; ++r) d[r] = load(p + r * by_row, left);
      continue;
    }
    const V *a = registers[code[2]], *b = registers[code[3]], *c = registers[code[4]];
#define SEQJAX_EACH(operation, result)            \
  case operation:                                 \
    for (int r = 0; r < R; ++r) d[r] = V(result); \
    break
    switch (code[0]) {
      SEQJAX_EACH(op_add, a[r] + b[r]);
      SEQJAX_EACH(op_sub, a[r] - b[r]);
      SEQJAX_EACH(op_mul, a[r] * b[r]);
      SEQJAX_EACH(op_div, a[r] / b[r]);
      SEQJAX_EACH(op_neg, -a[r]);
      SEQJAX_EACH(op_abs, a[r] < zero ? -a[r] : a[r]);
      SEQJAX_EACH(op_sqrt, square_root(a[r]));
      SEQJAX_EACH(op_exp, wide_exponential(a[r]));
      SEQJAX_EACH(op_tanh, tangent(a[r]));
      SEQJAX_EACH(op_logistic, sigmoid(a[r]));
      // NaN propagates.
      SEQJAX_EACH(op_max, a[r] > b[r] ? a[r] : b[r] >= a[r] ? b[r] : a[r] + b[r]);
      SEQJAX_EACH(op_min, a[r] < b[r] ? a[r] : b[r] <= a[r] ? b[r] : a[r] + b[r]);
      SEQJAX_EACH(op_eq, a[r] == b[r] ? one : zero);
      SEQJAX_EACH(op_ne, a[r] != b[r] ? one : zero);
      SEQJAX_EACH(op_lt, a[r] < b[r] ? one : zero);
      SEQJAX_EACH(op_le, a[r] <= b[r] ? one : zero);
      SEQJAX_EACH(op_gt, a[r] > b[r] ? one : zero);
      SEQJAX_EACH(op_ge, a[r] >= b[r] ? one : zero);
      SEQJAX_EACH(op_and, a[r] * b[r]);
      SEQJAX_EACH(op_or, a[r] > b[r] ? a[r] : b[r]);
      SEQJAX_EACH(op_not, one - a[r]);
      SEQJAX_EACH(op_select, a[r] != zero ? c[r] : b[r]);
      SEQJAX_EACH(op_round, rounded(a[r]));
    }
#undef SEQJAX_EACH
  }
}

using UnitArray = Of<real>::UnitArray;
using UnitProduct = Of<real>::UnitProduct;
using Units = Of<real>::Units;

// The i-th step of the loop is step t of the arrays.
inline void find_bases(const Units& f, int64_t i, const Bases& bases) {
  const Sizes& s = f.sizes;
  const int64_t t = s.step(i);
  for (int64_t k = 0; k < f.array_count; ++k) {
    const UnitArray& array = f.arrays[k];
    const int64_t of_step = s.batch * array.width;
    bases.base[k] = array.data;
    if (array.layout == Of<real>::steps || array.layout == Of<real>::step_numbers) bases.base[k] += t * of_step;
    if (array.layout == Of<real>::before && i > 0) bases.base[k] = f.arrays[array.of].data + s.step(i - 1) * of_step;
    const bool is_shared = array.layout == Of<real>::shared || array.layout == Of<real>::numbers;
    bases.by_row[k] = is_shared ? 0 : array.width;
    bases.by_unit[k] = array.layout != Of<real>::step_numbers && array.layout != Of<real>::numbers;
  }
}

// The products of R rows with the panels of all blocks. The second vectors of units go to `second`.
template <int R>
void multiply(const UnitProduct& f, const real* const (&rows)[R], int64_t n, int64_t panel, Register* first,
              Register* second) {
  const int64_t depth = f.depth * n, size = depth * 2 * W;
  const real* panels = f.panels + panel * f.blocks * size;
  const auto some = [&](auto count, int64_t g) {
    constexpr int P = decltype(count)::value;
    V sum[P][R][2];
    product<P, R, 2>(rows, panels + g * size, depth, sum);
    for (int p = 0; p < P; ++p)
      for (int r = 0; r < R; ++r) first[g + p][r] = sum[p][r][0], second[g + p][r] = sum[p][r][1];
  };
  int64_t g = 0;
  if constexpr (R == 1)  // one row has too few sums to hide their latency
    for (; g + 2 <= f.blocks; g += 2) some(Number<2>{}, g);
  for (; g < f.blocks; ++g) some(Number<1>{}, g);
}

void run_units(const Pool& pool, const Units& f) {
  const Sizes& s = f.sizes;
  const int64_t n = s.n, wide = (n + 2 * W - 1) / (2 * W);
  int64_t matrices = 0;
  for (int64_t k = 0; k < f.product_count; ++k) matrices += f.products[k].depth * f.products[k].blocks;
  const bool rowwise = by_rows(pool, s, matrices);
  in_parallel(pool, threads(s, matrices, s.time, rowwise, rowwise ? s.batch / 4 : wide / 2), !rowwise,
              work(s, matrices, s.time), [&](int part, int parts, Barrier* barrier) {
                const Range rows = rowwise ? share(s.batch, part, parts) : Range{0, s.batch};
                const Range mine = rowwise ? Range{0, wide} : share(wide, part, parts);
                const int64_t first_unit = mine.first * 2 * W, last_unit = smaller(n, mine.last * 2 * W);
                const Bases bases = {new real*[f.array_count], new int64_t[f.array_count], new bool[f.array_count]};
                Register registers[register_count], second[most_blocks];
                for (int64_t i = 0; i < s.time; ++i) {
                  find_bases(f, i, bases);
                  if (f.ends[0] > 0) {
                    in_blocks<most_rows>(rows.first, rows.last, [&](auto height, int64_t first) {
                      for (int64_t u = first_unit; u < last_unit; u += W)
                        execute(f.code, f.code + f.ends[0], bases, registers, decltype(height)::value, first, u, n - u);
                    });
                    if (!rowwise) pool.wait(barrier, parts);
                  }
                  for (int64_t k = 0; k < f.product_count; ++k) {
                    const UnitProduct& product = f.products[k];
                    const int32_t *code = f.code + f.ends[k], *end = f.code + f.ends[k + 1];
                    const real* operands = bases.base[product.array] + product.offset;
                    for (int64_t p = mine.first; p < mine.last; ++p)
                      in_blocks<most_rows>(rows.first, rows.last, [&](auto height, int64_t first) {
                        constexpr int R = decltype(height)::value;
                        const real* a[R];
                        for (int r = 0; r < R; ++r) a[r] = operands + (first + r) * bases.by_row[product.array];
                        multiply<R>(product, a, n, p, registers, second);
                        const int64_t u = p * 2 * W;
                        execute(code, end, bases, registers, R, first, u, n - u);
                        if (u + W >= n) return;
                        for (int64_t g = 0; g < product.blocks; ++g)
                          for (int r = 0; r < R; ++r) registers[g][r] = second[g][r];
                        execute(code, end, bases, registers, R, first, u + W, n - u - W);
                      });
                    if (!rowwise) pool.wait(barrier, parts);
                  }
                }
                delete[] bases.base;
                delete[] bases.by_row;
                delete[] bases.by_unit;
              });
}

// Weights (blocks * n, n) in the order in which the loop reads them: [panel][block][k][2W].
int64_t pack_units(const Pool& pool, int64_t n, int64_t rows, const real* weights, real* panels) {
  constexpr int64_t N = 2 * W;
  const int64_t blocks = rows / n, wide = (n + N - 1) / N;
  if (panels)
    for_pieces(pool, wide * blocks, rows * n, [&](int64_t piece) {
      const int64_t first = piece / blocks * N, units = smaller(N, n - first);
      const real* from = weights + (piece % blocks * n + first) * n;
      real* to = panels + piece * n * N;
      for (int64_t k = 0; k < n; ++k, to += N)
        for (int64_t j = 0; j < N; ++j) to[j] = j < units ? from[j * n + k] : real(0);
    });
  return wide * blocks * n * N;
}

}  // namespace
}  // namespace seqjax
