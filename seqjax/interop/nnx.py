"""flax-nnx cells: the module's structure is kept apart from its weights, which are the parameters."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
from jaxtyping import Array

from seqjax.cell import Output, Params, State
from seqjax.interop.common import Arguments, check_class, floating, keep_types, kind_of, like_parameters, same_shapes


def from_nnx(kind: Any, *arguments: Any, **keywords: Any) -> NnxCell:
    """A flax-nnx recurrent cell, such as `flax.nnx.LSTMCell`, by its class and its arguments.

    Args:
        kind: the class, or a function that builds the module from the arguments and `rngs=`.
        *arguments, **keywords: for `kind`, without `rngs`.

    Returns:
        A cell whose parameters are the module's state as a plain dictionary.

    Raises:
        TypeError: a module was given and not its class.

    Example:
        >>> import jax, jax.numpy as jnp, seqjax as sj
        >>> from flax import nnx
        >>> cell = sj.from_nnx(nnx.GRUCell, 3, 6)
        >>> trained = nnx.GRUCell(3, 6, rngs=nnx.Rngs(0))
        >>> sj.unroll(cell, cell.params_from(trained), jnp.ones((2, 4, 3)))[1].shape
        (2, 4, 6)
    """
    from flax import nnx

    check_class(kind, nnx.Module, "from_nnx", "nnx.LSTMCell")
    return NnxCell(kind, arguments, tuple(sorted(keywords.items())))


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class NnxCell:
    """A flax-nnx cell; parameters are its `nnx.Param`s as a plain dictionary. Built by `from_nnx`."""

    kind: Any
    arguments: tuple[Any, ...]
    keywords: Arguments

    @property
    def input_shape(self) -> tuple[int, ...]:
        """(in_features,)"""
        return (self._skeleton().in_features,)

    def init(self, key: Array) -> Params:
        """The module's own initialisation."""
        return self.params_from(self._build(key))

    def params_from(self, module: Any) -> Params:
        """The weights of a module that you already have, of the same class and sizes."""
        from flax import nnx

        if not isinstance(module, nnx.Module):
            raise TypeError(f"expected a flax.nnx module, got {kind_of(module)}")
        weights, own = (nnx.to_pure_dict(nnx.state(m, nnx.Param)) for m in (module, self._skeleton()))
        return same_shapes(weights, own, module)

    def initial_state(self, params: Params) -> State:
        """The module's `initialize_carry`, in the dtype of the parameters."""
        from flax import nnx

        return like_parameters(self._module(params).initialize_carry(self.input_shape, rngs=nnx.Rngs(0)), params)

    def step(self, params: Params, state: State, x: Array) -> tuple[State, Output]:
        """The module's call."""
        new_state, output = self._module(params)(state, floating(x, params))
        return keep_types(new_state, state), output

    def _build(self, key: Array) -> Any:
        from flax import nnx

        return self.kind(*self.arguments, **dict(self.keywords), rngs=nnx.Rngs(key))

    def _skeleton(self) -> Any:
        from flax import nnx

        return nnx.eval_shape(lambda: self._build(jax.random.key(0)))

    def _module(self, params: Params) -> Any:
        from flax import nnx

        graph, weights, other = nnx.split(self._skeleton(), nnx.Param, ...)
        if jax.tree.leaves(other):
            raise TypeError(
                f"expected an nnx module that holds parameters only, got {list(nnx.to_pure_dict(other))} beside them: "
                f"what changes from step to step belongs into the carry"
            )
        nnx.replace_by_pure_dict(weights, params)
        return nnx.merge(graph, weights, other)
