"""The fast unroll of any cell, derived from the program of its step; see `seqjax.partition.parts`."""
