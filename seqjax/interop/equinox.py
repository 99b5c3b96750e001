"""equinox cells: `module(x, state)` returns the new state alone, so the output is its first array."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from seqjax.cell import Output, Params, State
from seqjax.interop.common import Arguments, check_class, floating, keep_types, kind_of, like_parameters, same_shapes


def from_equinox(kind: Any, *arguments: Any, **keywords: Any) -> EquinoxCell:
    """An equinox recurrent cell, such as `equinox.nn.LSTMCell`, by its class and its arguments.

    Args:
        kind: the class, or a function that builds the module from the arguments and `key=`. The module is called as
            `module(x, state)` and returns the new state; it has a `hidden_size`, or an `initial_state()` of its own.
        *arguments, **keywords: for `kind`, without `key`.

    Returns:
        A cell whose parameters are the module with everything but its arrays taken out; its output is the first array
        of the state, h.

    Raises:
        TypeError: a module was given and not its class.

    Example:
        >>> import jax, jax.numpy as jnp, equinox as eqx, seqjax as sj
        >>> cell = sj.from_equinox(eqx.nn.LSTMCell, 3, 6)
        >>> trained = eqx.nn.LSTMCell(3, 6, key=jax.random.key(0))
        >>> sj.unroll(cell, cell.params_from(trained), jnp.ones((2, 4, 3)))[1].shape
        (2, 4, 6)
    """
    import equinox

    check_class(kind, equinox.Module, "from_equinox", "eqx.nn.LSTMCell")
    return EquinoxCell(kind, arguments, tuple(sorted(keywords.items())))


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class EquinoxCell:
    """An equinox cell; parameters are the module's arrays, in the module. Built by `from_equinox`."""

    kind: Any
    arguments: tuple[Any, ...]
    keywords: Arguments

    @property
    def input_shape(self) -> tuple[int, ...]:
        """(input_size,)"""
        return (self._skeleton().input_size,)

    def init(self, key: Array) -> Params:
        """The module's own initialisation."""
        return self.params_from(self.kind(*self.arguments, **dict(self.keywords), key=key))

    def params_from(self, module: Any) -> Params:
        """The weights of a module that you already have, of the same class and sizes."""
        import equinox

        if not isinstance(module, equinox.Module):
            raise TypeError(f"expected an equinox module, got {kind_of(module)}")
        own = equinox.filter(self._skeleton(), lambda leaf: isinstance(leaf, jax.ShapeDtypeStruct))
        return same_shapes(equinox.filter(module, equinox.is_array), own, module)

    def initial_state(self, params: Params) -> State:
        """Zeros (h, c) for an LSTM cell and h for any other, unless the module has an `initial_state()` of its own."""
        import equinox

        module = self._module(params)
        if hasattr(module, "initial_state"):
            return like_parameters(module.initial_state(), params)
        zero = like_parameters(jnp.zeros(module.hidden_size), params)
        return (zero, zero) if isinstance(module, equinox.nn.LSTMCell) else zero

    def step(self, params: Params, state: State, x: Array) -> tuple[State, Output]:
        """The module's call; the output is the first array of the new state."""
        new_state = keep_types(self._module(params)(floating(x, params), state), state)
        return new_state, jax.tree.leaves(new_state)[0]

    def _skeleton(self) -> Any:
        import equinox

        return equinox.filter_eval_shape(
            lambda: self.kind(*self.arguments, **dict(self.keywords), key=jax.random.key(0))
        )

    def _module(self, params: Params) -> Any:
        import equinox

        static = equinox.filter(self._skeleton(), lambda leaf: not isinstance(leaf, jax.ShapeDtypeStruct))
        return equinox.combine(params, static)
