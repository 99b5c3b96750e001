"""Weights of recurrent layers of other libraries as cells and parameters of seqjax, and back.

`from_LIBRARY(source)` returns a cell of seqjax and its parameters. `to_LIBRARY(cell, params)` returns what that library
loads. Both take arrays by name, and need the other library only if they get one of its objects. The cell of seqjax
computes the same function, to the rounding of its dtype.

Names and shapes are checked before anything is converted. They cannot show gates in another order, nor a transposed
input matrix if d = n, so weights must be in the layout of the library that the function names.

The adapters `seqjax.from_linen`, `seqjax.from_nnx` and `seqjax.from_equinox` do something else: they run a cell of
another library inside seqjax.
"""

from .equinox import from_equinox as from_equinox
from .equinox import to_equinox as to_equinox
from .haiku import from_haiku as from_haiku
from .haiku import to_haiku as to_haiku
from .keras import from_keras as from_keras
from .keras import to_keras as to_keras
from .linen import from_linen as from_linen
from .linen import to_linen as to_linen
from .nnx import from_nnx as from_nnx
from .nnx import to_nnx as to_nnx
from .torch import from_torch as from_torch
from .torch import to_torch as to_torch
