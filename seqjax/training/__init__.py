"""Training any model on any stream of batches: the update, the loop, `fit` and `evaluate`."""

from .loop import Metrics as Metrics
from .loop import NotFinite as NotFinite
from .loop import TrainState as TrainState
from .loop import clipped as clipped
from .loop import leaf_names as leaf_names
from .loop import start as start
from .loop import updates as updates
