"""A cell over a sequence: unroll, trajectory, gates, gradients through time, memory, and how a step is run."""
