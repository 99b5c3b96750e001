"""How a partitioned step runs: the forward loop, the backward loop, the compiled kernel, and the Jacobian."""
