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
  // Runs body(argument, part, parts, barrier) for every part < parts, where parts <= wanted, and returns after all.
  void (*run)(void* threads, int64_t wanted, int64_t work, void (*body)(const void*, int, int, Barrier*),
              const void* argument);
  // Returns when all parts have called it.
  void (*wait)(Barrier* barrier, int parts);
};

enum Cell : int64_t { lstm, gru, tanh_network };

struct Sizes {
  int64_t time, batch, n;
  bool reverse;
  int64_t step(int64_t i) const { return reverse ? time - 1 - i : i; }
};

// Which steps are valid and before which steps the state is reset, (time, batch); null if all steps are valid, or if
// there is no reset. A row that is not valid keeps its state. A reset replaces the state by h and c, (n,).
struct Flags {
  const bool *valid, *reset;
  const float *h, *c;
};

// c is null for cells that have none.
struct State {
  float *h, *c;
};
struct ConstState {
  const float *h, *c;
};

struct Forward {
  Sizes sizes;
  Flags flags;
  const float *drive, *panels, *bias;  // the bias is null if there is none
  ConstState first;                    // (batch, n)
  State states;                        // (time, batch, n)
};

struct Backward {
  Sizes sizes;
  Flags flags;
  const float *drive, *recurrent, *panels, *of_outputs;
  ConstState before;            // of each step, before a reset, (time, batch, n)
  State of_state;               // of the state after the chunk on entry, and of the state before it on return, (batch, n)
  State of_initial;             // of the state after a reset, summed over the steps, (batch, n); null without resets
  float *of_drive, *of_recurrent;
};

struct Replay {
  Sizes sizes;
  Flags flags;
  const float *drive, *recurrent, *c_0;
  float* c_before;  // of each step, before a reset, (time, batch, n)
};

struct Loops {
  // Both pack W_hh (gates * n, n). They return how many floats the panels have, and write them unless `panels` is null.
  int64_t (*pack_forward)(const Pool&, Cell, int64_t n, const float* weights, float* panels);
  int64_t (*pack_backward)(const Pool&, Cell, int64_t n, const float* weights, float* panels);
  void (*forward)(const Pool&, Cell, const Forward&);
  void (*backward)(const Pool&, Cell, const Backward&);
  void (*replay)(const Pool&, const Replay&);
};

}  // namespace seqjax
