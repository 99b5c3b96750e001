"""Training any model on any stream of batches: the update and its generator, for a training loop of your own.

`fit` and `evaluate` are `sj.fit` and `sj.evaluate`.
"""

from seqjax.data.history import leaf_names as leaf_names

from .loop import Metrics as Metrics
from .loop import NotFinite as NotFinite
from .loop import TrainState as TrainState
from .loop import clipped as clipped
from .loop import start as start
from .loop import updates as updates
