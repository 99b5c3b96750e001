"""`sj.unroll` of foreign cells beside the unroll of their own library; `python -m benchmarks.any_cell --help`."""
