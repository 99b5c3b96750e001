"""Calls the public functions with one argument changed at a time, and counts what comes back.

    python tests/fuzz_functions.py --draws 10000

Every call must return, or raise one sentence of the library: "expected ..., got ...". Any other exception is a fault,
and so is a call that does not end. Values are drawn from a seed, so the same draws give the same calls.
"""

from __future__ import annotations

import argparse
import collections
import signal
import tempfile
import traceback
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import seqjax as sj

B, T, D, N, V = 2, 5, 3, 4, 6
SECONDS = 60  # a call that takes longer hangs

KEY = jax.random.key(0)
CELL, TOKENS_CELL = sj.LSTM(D, N), sj.stack([sj.Embedding(V, D), sj.GRU(D, N)])
PARAMS = CELL.init(KEY)
MODEL = sj.Model(TOKENS_CELL, sj.Categorical(N, V))
MODEL_PARAMS = MODEL.init(KEY)
REGRESSION = sj.Model(CELL, sj.Gaussian(N, 1))
RANDOM = np.random.default_rng(0)
XS = RANDOM.normal(size=(B, T, D)).astype(np.float32)
TOKENS = RANDOM.integers(0, V, (B, T))
H = RANDOM.normal(size=(B, T, N)).astype(np.float32)
LOSSES = RANDOM.normal(size=(B, T)).astype(np.float32)
MASK = np.arange(T)[None] < np.array([[5], [3]])
STATE = jax.tree.map(lambda leaf: jnp.broadcast_to(leaf, (B, *leaf.shape)), CELL.initial_state(PARAMS))
ONE_STATE, X, GRU_PARAMS = CELL.initial_state(PARAMS), jnp.asarray(XS[0, 0]), sj.GRU(D, N).init(KEY)
BATCHES = [sj.Batch(TOKENS, TOKENS)]
LINES = [[1, 2, 3], [4], [5, 0]]
TEXT = "a text of some length, for windows"


def first(stream: Any) -> Any:
    """The first batch of a stream, which may check its arguments only then."""
    return next(iter(stream), None)


def last(states: Any) -> jax.Array:
    return states.h[:, -1].sum()


# Each function with arguments that are right. The fuzzer changes one of them.
CALLS: dict[str, tuple[Callable[..., Any], dict[str, Any]]] = {
    "unroll": (sj.unroll, dict(cell=CELL, params=PARAMS, xs=XS, state=STATE, mask=MASK, reset=~MASK, key=KEY)),
    "trajectory": (sj.trajectory, dict(cell=CELL, params=PARAMS, xs=XS, state=STATE, mask=MASK)),
    "gates": (sj.gates, dict(cell=CELL, params=PARAMS, xs=XS, mask=MASK)),
    "with_noise": (sj.with_noise, dict(cell=CELL, xs=XS, key=KEY)),
    "unroll_parallel": (sj.unroll_parallel, dict(cell=CELL, params=PARAMS, xs=XS, state=STATE, mask=MASK)),
    "state_gradients": (sj.state_gradients, dict(cell=CELL, params=PARAMS, xs=XS, loss=last)),
    "weight_gradients_by_step": (sj.weight_gradients_by_step, dict(cell=CELL, params=PARAMS, xs=XS, loss=jnp.sum)),
    "truncated_grad": (sj.truncated_grad, dict(cell=CELL, params=PARAMS, xs=XS, loss=jnp.sum, window=2)),
    "memory_estimate": (sj.memory_estimate, dict(cell=CELL, batch=B, time=T, checkpoint_every=2, dtype="float32")),
    "explain": (sj.explain, dict(cell=CELL, params=PARAMS, x=X)),
    "stream": (lambda xs, **k: sj.stream(**k).push(xs), dict(cell=CELL, params=PARAMS, batch=B, state=None, xs=XS)),
    "detach": (sj.detach, dict(state=STATE)),
    "vanilla_step": (
        sj.vanilla_step,
        dict(params=sj.VanillaRNN(D, N).init(KEY), state=sj.VanillaState(jnp.zeros(N)), x=X, activation="tanh"),
    ),
    "lstm_step": (sj.lstm_step, dict(params=PARAMS, state=ONE_STATE, x=X)),
    "lstm_gates": (sj.lstm_gates, dict(params=PARAMS, state=ONE_STATE, x=X)),
    "gru_step": (
        sj.gru_step,
        dict(params=GRU_PARAMS, state=sj.GRUState(jnp.zeros(N)), x=X, reset="after", update="keeps"),
    ),
    "gru_gates": (sj.gru_gates, dict(params=GRU_PARAMS, state=sj.GRUState(jnp.zeros(N)), x=X, reset="after")),
    "readout": (sj.readout, dict(params=MODEL_PARAMS.head, h=jnp.zeros(N))),
    "head_log_probs": (
        sj.head_log_probs,
        dict(head=MODEL.head, params=MODEL_PARAMS.head, outputs=H, targets=TOKENS, mask=MASK),
    ),
    "gaussian_log_probs": (
        sj.head_log_probs,
        dict(head=REGRESSION.head, params=REGRESSION.head.init(KEY), outputs=H, targets=LOSSES[..., None], mask=MASK),
    ),
    "log_probs": (sj.log_probs, dict(model=MODEL, params=MODEL_PARAMS, xs=TOKENS, targets=TOKENS, mask=MASK)),
    "sequence_log_prob": (sj.sequence_log_prob, dict(model=MODEL, params=MODEL_PARAMS, xs=TOKENS, targets=TOKENS)),
    "generate": (
        sj.generate,
        dict(
            model=MODEL,
            params=MODEL_PARAMS,
            prompt=TOKENS,
            steps=3,
            key=KEY,
            temperature=1.0,
            top_k=2,
            top_p=0.5,
            end=1,
        ),
    ),
    "sequence_loss": (sj.sequence_loss, dict(step_losses=LOSSES, mask=MASK, reduce="mean", unit="nats")),
    "perplexity": (sj.perplexity, dict(log_p=-abs(LOSSES), mask=MASK)),
    "bits_per_character": (sj.bits_per_character, dict(log_p=-abs(LOSSES), mask=MASK)),
    "last_valid": (sj.last_valid, dict(outputs=H, mask=MASK)),
    "masked_mean": (sj.masked_mean, dict(outputs=H, mask=MASK)),
    "masked_max": (sj.masked_max, dict(outputs=H, mask=MASK)),
    "length_mask": (sj.length_mask, dict(lengths=[3, 5], time=T)),
    "evaluate": (sj.evaluate, dict(model=MODEL, params=MODEL_PARAMS, stream=BATCHES)),
    "evaluate_batch": (
        lambda model, params, **batch: sj.evaluate(model, params, [sj.Batch(**batch)]),
        dict(model=MODEL, params=MODEL_PARAMS, xs=TOKENS, targets=TOKENS, mask=MASK, reset=MASK),
    ),
    "fit": (
        sj.fit,
        dict(model=MODEL, stream=BATCHES, steps=1, clip_norm=1.0, key=KEY, params=MODEL_PARAMS, validate_every=1),
    ),
    "fit_batch": (
        lambda model, **batch: sj.fit(model, [sj.Batch(**batch)], steps=1),
        dict(model=MODEL, xs=TOKENS, targets=TOKENS, mask=MASK, reset=MASK),
    ),
    "score_by_length": (sj.score_by_length, dict(model=MODEL, params=MODEL_PARAMS, stream=BATCHES, score="loss")),
    "pad": (sj.data.pad, dict(sequences=LINES, time=4)),
    "batches": (
        lambda **k: first(sj.data.batches(**k)),
        dict(sequences=LINES, targets=LINES, batch=2, seed=0, passes=1, skip=0),
    ),
    "packed": (
        lambda **k: first(sj.data.packed(**k)),
        dict(sequences=LINES, targets=LINES, batch=2, window=4, seed=0, passes=1, skip=0),
    ),
    "windows": (
        lambda **k: first(sj.data.windows(**k)),
        dict(tokens=np.arange(40), batch=2, window=4, passes=1, skip=0),
    ),
    "encode": (sj.data.encode, dict(text="abc", vocabulary="abc", name="the text")),
    "decode": (sj.data.decode, dict(tokens=[0, 1], vocabulary="abc")),
    "split": (sj.data.split, dict(tokens=np.arange(100))),
    "unigram_entropy": (sj.data.unigram_entropy, dict(tokens=[0, 1, 2])),
    "adding_problem": (lambda **k: first(sj.data.adding_problem(**k)), dict(key=KEY, batch=2, time=6)),
    "copy_memory": (lambda **k: first(sj.data.copy_memory(**k)), dict(key=KEY, batch=2, delay=3, symbols=4)),
    "copy_baseline": (sj.data.copy_baseline, dict(delay=3, symbols=4)),
    "matrix_spectrum": (sj.analysis.matrix_spectrum, dict(A=np.eye(3))),
    "memory_horizon": (sj.analysis.memory_horizon, dict(log_norms=[0.0, -1.0, -9.0], threshold=0.01)),
    "kaplan_yorke_dimension": (sj.analysis.kaplan_yorke_dimension, dict(exponents=[0.5, -1.0])),
    "state_parts": (sj.analysis.state_parts, dict(cell=CELL, params=PARAMS)),
    "recurrent_matrices": (sj.analysis.recurrent_matrices, dict(cell=CELL, params=PARAMS)),
    "step_jacobians": (sj.step_jacobians, dict(cell=CELL, params=PARAMS, xs=XS, mask=MASK)),
    "jacobian_product": (sj.jacobian_product, dict(cell=CELL, params=PARAMS, xs=XS, start=1, stop=3)),
    "clipped": (sj.training.clipped, dict(optimizer=__import__("optax").adam(1e-3), clip_norm=1.0)),
    "leaf_names": (sj.training.leaf_names, dict(params=PARAMS)),
    "LSTM": (sj.LSTM, dict(input_size=D, hidden_size=N, forget_bias=1.0, dtype="float32")),
    "GRU": (sj.GRU, dict(input_size=D, hidden_size=N, reset="after")),
    "VanillaRNN": (sj.VanillaRNN, dict(input_size=D, hidden_size=N, activation="tanh")),
    "Embedding": (sj.Embedding, dict(vocabulary=V, features=D)),
    "Dropout": (sj.Dropout, dict(features=D, rate=0.5)),
    "Categorical": (sj.Categorical, dict(hidden_size=N, classes=V)),
    "Gaussian": (sj.Gaussian, dict(hidden_size=N, features=1, std=1.0)),
    "stack": (sj.stack, dict(cells=[CELL, sj.GRU(N, N)])),
    "Model": (sj.Model, dict(cell=CELL, head=MODEL.head)),
}

ODD = [
    None,
    True,
    False,
    0,
    1,
    -1,
    2,
    3.0,
    2.5,
    -0.5,
    float("nan"),
    float("inf"),
    2**40,
    1e300,
    1j,
    "",
    "tanh",
    "3",
    b"x",
    [],
    (),
    {},
    [1],
    [1, 2],
    [[1], [2, 3]],
    {"a": 1},
    object(),
    len,
    int,
    np.float32,
    slice(2),
    range(3),
    iter([1]),
    np.int8(3),
    np.float64(2.0),
    np.array(3),
    np.zeros(0),
    np.zeros((0, 3)),
    np.array("x"),
    np.array([None]),
    jnp.zeros(3),
    ["a", "b"],
    {1, 2},
    Exception("x"),
]


def changed(value: Any, random: np.random.Generator) -> Any:
    """Another value in place of a right one: an odd one, or a change of its dtype, shape, size or tree."""
    if not isinstance(value, np.ndarray | jax.Array | tuple | list) or random.random() < 0.3:
        return ODD[random.integers(len(ODD))]
    if isinstance(value, tuple | list) and len(value):
        i = int(random.integers(len(value)))
        kind = random.integers(6)
        if kind == 0:
            return value[:-1]
        if kind == 1:
            return dict(enumerate(value))
        if kind == 2:
            return [*value, value[0]]
        parts = [changed(part, random) if k == i else part for k, part in enumerate(value)]
        return type(value)(*parts) if hasattr(value, "_fields") else type(value)(parts)
    if not hasattr(value, "dtype") or jnp.issubdtype(value.dtype, jax.dtypes.prng_key):
        return ODD[random.integers(len(ODD))]
    a = np.asarray(value)
    with np.errstate(all="ignore"):
        ways: list[Callable[[], Any]] = [
            *(
                lambda dtype=dtype: a.astype(dtype)
                for dtype in ("bool", "int8", "uint32", "int64", "float16", "float64", "complex64", "O", "U8")
            ),
            lambda: jnp.asarray(a, jnp.bfloat16),
            lambda: a[None],
            lambda: a[..., None],
            lambda: a[0] if a.ndim else a,
            lambda: a.T,
            lambda: a.tolist(),
            lambda: a[:0],
            lambda: a[:, :0] if a.ndim > 1 else a[:0],
            lambda: a[..., :0] if a.ndim else a,
            lambda: a[:1],
            lambda: a[:, :1] if a.ndim > 1 else a[:1],
            lambda: a[..., :1] if a.ndim else a,
            lambda: np.concatenate([a, a]) if a.ndim else a,
            lambda: np.concatenate([a, a], -1) if a.ndim else a,
            lambda: np.full_like(a, -1),
            lambda: np.full_like(a, 100),
            lambda: np.full(a.shape, np.nan, np.float32),
            lambda: np.full(a.shape, np.inf, np.float32),
            lambda: a.astype(float) * 1e300,
            lambda: a.ravel(),
            lambda: {"a": a},
            lambda: (a, a),
            lambda: float(a.flat[0]),
            lambda: np.ma.masked_array(a),
        ]
    return ways[random.integers(len(ways))]()


def draws(count: int, seed: int, only: str | None = None) -> Iterator[tuple[int, str, str, Any]]:
    """(number, function, argument, the value in its place)."""
    names = [only] if only else [*CALLS]
    for number in range(count):
        random = np.random.default_rng([seed, number])
        name = names[random.integers(len(names))]
        arguments = CALLS[name][1]
        argument = [*arguments][random.integers(len(arguments))]
        try:
            value = changed(arguments[argument], random)
        except (TypeError, ValueError, OverflowError):  # numpy cannot make this value
            continue
        yield number, name, argument, value


class Hangs(BaseException):
    """A call that does not end."""


def outcome(name: str, argument: str, value: Any) -> tuple[str, str]:
    """What a call gives: "right", "refused", or a fault with its text."""
    function, arguments = CALLS[name]

    def stop(*_: Any) -> None:
        raise Hangs

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(SECONDS)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            jax.block_until_ready(jax.tree.leaves(function(**arguments | {argument: value})))
        return "right", ""
    except MemoryError:
        return "too large", ""  # no sentence of the library knows how much memory there is
    except (ValueError, TypeError, ArithmeticError) as error:
        text = str(error)
        if text.startswith("expected") or ("expected" in text and "got" in text):
            return "refused", text
        return "fault", _told(error)
    except Hangs:
        return "hangs", f"more than {SECONDS} s"
    except Exception as error:
        return ("too large", "") if "RESOURCE_EXHAUSTED" in str(error) else ("fault", _told(error))
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def _told(error: Exception) -> str:
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if "seqjax" in frame.filename]
    where = f"{Path(frames[-1].filename).name}:{frames[-1].lineno}" if frames else ""
    return f"{type(error).__name__} at {where}: {str(error).splitlines()[0][:160] if str(error) else ''}"


def run(count: int, seed: int, only: str | None = None) -> tuple[collections.Counter[str], list[str]]:
    """The number of calls by outcome, and a line for each fault."""
    counts: collections.Counter[str] = collections.Counter()
    faults = []
    for number, name, argument, value in draws(count, seed, only):
        found, text = outcome(name, argument, value)
        counts[found] += 1
        if found in ("fault", "hangs"):
            shown = f"{type(value).__name__} {getattr(value, 'dtype', '')}{getattr(value, 'shape', '')}"
            faults.append(
                f"{number}: {name}({argument}={shown if hasattr(value, 'shape') else repr(value)[:60]}): {text}"
            )
    return counts, faults


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--draws", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", help="one function of CALLS")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory():
        counts, faults = run(arguments.draws, arguments.seed, arguments.only)
    print("\n".join(faults))
    print(f"{sum(counts.values())} calls: {dict(counts)}")


if __name__ == "__main__":
    main()
