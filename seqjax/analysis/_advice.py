"""Advice on a regime, by what is known of the cell; none if nothing is known to help."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np

from seqjax.cell import Cell, Params, layers, optional
from seqjax.cells.lstm import LSTM
from seqjax.cells.vanilla import VanillaRNN


def advice(regime: str, cell: Cell, params: Params, lag: float, rate: float) -> tuple[str, ...]:
    """What usually helps, one sentence each.

    Args:
        regime: the regime of the verdict.
        cell, params: the cell and its parameters; their options and numbers are read.
        lag: of the verdict, in steps.
        rate: the largest exponent, in nats per step.
    """
    return tuple(_advice(regime, list(_layers(cell, params)), lag, rate))


def _advice(regime: str, parts: list[tuple[Cell, Params]], lag: float, rate: float) -> Iterator[str]:
    lstms = [(cell, params) for cell, params in parts if isinstance(cell, LSTM)]
    plain = [(cell, params) for cell, params in parts if isinstance(cell, VanillaRNN)]
    if regime == "vanishing":
        for cell, params in lstms[:1]:
            yield _forget_bias(cell, params)
        for _, params in plain[:1]:
            radius = _radius(params.W_hh)
            if radius < 0.95:
                yield f"the recurrent matrix has spectral radius {radius:.2f}: start it orthogonal, sj.Orthogonal()"
            yield "a gated cell, sj.GRU or sj.LSTM, keeps gradients over more steps"
        if math.isfinite(lag):
            yield f"bring information that is more than {lag:.0f} steps away nearer to where it is needed"
    elif regime in ("exploding", "transient growth"):
        yield "clip the gradient's norm (clip_norm=1.0) and look at how often clipping acts"
        for _, params in plain[:1]:
            radius = _radius(params.W_hh)
            if radius > 1:
                yield f"the recurrent matrix has spectral radius {radius:.2f}: scale it down, sj.SpectralRadius(0.9)"
        if math.isfinite(lag):
            yield f"truncate the gradient to a window of about {max(int(lag), 1)} steps"
    elif regime == "chaotic" and rate > 0:
        yield f"truncate the gradient to a window well below {1 / rate:.0f} steps, 1 / lambda_1, and clip it"
        for _, params in plain[:1]:
            yield f"the recurrent matrix has spectral radius {_radius(params.W_hh):.2f}: scale it down"


def _forget_bias(cell: LSTM, params: Params) -> str:
    n = cell.hidden_size
    bias = float(np.mean(np.asarray(params.b_h, np.float64)[n : 2 * n]))
    span = -1 / math.log(1 / (1 + math.exp(-bias))) if bias < 30 else math.inf
    return (
        f"the mean forget bias of the LSTM is {bias:.2f}, with which its gates alone keep about {span:.1f} steps: for "
        f"a memory of N steps start it with forget_bias=ln N, or with chrono=N"
    )


def _layers(cell: Cell, params: Params) -> Iterator[tuple[Cell, Params]]:
    """Every innermost cell with its parameters, as far as they can be matched."""
    inner: tuple[Any, ...] = layers(cell)
    if not inner:
        yield cell, params
    elif optional(cell, "cells") is not None and isinstance(params, tuple | list) and len(params) == len(inner):
        for each, of_each in zip(inner, params, strict=True):
            yield from _layers(each, of_each)
    elif (wrapped := getattr(params, "cell", None)) is not None:
        yield from _layers(inner[0], wrapped)


def _radius(W: jax.Array) -> float:
    return float(np.abs(np.linalg.eigvals(np.asarray(W, np.float64))).max())
