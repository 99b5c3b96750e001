"""seqjax compared with other libraries; see `python -m benchmarks.peers --help`."""
