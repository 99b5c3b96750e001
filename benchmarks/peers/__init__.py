"""seqjax beside the other recurrent networks; `python -m benchmarks.peers --help`."""
