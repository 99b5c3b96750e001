"""flax-nnx cells: the adapter separates the structure of a module from its weights, which are the parameters."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
from jaxtyping import Array

from seqjax.cell import Output, Params, State, inherited
from seqjax.interop.common import (
    Arguments,
    as_input,
    carry_names,
    cast_like,
    check_class,
    kind_of,
    like_parameters,
    same_shapes,
)


def from_nnx(kind: Callable[..., Any], *arguments: Any, **keywords: Any) -> NnxCell:
    """Adapts a flax-nnx recurrent cell, such as `flax.nnx.LSTMCell`.

    Args:
        kind: the class, or a function that builds the module from the arguments and `rngs=`.
        *arguments, **keywords: the arguments of `kind`, without `rngs`.

    Returns:
        A cell whose parameters are the module's `nnx.Param`s, as a plain dictionary.

    Raises:
        TypeError: `kind` is a module and not its class.

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
    """A flax-nnx cell; the parameters are its `nnx.Param`s as a plain dictionary. Built by `from_nnx`."""

    kind: Callable[..., Any]
    arguments: tuple[Any, ...]
    keywords: Arguments

    @property
    def input_shape(self) -> tuple[int, ...]:
        """(in_features,), if the module has this attribute."""
        return (inherited(self._skeleton(), "in_features"),)

    @property
    def state_names(self) -> str | tuple[str, str]:
        """(c, h) for an LSTM cell, and h for other cells of flax."""
        return carry_names(type(self._skeleton()), "flax.nnx")

    def init(self, key: Array) -> Params:
        """The initialization of the module."""
        return self.params_from(self._build(key))

    def params_from(self, module: Any) -> Params:
        """The weights of an existing module of the same class and sizes, as parameters."""
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
        """Calls the module."""
        new_state, output = self._module(params)(state, as_input(x, params))
        return cast_like(new_state, state), output

    def _build(self, key: Array) -> Any:
        from flax import nnx

        return self.kind(*self.arguments, **dict(self.keywords), rngs=nnx.Rngs(key))

    def _skeleton(self) -> Any:
        from flax import nnx

        return nnx.eval_shape(lambda: self._build(jax.random.key(0)))

    def _module(self, params: Params) -> Any:
        from flax import nnx

        # Rebuilt in every call: an nnx module is mutable, and a stored one would leak tracers.
        graph, weights, other = nnx.split(self._skeleton(), nnx.Param, ...)
        if jax.tree.leaves(other):
            raise TypeError(
                f"expected an nnx module with only parameters, got also {list(nnx.to_pure_dict(other))}: "
                f"variables that change at every step belong in the carry"
            )
        nnx.replace_by_pure_dict(weights, params)
        return nnx.merge(graph, weights, other)
