"""`sj.unroll` of any cell, compared with the unroll of its own library; see `python -m benchmarks.any_cell --help`."""
