"""equinox cells: `module(x, state)` returns only the new state, so the output is the first array of the state."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from seqjax.cell import NotOffered, Output, Params, State, inherited, optional
from seqjax.interop.common import Arguments, as_input, cast_like, check_class, kind_of, like_parameters, same_shapes


def from_equinox(kind: Callable[..., Any], *arguments: Any, **keywords: Any) -> EquinoxCell:
    """Adapts an equinox recurrent cell, such as `equinox.nn.LSTMCell`.

    Args:
        kind: the class, or a function that builds the module from the arguments and `key=`. `module(x, state)` must
            return the new state. The module must have a `hidden_size` or a method `initial_state()`.
        *arguments, **keywords: the arguments of `kind`, without `key`.

    Returns:
        A cell whose parameters are the module without its static parts. Its output is the first array of the state, h.

    Raises:
        TypeError: `kind` is a module and not its class.

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
    """An equinox cell; the parameters are the module with only its arrays. Built by `from_equinox`."""

    kind: Callable[..., Any]
    arguments: tuple[Any, ...]
    keywords: Arguments

    @property
    def input_shape(self) -> tuple[int, ...]:
        """(input_size,), if the module has this field."""
        return (inherited(self._skeleton(), "input_size"),)

    @property
    def state_names(self) -> str | tuple[str, str]:
        """(h, c) for an LSTM cell, and h for a GRU cell."""
        import equinox

        module = self._skeleton()
        if isinstance(module, equinox.nn.LSTMCell):
            return "h", "c"
        if isinstance(module, equinox.nn.GRUCell):
            return "h"
        raise NotOffered(f"{type(module).__name__} is not a cell of equinox, so the names of its state are unknown")

    def init(self, key: Array) -> Params:
        """The initialization of the module."""
        return self.params_from(self.kind(*self.arguments, **dict(self.keywords), key=key))

    def params_from(self, module: Any) -> Params:
        """The weights of an existing module of the same class and sizes, as parameters."""
        import equinox

        if not isinstance(module, equinox.Module):
            raise TypeError(f"expected an equinox module, got {kind_of(module)}")
        own = equinox.filter(self._skeleton(), lambda leaf: isinstance(leaf, jax.ShapeDtypeStruct))
        return same_shapes(equinox.filter(module, equinox.is_array), own, module)

    def initial_state(self, params: Params) -> State:
        """`module.initial_state()` if it exists; otherwise zeros, (h, c) for an LSTM cell and h for other cells."""
        import equinox

        module = self._module(params)
        initial_state = optional(module, "initial_state")
        if initial_state is not None:
            return like_parameters(initial_state(), params)
        zero = like_parameters(jnp.zeros(module.hidden_size), params)
        return (zero, zero) if isinstance(module, equinox.nn.LSTMCell) else zero

    def step(self, params: Params, state: State, x: Array) -> tuple[State, Output]:
        """Calls the module; the output is the first array of the new state."""
        new_state = cast_like(self._module(params)(as_input(x, params), state), state)
        return new_state, jax.tree.leaves(new_state)[0]

    def _skeleton(self) -> Any:
        import equinox

        # Only shapes: `init` draws the weights, and this method runs in every call.
        return equinox.filter_eval_shape(
            lambda: self.kind(*self.arguments, **dict(self.keywords), key=jax.random.key(0))
        )

    def _module(self, params: Params) -> Any:
        import equinox

        static = equinox.filter(self._skeleton(), lambda leaf: not isinstance(leaf, jax.ShapeDtypeStruct))
        return equinox.combine(params, static)
