"""Cells of other libraries as cells of seqjax. Each library is imported only inside its own adapter.

flax-linen's `module.apply(variables, carry, x)` already has the signature of `step`. flax-nnx and equinox keep their
weights inside their modules, so these adapters take the module's class and its arguments, build it when `init` has a
key, and hold on to its structure alone; `params_from(module)` takes the weights of one that you already have.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, PyTree

from seqjax.cell import Output, Params, State

Arguments = tuple[tuple[str, Any], ...]  # keyword arguments in an order, so that adapters hash and compare by value


def from_linen(module: Any, input_size: int) -> LinenCell:
    """A flax-linen recurrent cell, such as `flax.linen.LSTMCell(64)`.

    Args:
        module: a `flax.linen.RNNCellBase`; its variables, `module.init(...)`, are the parameters.
        input_size: features of one input.

    Returns:
        A cell with `module.apply` as its step.

    Raises:
        TypeError: `module` is not an instance of a linen recurrent cell.

    Example:
        >>> import jax, jax.numpy as jnp, flax.linen as nn, seqjax as sj
        >>> cell = sj.from_linen(nn.GRUCell(6), input_size=3)
        >>> state, outputs = sj.unroll(cell, cell.init(jax.random.key(0)), jnp.ones((2, 4, 3)))
        >>> outputs.shape, state.shape
        ((2, 4, 6), (2, 6))
    """
    from flax import linen

    if not isinstance(module, linen.RNNCellBase):
        raise TypeError(
            f"expected a flax.linen cell such as flax.linen.LSTMCell(64), got {module!r}: "
            f"for a flax.nnx or an equinox cell use sj.from_nnx or sj.from_equinox"
        )
    return LinenCell(module, input_size)


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

    if isinstance(kind, nnx.Module):
        _refuse_module(kind, "from_nnx", "nnx.LSTMCell")
    return NnxCell(kind, arguments, tuple(sorted(keywords.items())))


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

    if isinstance(kind, equinox.Module):
        _refuse_module(kind, "from_equinox", "eqx.nn.LSTMCell")
    return EquinoxCell(kind, arguments, tuple(sorted(keywords.items())))


def _refuse_module(module: Any, adapter: str, example: str) -> None:
    raise TypeError(
        f"expected the class of the cell and its arguments, as in sj.{adapter}({example}, 8, 64), got a "
        f"{type(module).__name__} that is already built: its weights come from cell.params_from(module)"
    )


def _like_parameters(state: State, params: Params) -> State:
    """The state in the dtype of the parameters, which these libraries set apart from it."""
    floating = [leaf.dtype for leaf in jax.tree.leaves(params) if jnp.issubdtype(leaf.dtype, jnp.floating)]
    if not floating:
        return state
    dtype = jnp.result_type(*floating)
    return jax.tree.map(lambda leaf: leaf.astype(dtype) if jnp.issubdtype(leaf.dtype, jnp.floating) else leaf, state)


def _keep_types(new_state: State, state: State) -> State:
    """The new state in the old one's dtypes: a module may compute in a dtype of its own (nnx.SimpleCell does)."""
    return jax.tree.map(lambda new, old: jnp.asarray(new).astype(old.dtype), new_state, state)


def _floating(x: PyTree, params: Params) -> PyTree:
    return _like_parameters(jax.tree.map(jnp.asarray, x), params)


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class LinenCell:
    """A flax-linen cell; parameters are its variables. Built by `from_linen`."""

    module: Any
    input_size: int

    @property
    def input_shape(self) -> tuple[int, ...]:
        """(input_size,)"""
        return (self.input_size,)

    def init(self, key: Array) -> Params:
        """The module's own initialisation."""
        key_params, key_carry = jax.random.split(key)
        x = jnp.zeros(self.input_size)
        return self.module.init(key_params, self.module.initialize_carry(key_carry, x.shape), x)

    def initial_state(self, params: Params) -> State:
        """The module's `initialize_carry`, in the dtype of the parameters."""
        return _like_parameters(self.module.initialize_carry(jax.random.key(0), (self.input_size,)), params)

    def step(self, params: Params, state: State, x: Array) -> tuple[State, Output]:
        """`module.apply`."""
        new_state, output = self.module.apply(params, state, _floating(x, params))
        return _keep_types(new_state, state), output


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
        """The weights of a module that you already have."""
        from flax import nnx

        return nnx.to_pure_dict(nnx.state(module, nnx.Param))

    def initial_state(self, params: Params) -> State:
        """The module's `initialize_carry`, in the dtype of the parameters."""
        from flax import nnx

        return _like_parameters(self._module(params).initialize_carry(self.input_shape, rngs=nnx.Rngs(0)), params)

    def step(self, params: Params, state: State, x: Array) -> tuple[State, Output]:
        """The module's call."""
        new_state, output = self._module(params)(state, _floating(x, params))
        return _keep_types(new_state, state), output

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
        """The weights of a module that you already have."""
        import equinox

        return equinox.filter(module, equinox.is_array)

    def initial_state(self, params: Params) -> State:
        """Zeros (h, c) for an LSTM cell and h for any other, unless the module has an `initial_state()` of its own."""
        import equinox

        module = self._module(params)
        if hasattr(module, "initial_state"):
            return _like_parameters(module.initial_state(), params)
        zero = _like_parameters(jnp.zeros(module.hidden_size), params)
        return (zero, zero) if isinstance(module, equinox.nn.LSTMCell) else zero

    def step(self, params: Params, state: State, x: Array) -> tuple[State, Output]:
        """The module's call; the output is the first array of the new state."""
        new_state = _keep_types(self._module(params)(_floating(x, params), state), state)
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
