"""A search for fixed points in words: the points, what was covered, and what makes the result unreliable."""

from __future__ import annotations

from typing import TYPE_CHECKING

import jax
import numpy as np
from jaxtyping import Bool

from seqjax.analysis._descent import DescentResult
from seqjax.cell import Params

if TYPE_CHECKING:
    from seqjax.analysis.fixed_point_search import FixedPoints

SHOWN = 6  # points that are printed


def describe_points(found: FixedPoints) -> str:
    """The first points, the starts that were covered, and the reason."""
    k, slow = len(found.points), int(np.sum(found.kind == "slow"))
    stable = int(np.sum((found.kind == "fixed") & found.stable))
    lines = [f"{_number(k - slow, 'fixed point')} ({stable} stable), {_number(slow, 'slow point')}"]
    lines += [f"  {_point(found, i)}" for i in range(min(k, SHOWN))]
    lines += [f"  and {k - SHOWN} more"] * (k > SHOWN)
    lines += [f"covered: {found.covered}"] if found.covered else []
    return "\n".join([*lines, f"reliable: {'yes' if found.reliable else 'no'}", f"reason: {found.reason}"])


def runs_in_words(ends: DescentResult, forward: Bool[np.ndarray, " m"]) -> list[str]:
    """A sentence about the drawn states that were run forward and did not come to rest."""
    moving = int(np.sum(forward & ~ends.at_rest))
    if not moving:
        return []
    causes = "an oscillation, chaos, divergence, or a decay that needs more forward_steps"
    return [f"{moving} of {int(forward.sum())} states that were run forward did not come to rest ({causes})"]


def doubts_of(params: Params, ends: DescentResult, found: FixedPoints) -> list[str]:
    """What makes the result unreliable, one sentence each."""
    image, outcome = np.asarray(ends.image), found.search.outcome
    finite = np.isfinite(image).all(axis=1)
    if not finite.any():
        return [f"the step is not finite at any start{_not_finite(params)}"]
    doubts, unused = [], np.isin(outcome, ["stuck", "unfinished"])
    if ends.flat[finite].all() and np.ptp(image[finite], axis=0).any():
        doubts.append(
            "the derivative of the step is zero at every start, although its values differ (a quantized or saturated "
            "step): stability and time constants say nothing"
        )
    # The points are in their own order, so their starts are found by their index.
    mismatch = np.array([np.min(ends.mismatch[found.search.point == i]) for i in range(len(found.points))])
    if (mismatch > 0.5).any():
        doubts.append(
            f"the derivative of the step differs from a finite difference at {int(np.sum(mismatch > 0.5))} of "
            f"{len(mismatch)} points (a kink, a quantized step or a derivative rule of its own)"
        )
    if 2 * int(unused.sum()) >= len(outcome):
        doubts.append("half of the starts or more led to no point: raise max_iterations or pass other starts")
    return doubts


def _not_finite(params: Params) -> str:
    """The names of the parameters that are not finite, for the end of a sentence."""
    leaves = jax.tree_util.tree_leaves_with_path(params)
    bad = [jax.tree_util.keystr(path) for path, leaf in leaves if not np.isfinite(np.asarray(leaf)).all()]
    return f": {', '.join(f'params{name}' for name in bad)} contains NaN or infinity" if bad else ""


def _number(count: int, noun: str) -> str:
    return f"{count} {noun}{'s' * (count != 1)}"


def _point(found: FixedPoints, i: int) -> str:
    """One line about one point."""
    unstable, radius = int(found.unstable[i]), float(found.spectral_radius[i])
    kind = "stable" if found.stable[i] else f"unstable in {_number(unstable, 'direction')}" if unstable else "neutral"
    speed = f", speed {found.residual[i]:.3g}" if found.kind[i] == "slow" else ""
    return (
        f"{i + 1}. {found.kind[i]}, {kind}{speed}, spectral radius {radius:.4g}, {_time_constant(found, i)}, "
        f"{_number(int(found.counts[i]), 'start')}"
    )


def _time_constant(found: FixedPoints, i: int) -> str:
    """The slowest decay of all modes that decay."""
    modulus = np.abs(found.eigenvalues[i])
    decaying = modulus[modulus < 1]
    if not decaying.size:
        return "no decaying mode"
    slowest = decaying.max()
    return f"slowest time constant {-1 / np.log(slowest) if slowest > 0 else 0:.3g} steps"
