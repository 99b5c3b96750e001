"""torch.nn.RNN, LSTM and GRU: the same weights and inputs give the same values and gradients."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import seqjax as sj

torch = pytest.importorskip("torch", reason="torch is not installed: its parity is measured where it is")

TOLERANCE = {"float64": 1e-10, "float32": 1e-5}
SIZES = st.tuples(*[st.integers(1, 4)] * 4)  # batch, time, features, hidden units
KINDS = {
    "tanh": (lambda d, n, **k: torch.nn.RNN(d, n, **k), sj.VanillaRNN),
    "relu": (
        lambda d, n, **k: torch.nn.RNN(d, n, nonlinearity="relu", **k),
        lambda d, n, **k: sj.VanillaRNN(d, n, activation="relu", **k),
    ),
    "lstm": (lambda d, n, **k: torch.nn.LSTM(d, n, **k), sj.LSTM),
    "gru": (lambda d, n, **k: torch.nn.GRU(d, n, **k), sj.GRU),
}


def numbers(seed, *shape):
    """Numbers of order one, to be cast to either precision."""
    return np.random.default_rng(seed).normal(size=shape)


def as_params(kind, weights, suffix="l0"):
    """torch's four arrays as ours: the two biases are added, all but b_hn, which the reset gate multiplies."""
    W_ih, W_hh, b_ih, b_hh = (weights[f"{name}_{suffix}"] for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh"))
    if kind == "gru":
        n = W_hh.shape[1]
        return sj.GRUParams(W_ih, W_hh, np.concatenate([(b_ih + b_hh)[: 2 * n], b_ih[2 * n :]]), b_hh[2 * n :])
    return (sj.LSTMParams if kind == "lstm" else sj.VanillaParams)(W_ih, W_hh, b_ih + b_hh)


def as_param_grads(kind, grads, suffix="l0"):
    """torch's gradients as ours: those of its two biases are the gradient of the sum."""
    W_ih, W_hh, b_ih, b_hh = (grads[f"{name}_{suffix}"] for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh"))
    if kind == "gru":
        return sj.GRUParams(W_ih, W_hh, b_ih, b_hh[2 * W_hh.shape[1] :])
    return (sj.LSTMParams if kind == "lstm" else sj.VanillaParams)(W_ih, W_hh, b_ih)


def as_state(kind, h, c):
    return sj.LSTMState(h, c) if kind == "lstm" else (sj.GRUState if kind == "gru" else sj.VanillaState)(h)


class Torch:
    """A torch layer with random weights, run forward and backward; `loss` weighs every output and final state."""

    def __init__(self, kind, dtype, batch, time, d, n, *, layers=1, bidirectional=False, seed=0):
        self.kind, self.dtype, rows = kind, dtype, layers * (1 + bidirectional)
        options = {"num_layers": layers, "bidirectional": bidirectional, "dtype": getattr(torch, dtype)}
        self.module = KINDS[kind][0](d, n, batch_first=True, **options)
        for j, weight in enumerate(self.module.parameters()):  # every bias is random too, and the two differ
            weight.data = self.tensor(numbers([seed, j], *weight.shape))
        self.xs, self.h, self.c = numbers(1, batch, time, d), numbers(2, rows, batch, n), numbers(3, rows, batch, n)
        self.of_output, self.of_h, self.of_c = numbers(4, batch, time, n * (1 + bidirectional)), self.c + 1, self.h - 1

    def tensor(self, array):
        return torch.tensor(np.array(array), dtype=getattr(torch, self.dtype), requires_grad=True)

    def run(self, xs=None, lengths=None):
        """Outputs, final states (h, c), and gradients of the weights by name, of xs and of the initial (h, c)."""
        xs = self.tensor(self.xs if xs is None else xs)
        h, c = self.tensor(self.h), self.tensor(self.c)
        inputs = xs
        if lengths is not None:
            inputs = torch.nn.utils.rnn.pack_padded_sequence(xs, lengths, batch_first=True, enforce_sorted=False)
        outputs, final = self.module(inputs, (h, c) if self.kind == "lstm" else h)
        if lengths is not None:
            outputs, _ = torch.nn.utils.rnn.pad_packed_sequence(outputs, batch_first=True, total_length=xs.shape[1])
        final_h, final_c = final if self.kind == "lstm" else (final, 0 * final)
        loss = (outputs * self.tensor(self.of_output)).sum() + (final_h * self.tensor(self.of_h)).sum()
        (loss + (final_c * self.tensor(self.of_c)).sum()).backward()
        grads = {name: weight.grad.numpy() for name, weight in self.module.named_parameters()}
        c_grad = c.grad.numpy() if self.kind == "lstm" else None
        final = final_h.detach().numpy(), final_c.detach().numpy()
        return outputs.detach().numpy(), final, grads, xs.grad.numpy(), (h.grad.numpy(), c_grad)

    def weights(self):
        return {name: weight.detach().numpy() for name, weight in self.module.named_parameters()}


@partial(jax.jit, static_argnames=("cell", "reverse"))
def run_compiled(cell, params, xs, state, of_output, of_final, mask, reverse):
    def loss(params, xs, state):
        final, outputs = sj.unroll(cell, params, xs, state=state, mask=mask, reverse=reverse)
        weighed = jax.tree.map(lambda a, b: jnp.sum(a * b), (outputs, final), (of_output, of_final))
        return sum(jax.tree.leaves(weighed)), (outputs, final)

    grads, (outputs, final) = jax.grad(loss, argnums=(0, 1, 2), has_aux=True)(params, xs, state)
    return outputs, final, *grads


def run_ours(cell, params, *arrays, mask=None, reverse=False):
    """Outputs, final state, and gradients of the parameters, xs and the initial state, in the dtype of the weights."""
    dtype = jax.tree.leaves(params)[0].dtype
    params, *arrays = jax.tree.map(lambda leaf: jnp.asarray(np.asarray(leaf), dtype), (params, *arrays))
    return run_compiled(cell, params, *arrays, mask, reverse)


def assert_close(got, expected, dtype):
    assert jax.tree.structure(got) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        assert a.dtype == b.dtype == dtype
        np.testing.assert_allclose(a, b, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype] * max(1, abs(b).max()))


@pytest.mark.parametrize("dtype", ["float64", "float32"])
@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=3)
@given(reverse=st.booleans(), sizes=SIZES, seed=st.integers(0, 99))
def test_values_and_gradients_equal_those_of_torch_in_both_directions(kind, dtype, reverse, sizes, seed):
    theirs = Torch(kind, dtype, *sizes, seed=seed)
    order = slice(None, None, -1 if reverse else 1)  # torch reads the flipped input where we read right to left
    outputs, (h, c), grads, x_grad, (h_grad, c_grad) = theirs.run(theirs.xs[:, order])
    expected = (outputs[:, order], as_state(kind, h[0], c[0]), as_param_grads(kind, grads), x_grad[:, order])
    expected += (as_state(kind, h_grad[0], c_grad[0] if kind == "lstm" else None),)
    with jax.enable_x64(dtype == "float64"):
        got = run_ours(
            KINDS[kind][1](*sizes[2:], dtype=dtype),
            as_params(kind, theirs.weights()),
            theirs.xs,
            as_state(kind, theirs.h[0], theirs.c[0]),
            theirs.of_output[:, order],
            as_state(kind, theirs.of_h[0], theirs.of_c[0]),
            reverse=reverse,
        )
        assert_close(got, expected, dtype)


@pytest.mark.parametrize("kind", KINDS)
def test_a_stack_of_two_layers_equals_a_torch_layer_of_two(kind, x64):
    batch, time, d, n, dtype = 3, 5, 2, 4, "float64"
    theirs = Torch(kind, dtype, batch, time, d, n, layers=2)
    outputs, (h, c), grads, x_grad, (h_grad, c_grad) = theirs.run()

    def layers(h, c):
        return tuple(as_state(kind, h[j], None if c is None else c[j]) for j in range(2))

    expected = (outputs, layers(h, c), tuple(as_param_grads(kind, grads, f"l{j}") for j in range(2)), x_grad)
    expected += (layers(h_grad, c_grad),)
    got = run_ours(
        sj.stack([KINDS[kind][1](d, n, dtype=dtype), KINDS[kind][1](n, n, dtype=dtype)]),
        tuple(as_params(kind, theirs.weights(), f"l{j}") for j in range(2)),
        theirs.xs,
        layers(theirs.h, theirs.c),
        theirs.of_output,
        layers(theirs.of_h, theirs.of_c),
    )
    assert_close(got, expected, dtype)


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=8)
@given(lengths=st.lists(st.integers(1, 5), min_size=4, max_size=4))
def test_masked_sequences_equal_packed_ones_of_torch_in_both_directions(kind, lengths):
    batch, time, d, n, dtype = len(lengths), 5, 2, 3, "float64"
    theirs = Torch(kind, dtype, batch, time, d, n, bidirectional=True)
    outputs, (h, c), grads, x_grad, (h_grad, c_grad) = theirs.run(lengths=lengths)
    got_x_grad = 0
    with jax.enable_x64(True):
        for j, suffix in enumerate(["l0", "l0_reverse"]):
            mask, block = sj.length_mask(np.array(lengths), time), slice(j * n, (j + 1) * n)
            xs = np.where(np.asarray(mask)[..., None], theirs.xs, np.nan)  # padding must be read by neither direction
            *got, x_part, got_state = run_ours(
                KINDS[kind][1](d, n, dtype=dtype),
                as_params(kind, theirs.weights(), suffix),
                xs,
                as_state(kind, theirs.h[j], theirs.c[j]),
                theirs.of_output[..., block],
                as_state(kind, theirs.of_h[j], theirs.of_c[j]),
                mask=mask,
                reverse=bool(j),
            )
            expected = [outputs[..., block], as_state(kind, h[j], c[j]), as_param_grads(kind, grads, suffix)]
            expected.append(as_state(kind, h_grad[j], c_grad[j] if kind == "lstm" else None))
            assert_close([*got, got_state], expected, dtype)
            got_x_grad += x_part
        assert_close(got_x_grad, x_grad, dtype)
