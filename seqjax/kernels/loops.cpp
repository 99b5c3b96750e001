// The loops of seqjax.sequence._partition for LSTM, GRU and vanilla networks in float32 or float64: the forward pass
// through a chunk; the backward recurrence of lambda_t = dL/ds_t; and the recomputation of an LSTM's c_t if only h_t
// was saved.
//
// Every step is one product with the recurrent weights and one pass over the units. The weights are packed into panels
// of one vector of units, with all gates of a unit next to each other. So the product with one panel is enough for the
// new state of its units. XLA moves the packing out of the loop over chunks. Threads share the rows of the batch, which
// are independent. If there are too few rows, the threads share units instead and wait for each other once per step. A
// row whose step is masked takes part in no product.
//
// The result of a row depends neither on the other rows nor on the number of threads, to the last bit.
//
// Names: of_x is the cotangent of x, dL/dx. A drive is the part of a gate's argument that does not depend on the state,
// and `recurrent` is the product with the recurrent weights.

#include "loops.h"

#include "products.h"
#include "units.h"
#include "vectors.h"

namespace seqjax {
namespace {

using Flags = Of<real>::Flags;
using State = Of<real>::State;
using ConstState = Of<real>::ConstState;
using Forward = Of<real>::Forward;
using Backward = Of<real>::Backward;
using Gradient = Of<real>::Gradient;
using TableGradient = Of<real>::TableGradient;
using Replay = Of<real>::Replay;
using Loops = Of<real>::Loops;

// A cell has: the number of gates; the size of its panel of packed weights, in vectors of units; the columns of
// one product, in vectors; the number of rows per product; and its equations for one vector of units. All arrays have
// one vector per gate. `a` is the argument of the gates, and `s` are the gates.
struct LSTM {
  static constexpr int gates = 4, vectors = 1, columns = 2, rows = has_32_registers ? 12 : 6;
  static constexpr bool has_c = true, two_cotangents = false;
  static void activate(const V* a, V, V* s) {
    s[0] = sigmoid(a[0]), s[1] = sigmoid(a[1]), s[2] = tangent(a[2]), s[3] = sigmoid(a[3]);
  }
  static V next(const V* s, V, V& c) {
    c = s[1] * c + s[0] * s[2];
    return s[3] * tangent(c);
  }
  // Reads dL/dh_t and dL/dc_t. Writes dL/da_t and dL/dc_{t-1}, and returns the part of dL/dh_{t-1} that does not pass
  // through the product.
  static V backward(const V* s, V, V, V c, V of_h, V& of_c, V* of_a, V*) {
    const V i = s[0], f = s[1], g = s[2], o = s[3], one = splat(1), t = tangent(f * c + i * g);
    const V through = of_c + of_h * o * (one - t * t);
    of_a[0] = through * g * i * (one - i);
    of_a[1] = through * c * f * (one - f);
    of_a[2] = through * i * (one - g * g);
    of_a[3] = of_h * t * o * (one - o);
    of_c = through * f;
    return V{};
  }
};

// h_t = F(drive + recurrent), where F also has the product of a number with its derivative, from h_t.
template <class F>
struct Vanilla {
  static constexpr int gates = 1, vectors = 2, columns = 2, rows = has_32_registers ? 12 : 6;
  static constexpr bool has_c = false, two_cotangents = false;
  static void activate(const V* a, V, V* s) { s[0] = F::value(a[0]); }
  static V next(const V* s, V, V&) { return s[0]; }
  static V backward(const V* s, V, V, V, V of_h, V&, V* of_a, V*) {
    of_a[0] = F::times_derivative(of_h, s[0]);
    return V{};
  }
};

struct Tanh {
  static V value(V a) { return tangent(a); }
  static V times_derivative(V x, V h) { return x * (splat(1) - h * h); }
};

// NaN is not smaller than 0, so it stays.
struct Relu {
  static V value(V a) { return a < V{} ? V{} : a; }
  static V times_derivative(V x, V h) { return h > V{} ? x : V{}; }
};

struct Identity {
  static V value(V a) { return a; }
  static V times_derivative(V x, V) { return x; }
};

// With the reset gate after the product, and with the update gate z as the factor of the old state. `a` is drive +
// recurrent, except for the candidate: a[2] is only its drive, and `product` is its recurrent product.
struct GRU {
  static constexpr int gates = 3, vectors = 1, columns = 3, rows = has_32_registers ? 8 : 4;
  static constexpr bool has_c = false, two_cotangents = true;
  static void activate(const V* a, V product, V* s) {
    s[0] = sigmoid(a[0]), s[1] = sigmoid(a[1]), s[2] = tangent(a[2] + s[0] * product);
  }
  static V next(const V* s, V h, V&) { return s[2] + s[1] * (h - s[2]); }
  static V backward(const V* s, V product, V h, V, V of_h, V&, V* of_a, V* of_recurrent) {
    const V r = s[0], z = s[1], candidate = s[2], one = splat(1);
    of_a[2] = of_h * (one - z) * (one - candidate * candidate);
    of_a[1] = of_h * (h - candidate) * z * (one - z);
    of_a[0] = of_a[2] * product * r * (one - r);
    of_recurrent[0] = of_a[0];
    of_recurrent[1] = of_a[1];
    of_recurrent[2] = of_a[2] * r;
    return of_h * z;
  }
};

// The gates from the drives, to which the recurrent products are added, except for the candidate of a GRU.
template <class Cell>
inline void activate(const V* drive, const V* recurrent, V* s) {
  V a[Cell::gates];
  for (int g = 0; g < Cell::gates; ++g)
    a[g] = Cell::two_cotangents && g == Cell::gates - 1 ? drive[g] : drive[g] + recurrent[g];
  Cell::activate(a, recurrent[Cell::gates - 1], s);
}

// The drives of one vector of units, with their biases. `d` and `bias` are the first gate's.
template <class Cell>
inline void load_drives(const real* d, const real* bias, int64_t n, int64_t count, V* drives) {
  for (int g = 0; g < Cell::gates; ++g) {
    drives[g] = load(d + g * n, count);
    if (bias) drives[g] += load(bias + g * n, count);
  }
}

// The rows of a step that are valid, each with the state from which its step starts: the state before, or the one after
// a reset. Without flags, these are all rows, and nothing is stored.
template <bool flagged>
class Rows {
 public:
  Rows(const Sizes& s, const Flags& flags) : s(s), flags(flags) {
    if (flagged) rows = new Row[s.batch];
  }
  ~Rows() { delete[] rows; }
  Rows(const Rows&) = delete;

  // The valid rows of step t among `range`, where the states before the step are `apart` numbers apart. `held` is
  // called with each other row.
  template <class Held>
  Range select(int64_t t, Range range, ConstState before, int64_t apart, const Held& held) {
    start = before;
    stride = apart;
    if (!flagged) return range;
    int64_t count = 0;
    for (int64_t row = range.first; row < range.last; ++row) {
      const int64_t at = s.at(t, row), from = row * apart;
      const bool anew = flags.reset && flags.reset[at];
      const Row chosen = {row, anew ? flags.h : before.h + from,
                          !before.c ? nullptr
                          : anew    ? flags.c
                                    : before.c + from};
      if (!flags.valid || flags.valid[at])
        rows[count++] = chosen;
      else
        held(chosen.row, chosen.h, chosen.c);
    }
    return {0, count};
  }
  int64_t row(int64_t i) const { return flagged ? rows[i].row : i; }
  const real* h(int64_t i) const { return flagged ? rows[i].h : start.h + i * stride; }
  const real* c(int64_t i) const { return flagged ? rows[i].c : start.c + i * stride; }

 private:
  struct Row {
    int64_t row;
    const real *h, *c;
  };
  const Sizes s;
  const Flags flags;
  ConstState start;
  int64_t stride = 0;
  Row* rows = nullptr;
};

template <class Cell, bool flagged>
void run_forward(const Pool& pool, const Forward& f) {
  constexpr int G = Cell::gates, U = Cell::vectors, N = Cell::columns, parts_of_panel = G * U / N;
  const Sizes& s = f.sizes;
  const int64_t n = s.n, state = s.batch * n, sub = n * N * W, count = (n + U * W - 1) / (U * W);
  const bool rowwise = by_rows(pool, s, G);
  const int64_t steps = f.last_step - f.first_step;
  in_parallel(
      pool, threads(s, G, steps, rowwise, rowwise ? s.batch / 4 : count / 2), !rowwise, work(s, G, steps),
      [&](int part, int parts, Barrier* barrier) {
        const Range share_of_rows = rowwise ? share(s.batch, part, parts) : Range{0, s.batch};
        const Range mine = rowwise ? Range{0, count} : share(count, part, parts);
        const int64_t first_unit = mine.first * U * W, last_unit = smaller(n, mine.last * U * W);
        Rows<flagged> rows(s, f.flags);
        ConstState before = f.first;
        if (f.first_step > 0) {
          const int64_t at = (f.first_step + 1) % 2 * state;
          before = {f.buffers.h + at, Cell::has_c ? f.buffers.c + at : nullptr};
        }
        for (int64_t i = f.first_step; i < f.last_step; ++i) {
          const int64_t t = s.step(i);
          // The rows of one step of batch-major arrays are far apart, often by a multiple of the size of a cache way.
          // So the products read the states from a buffer, and the states are stored a second time.
          const real* next_h = s.batch_major ? f.buffers.h + i % 2 * state : f.states.h + t * state;
          const real* next_c = !Cell::has_c    ? nullptr
                               : s.batch_major ? f.buffers.c + i % 2 * state
                                               : f.states.c + t * state;
          const State after = {const_cast<real*>(next_h), const_cast<real*>(next_c)};
          const auto store_state = [&](int64_t row, int64_t u, V h, V c, int64_t left) {
            store(after.h + row * n + u, h, left);
            if (Cell::has_c) store(after.c + row * n + u, c, left);
            if (!s.batch_major) return;
            const int64_t to = s.at(t, row) * n + u;
            store(f.states.h + to, h, left);
            if (Cell::has_c) store(f.states.c + to, c, left);
          };
          const Range active = rows.select(t, share_of_rows, before, n, [&](int64_t row, const real* h, const real* c) {
            for (int64_t u = first_unit; u < last_unit; u += W)
              store_state(row, u, load(h + u, n - u), Cell::has_c ? load(c + u, n - u) : V{}, n - u);
          });
          for (int64_t p = mine.first; p < mine.last; ++p)
            in_blocks<Cell::rows>(active.first, active.last, [&](auto height, int64_t first) {
              constexpr int R = decltype(height)::value;
              const real* h[R];
              for (int r = 0; r < R; ++r) h[r] = rows.h(first + r);
              V sums[parts_of_panel][R][N];
              constexpr int P = R == 1 ? parts_of_panel : 1;  // one row has too few sums to hide their latency
              for (int k = 0; k < parts_of_panel; k += P)
                product<P, R, N>(h, f.panels + (p * parts_of_panel + k) * sub, n, sums + k);
              for (int r = 0; r < R; ++r)
                for (int w = 0; w < U; ++w) {
                  const int64_t u = (p * U + w) * W, left = n - u, row = rows.row(first + r), at = s.at(t, row);
                  if (left <= 0) continue;
                  V drives[G], recurrent[G], gates[G], c = Cell::has_c ? load(rows.c(first + r) + u, left) : V{};
                  const real* drive = f.drive + (f.tokens ? f.tokens[at] : at) * G * n + u;
                  load_drives<Cell>(drive, f.drive_bias ? f.drive_bias + u : nullptr, n, left, drives);
                  for (int g = 0; g < G; ++g) {
                    const int column = w * G + g;
                    recurrent[g] = sums[column / N][r][column % N];
                    if (f.bias) recurrent[g] += load(f.bias + g * n + u, left);
                  }
                  activate<Cell>(drives, recurrent, gates);
                  const V next = Cell::next(gates, load(h[r] + u, left), c);
                  store_state(row, u, next, c, left);
                  if (!f.gates) continue;
                  for (int g = 0; g < G; ++g) store(f.gates + (at * G + g) * n + u, gates[g], left);
                  if (Cell::two_cotangents) store(f.candidate + at * n + u, recurrent[G - 1], left);
                }
            });
          before = {after.h, after.c};
          if (!rowwise) pool.wait(barrier, parts);
        }
      });
}

template <class Cell, bool flagged>
void run_backward(const Pool& pool, const Backward& b) {
  constexpr int G = Cell::gates, N = 2, most = has_32_registers ? 12 : 6;
  const Sizes& s = b.sizes;
  const int64_t n = s.n, wide = (n + N * W - 1) / (N * W);
  const bool rowwise = by_rows(pool, s, G), has_reset = flagged && b.flags.reset;
  const int64_t vectors = (n + W - 1) / W, all_rows = (b.last_step - b.first_step) * s.batch;
  // The rows of the cotangents that the product reads at a step.
  const auto passes = [&](int64_t t, int64_t row) {
    if (b.saved) return b.rows.of_step + (t % 2 * s.batch + row) * b.rows.stride;
    return (Cell::two_cotangents ? b.of_recurrent : b.of_drive) + s.at(t, row) * G * n;
  };
  const auto of_product = [&](int64_t t, int64_t row, int64_t in_rows, int64_t g, int64_t u, V v, int64_t left) {
    store(passes(t, row) + g * n + u, v, left);
    if (b.saved) store(b.rows.of_products + ((g * vectors + u / W) * all_rows + in_rows) * W, v);
  };
  const int64_t steps = b.last_step - b.first_step;
  in_parallel(
      pool, threads(s, G, steps, rowwise, rowwise ? s.batch / 4 : wide / 2), !rowwise, work(s, G, steps),
      [&](int part, int parts, Barrier* barrier) {
        const Range share_of_rows = rowwise ? share(s.batch, part, parts) : Range{0, s.batch};
        const Range mine = rowwise ? Range{0, wide} : share(wide, part, parts);
        const int64_t first_unit = mine.first * N * W, last_unit = smaller(n, mine.last * N * W);
        Rows<flagged> rows(s, b.flags);
        for (int64_t i = b.last_step - 1; i >= b.first_step; --i) {
          const int64_t t = s.step(i), in_rows = (i - b.first_step) * s.batch, apart = n * (s.at(t, 1) - s.at(t, 0));
          const int64_t from = s.at(b.saved && i > 0 ? s.step(i - 1) : t, 0) * n;
          const bool is_first = b.saved && i == 0;
          const real *h = is_first ? b.first.h : b.states.h + from, *c = is_first ? b.first.c : b.states.c + from;
          const ConstState before = {h, Cell::has_c ? c : nullptr};
          const Range active =
              rows.select(t, share_of_rows, before, is_first ? n : apart, [&](int64_t row, const real*, const real*) {
                for (int64_t u = first_unit; u < last_unit; u += W) {
                  const int64_t left = n - u, to = row * n + u, at = s.at(t, row), gate = at * G * n + u;
                  store(b.of_state.h + to, load(b.of_state.h + to, left) + load(b.of_outputs + at * n + u, left), left);
                  for (int g = 0; g < G; ++g) {
                    store(b.of_drive + gate + g * n, V{}, left);
                    if (b.saved || Cell::two_cotangents) of_product(t, row, in_rows + row, g, u, V{}, left);
                  }
                  if (b.saved) store(b.rows.operands + (u / W * all_rows + in_rows + row) * W, V{});
                }
              });
          for (int64_t j = active.first; j < active.last; ++j) {
            const int64_t row = rows.row(j), at = s.at(t, row);
            for (int64_t u = first_unit; u < last_unit; u += W) {
              const int64_t left = n - u, to = row * n + u, gate = at * G * n + u;
              V gates[G], product{}, of_a[G], of_r[G], of_cell = Cell::has_c ? load(b.of_state.c + to, left) : V{};
              if (b.saved) {
                for (int g = 0; g < G; ++g) gates[g] = load(b.drive + gate + g * n, left);
                if (Cell::two_cotangents) product = load(b.recurrent + at * n + u, left);
              } else {
                V d[G], r[G];
                load_drives<Cell>(b.drive + gate, b.drive_bias ? b.drive_bias + u : nullptr, n, left, d);
                for (int g = 0; g < G; ++g) r[g] = load(b.recurrent + gate + g * n, left);
                activate<Cell>(d, r, gates);
                product = r[G - 1];
              }
              const V of = load(b.of_state.h + to, left) + load(b.of_outputs + at * n + u, left);
              const V h = load(rows.h(j) + u, left), c = Cell::has_c ? load(rows.c(j) + u, left) : V{};
              store(b.of_state.h + to, Cell::backward(gates, product, h, c, of, of_cell, of_a, of_r), left);
              if (Cell::has_c) store(b.of_state.c + to, of_cell, left);
              for (int g = 0; g < G; ++g) {
                store(b.of_drive + gate + g * n, of_a[g], left);
                const V of = Cell::two_cotangents ? of_r[g] : of_a[g];
                if (b.saved || Cell::two_cotangents) of_product(t, row, in_rows + row, g, u, of, left);
              }
              if (b.saved) store(b.rows.operands + (u / W * all_rows + in_rows + row) * W, h);
            }
          }
          if (!rowwise) pool.wait(barrier, parts);
          for (int64_t p = mine.first; p < mine.last; ++p)
            in_blocks<most>(active.first, active.last, [&](auto height, int64_t first) {
              constexpr int R = decltype(height)::value;
              const real* of_gates[R];
              for (int r = 0; r < R; ++r) of_gates[r] = passes(t, rows.row(first + r));
              V sum[1][R][N];
              product<1, R, N>(of_gates, b.panels + p * G * n * N * W, G * n, sum);
              for (int r = 0; r < R; ++r)
                for (int v = 0; v < N; ++v) {
                  const int64_t u = (p * N + v) * W, left = n - u;
                  if (left <= 0) continue;
                  real* to = b.of_state.h + rows.row(first + r) * n + u;
                  store(to, load(to, left) + sum[0][r][v], left);
                }
            });
          // The state before a reset has no effect on what follows, and the state after it is the initial one.
          for (int64_t row = share_of_rows.first; has_reset && row < share_of_rows.last; ++row)
            if (b.flags.reset[s.at(t, row)])
              for (int64_t u = first_unit; u < last_unit; u += W) {
                const int64_t left = n - u, at = row * n + u;
                const auto move = [&](real* of_initial, real* of_state) {
                  store(of_initial + at, load(of_initial + at, left) + load(of_state + at, left), left);
                  store(of_state + at, V{}, left);
                };
                move(b.of_initial.h, b.of_state.h);
                if (Cell::has_c) move(b.of_initial.c, b.of_state.c);
              }
        }
      });
}

// sum[r][v] of a[row][r] b[v][row] over the rows, for R outputs and N vectors of operands, which are `apart` numbers
// apart.
template <int R, int N>
__attribute__((noinline)) void outer_product(const real* a, const real* b, int64_t apart, int64_t rows, V (*sum)[N]) {
  V s[R][N] = {};
  for (int64_t i = 0; i < rows; ++i, a += W, b += W) {
    V columns[N];
    for (int v = 0; v < N; ++v) {
      columns[v] = load(b + v * apart);
      keep(columns[v]);
    }
    for (int r = 0; r < R; ++r) {
      const V x = splat(a[r]);
      for (int v = 0; v < N; ++v) s[r][v] += x * columns[v];
    }
  }
  for (int r = 0; r < R; ++r)
    for (int v = 0; v < N; ++v) sum[r][v] = s[r][v];
}

// Threads share the outputs, so the order of the sums does not depend on their number. The operands of N vectors of
// units stay in the first cache while all outputs read them.
void run_gradient(const Pool& pool, const Gradient& f) {
  constexpr int R = has_32_registers ? 8 : 4, N = 2;
  const int64_t vectors = (f.n + W - 1) / W, apart = f.rows * W, work = f.rows * f.gates * f.n * f.n;
  in_parallel(pool, work > 1000000 ? f.gates * vectors : 1, false, work, [&](int part, int parts, Barrier*) {
    const Range mine = share(f.gates * vectors, part, parts);
    for (int64_t k = 0; k < vectors; k += N)
      for (int64_t v = mine.first; v < mine.last; ++v)
        for (int half = 0; half < W; half += R) {
          const int64_t unit = v % vectors * W + half, output = v / vectors * f.n + unit;
          if (unit >= f.n) continue;
          V sum[R][N];
          const real *a = f.of_rows.of_products + v * apart + half, *b = f.of_rows.operands + k * apart;
          // The last vector has no second one beside it.
          outer_product<R, N>(a, b, k + 1 < vectors ? apart : 0, f.rows, sum);
          for (int r = 0; r < R && unit + r < f.n; ++r)
            for (int j = 0; j < N; ++j) {
              const int64_t u = (k + j) * W, left = f.n - u;
              if (left <= 0) continue;
              real* to = f.of_weights + (output + r) * f.n + u;
              store(to, load(to, left) + sum[r][j], left);
            }
        }
    for (int64_t v = mine.first; v < mine.last; ++v) {
      const int64_t u = v % vectors * W, left = f.n - u;
      V sum{};
      for (int64_t i = 0; i < f.rows; ++i) sum += load(f.of_rows.of_products + v * apart + i * W);
      real* to = f.of_bias + v / vectors * f.n + u;
      store(to, load(to, left) + sum, left);
    }
  });
}

// Threads share the outputs.
void run_table_gradient(const Pool& pool, const TableGradient& f) {
  const int64_t vectors = (f.outputs + W - 1) / W, numbers = (f.last_step - f.first_step) * f.sizes.batch * f.outputs;
  in_parallel(pool, numbers > 100000 ? vectors : 1, false, numbers, [&](int part, int parts, Barrier*) {
    const Range mine = share(vectors, part, parts);
    for (int64_t row = 0; row < f.sizes.batch; ++row)
      for (int64_t i = f.first_step; i < f.last_step; ++i) {
        const int64_t at = f.sizes.at(f.sizes.step(i), row);
        const real* from = f.of_drive + at * f.outputs;
        real* to = f.of_table + f.tokens[at] * f.outputs;
        for (int64_t v = mine.first; v < mine.last; ++v) {
          const int64_t u = v * W, left = f.outputs - u;
          store(to + u, load(to + u, left) + load(from + u, left), left);
        }
      }
  });
}

// c_{t-1} of every step of an LSTM's chunk, step by step from c_0. All products with the weights are known.
void run_replay(const Pool& pool, const Replay& f) {
  const Sizes& s = f.sizes;
  const int64_t n = s.n, state = s.batch * n;
  in_parallel(pool, s.time * state > 100000 ? s.batch : 1, false, s.time * state, [&](int part, int parts, Barrier*) {
    const Range rows = share(s.batch, part, parts);
    for (int64_t i = 0; i < s.time; ++i) {
      const int64_t t = s.step(i), next = s.step(i + 1);
      for (int64_t row = rows.first; row < rows.last; ++row) {
        const bool valid = !f.flags.valid || f.flags.valid[t * s.batch + row];
        const bool anew = f.flags.reset && f.flags.reset[t * s.batch + row];
        for (int64_t u = 0; u < n; u += W) {
          const int64_t left = n - u, at = row * n + u, gate = (t * s.batch + row) * 4 * n + u;
          if (i == 0) store(f.c_before + t * state + at, load(f.c_0 + at, left), left);
          if (i + 1 == s.time) continue;
          V c = load(anew ? f.flags.c + u : f.c_before + t * state + at, left);
          if (valid) {
            V a[4];
            load_drives<LSTM>(f.drive + gate, f.drive_bias ? f.drive_bias + u : nullptr, n, left, a);
            for (int g = 0; g < 3; ++g) a[g] += load(f.recurrent + gate + g * n, left);
            c = sigmoid(a[1]) * c + sigmoid(a[0]) * tangent(a[2]);
          }
          store(f.c_before + next * state + at, c, left);
        }
      }
    }
  });
}

// In the order in which the forward loop reads the weights: [panel][product][k][column][W].
template <class Cell>
int64_t pack(const Pool& pool, int64_t n, const real* weights, real* panels) {
  constexpr int G = Cell::gates, U = Cell::vectors, N = Cell::columns;
  const int64_t columns = (n + U * W - 1) / (U * W) * U * G;
  if (panels)
    for_pieces(pool, columns, columns * n * W, [&](int64_t column) {
      const int64_t g = column % G, first = column / G * W, units = smaller(W, n - first);
      const real* rows = weights + (g * n + first) * n;
      real* panel = panels + column / N * n * N * W + column % N * W;
      for (int64_t k = 0; k < n; ++k, panel += N * W)
        if (units == W)
          for (int64_t j = 0; j < W; ++j) panel[j] = rows[j * n + k];
        else
          for (int64_t j = 0; j < W; ++j) panel[j] = j < units ? rows[j * n + k] : real(0);
    });
  return columns * n * W;
}

// Calls run with the cell.
template <class Run>
auto of_cell(Cell cell, Run&& run) {
  switch (cell) {
    case lstm:
      return run(LSTM{});
    case gru:
      return run(GRU{});
    case relu_network:
      return run(Vanilla<Relu>{});
    case linear_network:
      return run(Vanilla<Identity>{});
    default:
      return run(Vanilla<Tanh>{});
  }
}

int64_t pack_forward(const Pool& pool, Cell cell, int64_t n, int64_t rows, const real* weights, real* panels) {
  if (cell == unitwise) return pack_units(pool, n, rows, weights, panels);
  return of_cell(cell, [&](auto cell) { return pack<decltype(cell)>(pool, n, weights, panels); });
}

// In the order in which the backward loop reads the weights: [column / 2W][row][2W].
int64_t pack_backward(const Pool& pool, int64_t n, int64_t rows, const real* weights, real* panels) {
  constexpr int64_t N = 2 * W;
  const int64_t wide = (n + N - 1) / N;
  if (panels)
    for_pieces(pool, wide, rows * n, [&](int64_t p) {
      const int64_t units = smaller(N, n - p * N);
      const real* from = weights + p * N;
      real* to = panels + p * rows * N;
      for (int64_t k = 0; k < rows; ++k, from += n, to += N)
        for (int64_t j = 0; j < N; ++j) to[j] = j < units ? from[j] : real(0);
    });
  return wide * rows * N;
}

void forward(const Pool& pool, Cell cell, const Forward& f) {
  of_cell(cell, [&](auto cell) {
    if (f.flags.valid || f.flags.reset) return run_forward<decltype(cell), true>(pool, f);
    run_forward<decltype(cell), false>(pool, f);
  });
}

void backward(const Pool& pool, Cell cell, const Backward& b) {
  of_cell(cell, [&](auto cell) {
    if (b.flags.valid || b.flags.reset) return run_backward<decltype(cell), true>(pool, b);
    run_backward<decltype(cell), false>(pool, b);
  });
}

}  // namespace

extern const Loops SEQJAX_VARIANT;
const Loops SEQJAX_VARIANT = {pack_forward, pack_backward,      forward,  backward, run_replay,
                              run_gradient, run_table_gradient, run_units};

}  // namespace seqjax
