// What the loops of one variant of the kernel offer, and what they need from their caller.
//
// Each variant is compiled for another level of the processor. So a variant must not share code with another one, which
// the inline functions of the C++ library would be: this header and loops.cpp use none of them.

#pragma once

#include <cstdint>

namespace seqjax {

struct Barrier;

// The threads that a call may use.
struct Pool {
  void* threads;
  bool is_busy;  // whether other processes take the processors away from these threads
  // Runs body(argument, part, parts, barrier) for every part < parts, where parts <= wanted, and returns after all. If
  // `waits`, the parts wait for each other at the barrier, so each needs a thread of its own.
  void (*run)(void* threads, int64_t wanted, bool waits, int64_t work, void (*body)(const void*, int, int, Barrier*),
              const void* argument);
  // Returns when all parts have called it.
  void (*wait)(Barrier* barrier, int parts);
};

enum Cell : int64_t { lstm, gru, tanh_network, relu_network, linear_network, unitwise };

// The arrays of a chunk have the axes (time, batch, ...). Those of a whole sequence have the axes (batch, time, ...).
struct Sizes {
  int64_t time, batch, n;
  bool reverse, batch_major;
  int64_t step(int64_t i) const { return reverse ? time - 1 - i : i; }
  // The position of a row at a step.
  int64_t at(int64_t t, int64_t row) const { return batch_major ? row * time + t : t * batch + row; }
};

// The arrays of the loops for one type of numbers.
template <class real>
struct Of {
  // Which steps are valid and before which steps the state is reset, (time, batch); null if all steps are valid, or if
  // there is no reset. A row that is not valid keeps its state. A reset replaces the state by h and c, (n,).
  struct Flags {
    const bool *valid, *reset;
    const real *h, *c;
  };

  // c is null for cells that have none.
  struct State {
    real *h, *c;
  };
  struct ConstState {
    const real *h, *c;
  };

  struct Forward {
    Sizes sizes;
    Flags flags;
    int64_t first_step, last_step;                   // which steps run, in the order of the loop, without the last one
    const real *drive, *drive_bias, *panels, *bias;  // a bias is null if there is none
    const int32_t* tokens;  // if not null, `drive` is a table, and this is the row of each step
    ConstState first;       // (batch, n)
    State states;           // of every step, (n,)
    // What the backward loop reads of every step: the gates, (gates * n,), which may lie where the drives were; and the
    // recurrent product of the candidate of a GRU, (n,). Null if nothing is saved.
    real *gates, *candidate;
    State buffers;  // (2, batch, n), for batch-major arrays; they hold the state between two calls
  };

  // What the backward loop of whole sequences writes for each row of each of its steps, and the gradient of the weights
  // reads: dL/d(recurrent product) and h before the step. One vector of units of all rows after another, [gate][vector]
  // [row][W] and [vector][row][W], because then every loop reads memory in its order.
  struct StepRows {
    real *of_products, *operands;
    // (2, batch, stride): dL/d(recurrent product) of one step, with a stride that is no multiple of the size of a cache
    // way.
    real* of_step;
    int64_t stride;
  };

  struct Backward {
    Sizes sizes;
    Flags flags;
    int64_t first_step, last_step;  // as for the forward loop
    // Of a chunk, the drives and the recurrent products. Of a whole sequence, `gates` and `candidate` of the forward
    // loop.
    bool saved;
    const real *drive, *drive_bias, *recurrent, *panels, *of_outputs;
    ConstState first;  // if `saved`, the state before the first step, (batch, n)
    // If `saved`, the state after each step. Otherwise the state before each step and before a reset.
    ConstState states;
    State of_state;    // of the state after the last step on entry, and of the first state on return, (batch, n)
    State of_initial;  // of the state after a reset, summed over the steps, (batch, n); null without resets
    real *of_drive, *of_recurrent;
    StepRows rows;  // if `saved`, in place of `of_recurrent`
  };

  // Adds sum_rows of_products^T operands to dL/dW_hh, (gates * n, n), and sum_rows of_products to dL/db, (gates * n,).
  struct Gradient {
    int64_t rows, gates, n;
    StepRows of_rows;
    real *of_weights, *of_bias;
  };

  // Adds the cotangents of the drives of some steps to those of the rows of a table.
  struct TableGradient {
    Sizes sizes;
    int64_t outputs, first_step, last_step;
    const real* of_drive;
    const int32_t* tokens;
    real* of_table;
  };

  struct Replay {
    Sizes sizes;
    Flags flags;
    const real *drive, *drive_bias, *recurrent, *c_0;
    real* c_before;  // of each step, before a reset, (time, batch, n)
  };

  // A loop of instructions (units.h) over arrays of these layouts:
  //   steps         (time, batch, width)
  //   rows          (batch, width)
  //   shared        (width,)
  //   step_numbers  (time, batch), one number for all units
  //   numbers       (width,), one number for all units at each position
  //   before        (batch, width) before the first step; later the array `of`, at the step before
  enum Layout : int64_t { steps, rows, shared, step_numbers, numbers, before };
  struct UnitArray {
    real* data;
    int64_t layout, width, of;
  };
  // A product of the numbers from `offset` of an array with packed weights, (depth * n, blocks * n).
  struct UnitProduct {
    int64_t array, offset, depth, blocks;
    const real* panels;
  };
  struct Units {
    Sizes sizes;
    int64_t array_count, product_count;
    const UnitArray* arrays;
    const UnitProduct* products;
    const int32_t* code;  // of all phases
    const int64_t* ends;  // of the code of each phase: the one before the products, and those after each of them
  };

  struct Loops {
    // Both pack weights (rows, n). They return how many numbers the panels have, and write them unless `panels` is
    // null.
    int64_t (*pack_forward)(const Pool&, Cell, int64_t n, int64_t rows, const real* weights, real* panels);
    int64_t (*pack_backward)(const Pool&, int64_t n, int64_t rows, const real* weights, real* panels);
    void (*forward)(const Pool&, Cell, const Forward&);
    void (*backward)(const Pool&, Cell, const Backward&);
    void (*replay)(const Pool&, const Replay&);
    void (*gradient)(const Pool&, const Gradient&);
    void (*table_gradient)(const Pool&, const TableGradient&);
    void (*units)(const Pool&, const Units&);
  };
};

}  // namespace seqjax
