"""The fast unroll of cells that offer their step in three parts; see `seqjax.split.run`."""
