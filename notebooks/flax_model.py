# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # The microscope on a flax model that you already have
#
# What you will see: an LSTM written and trained in flax.linen and optax, as you may have one already; two lines that
# bring its cell to seqjax, and outputs that agree with those of flax's own `nn.RNN`; then its gradients, exponents
# and gates. A cell of your own, ten lines long, feeds the model's predictions back to it: a model of chaotic data
# turns out to be chaotic itself, with the exponent and the fixed point of the system that made the data, which are
# known. And the same with flax.nnx.
#
# The last cell prints the numbers that this notebook promises.

# %%
import dataclasses
import os

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from matplotlib import pyplot as plt

import seqjax as sj
from seqjax import plots

FAST = os.environ.get("SEQJAX_FAST") == "1"  # shorter training, for a check that everything runs
BLUE, VERMILLION, GREY = "#0072b2", "#d55e00", "#808080"

# %% [markdown]
# # 1. The model that you have
#
# The data is one coordinate of the Henon map, $x_{t+1} = 1 - 1.4\,x_t^2 + 0.3\,x_{t-1}$, and the model predicts the
# next value. There is nothing of seqjax in this section: a flax module, its variables, a loss, a loop.


# %%
def henon(batch, time, seed):
    """Series (batch, time, 1) on the attractor."""
    x, before = np.random.default_rng(seed).uniform(-0.1, 0.1, (2, batch))
    series = []
    for _ in range(100 + time):
        x, before = 1 - 1.4 * x**2 + 0.3 * before, x
        series.append(x)
    return np.stack(series[100:], axis=1)[..., None].astype(np.float32)


class Predictor(nn.Module):
    @nn.compact
    def __call__(self, xs):
        hs = nn.RNN(nn.LSTMCell(16, name="cell"), name="rnn")(xs)
        return nn.Dense(1, name="readout")(hs)


predictor, series = Predictor(), henon(32, 4000, seed=1)
steps = 500 if FAST else 1500
optimizer = optax.adam(optax.cosine_decay_schedule(1e-2, steps))


@jax.jit
def update(variables, moments, xs):
    def loss(variables):
        return jnp.mean((predictor.apply(variables, xs[:, :-1]) - xs[:, 1:])[:, 5:] ** 2)

    value, gradient = jax.value_and_grad(loss)(variables)
    change, moments = optimizer.update(gradient, moments)
    return optax.apply_updates(variables, change), moments, value


losses, where = [], np.random.default_rng(0)
with jax.numpy_dtype_promotion("standard"):  # optax raises a float to a whole number, which strict promotion refuses
    variables = predictor.init(jax.random.key(0), series[:, :5])
    moments = optimizer.init(variables)
    for _ in range(steps):
        t = where.integers(0, 3900)
        variables, moments, value = update(variables, moments, series[:, t : t + 51])
        losses.append(float(value))
print(f"mean squared error of the last 50 updates {np.mean(losses[-50:]):.6f}, variance of the series {series.var():.3f}")
jax.tree.map(jnp.shape, variables["params"])

# %% [markdown]
# # 2. Two lines
#
# `sj.from_linen` takes the cell as you built it, and its parameters are the part of your variables that belong to it.
# The cell has the three methods of any cell of seqjax, so that all of the library takes it.

# %%
cell = sj.from_linen(nn.LSTMCell(16), input_size=1)
params = {"params": variables["params"]["cell"]}

# %% [markdown]
# Is it the same network? flax's own unrolling beside that of seqjax, on a new series: the states agree, and so do the
# gradients of a loss.

# %%
xs = henon(4, 400, seed=2)
final, hs = sj.unroll(cell, params, xs)


def by_flax(params):
    return nn.RNN(nn.LSTMCell(16, parent=None)).apply({"params": {"cell": params["params"]}}, xs)


def by_seqjax(params):
    return sj.unroll(cell, params, xs)[1]


def largest_difference(a, b):
    pairs = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    return max(float(jnp.abs(one - other).max()) for one, other in pairs)


linen_difference = largest_difference(by_flax(params), hs)
of_flax, of_seqjax = (jax.grad(lambda params: jnp.mean(run(params) ** 2))(params) for run in (by_flax, by_seqjax))
gradient_difference = largest_difference(of_flax, of_seqjax)
print(f"flax less seqjax: outputs at most {linen_difference:.1e}, gradients at most {gradient_difference:.1e}")

# %% [markdown]
# # 3. The microscope
#
# The state of flax's cell is the pair (c, h), and the microscope measures the whole of it; its fields have no names,
# so that c is called 0 and h 1. First the verdict, on a series like those that the model was trained on.

# %%
driven = sj.verdict(cell, params, xs)
print(driven)

# %% [markdown]
# The data is chaotic, and the network that reads it is not: what comes in sets the state, and two states that read
# the same series become one. That is as it should be. The next value depends on the last two, so nothing older has to
# be kept, and gradients vanish within some twenty steps.

# %%
fig, (left, right) = plt.subplots(1, 2, figsize=(10, 3.6), layout="constrained")
plots.gradient_by_lag(driven.by_lag, ax=left)
plots.lyapunov_spectrum(driven.exponents, ax=right);

# %% [markdown]
# Can the numbers be trusted, in a cell that seqjax has never seen? The sum of all 32 exponents is the mean of $\ln
# |\det J_t|$, exactly and at any length. In float64:

# %%
with jax.enable_x64(True):
    double = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float64), params)
    long = jnp.asarray(xs[:1], jnp.float64)
    every = sj.lyapunov_exponents(cell, double, long, k=32, burn_in=50, frame_burn_in=50)
    J = np.asarray(sj.step_jacobians(cell, double, long).by_state)[0]
sum_of_exponents = float(every.exponents.sum())
by_determinants = float(np.linalg.slogdet(J[100:])[1].mean())
print(f"sum of 32 exponents {sum_of_exponents:.10f}, mean ln|det J| {by_determinants:.10f}")

# %% [markdown]
# flax's cell does not say what its gates are called, so `sj.gate_statistics` refuses it. The same weights in seqjax's
# own LSTM, whose gates have names, are four lines: flax stores one matrix a gate, transposed, and its bias with the
# recurrent one.

# %%
try:
    sj.gate_statistics(cell, params, xs)
except TypeError as error:
    print("TypeError:", error)

of = params["params"]
W_xh = jnp.concatenate([of[f"i{gate}"]["kernel"].T for gate in "ifgo"])
W_hh = jnp.concatenate([of[f"h{gate}"]["kernel"].T for gate in "ifgo"])
b_h = jnp.concatenate([of[f"h{gate}"]["bias"] for gate in "ifgo"])
own, own_params = sj.LSTM(1, 16), sj.LSTMParams(W_xh, W_hh, b_h)

own_difference = largest_difference(sj.unroll(own, own_params, xs)[1], hs)
flax_step, own_step = sj.step_jacobians(cell, params, xs), sj.step_jacobians(own, own_params, xs)
jacobian_difference = max(
    largest_difference(flax_step.block(a, b), own_step.block(of, by))
    for a, of in (("0", "c"), ("1", "h")) for b, by in (("0", "c"), ("1", "h")))
print(f"sj.LSTM less flax: outputs at most {own_difference:.1e}; Jacobians, in closed form less by differentiation, "
      f"at most {jacobian_difference:.1e}")

gates = sj.gate_statistics(own, own_params, xs)
fig, (left, right) = plt.subplots(1, 2, figsize=(10, 3.6), layout="constrained")
plots.gate_histogram(gates, ax=left)
plots.time_constants({"forget": gates["forget"]}, ax=right)
print(f"time constants of the forget gates: {gates['forget'].time_constant.min():.2f} to "
      f"{gates['forget'].time_constant.max():.2f} steps")

# %% [markdown]
# # 4. Your own cell, in ten lines
#
# A model that predicts can be left alone with its predictions. That is another recurrence: one without input, in
# which the output becomes the next input. As a cell of seqjax it is ten lines, around the flax cell and its readout.
# (The class is a frozen dataclass so that two of them with equal fields compile once; nothing has to be inherited.)


# %%
@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class ClosedLoop:
    cell: object

    def init(self, key):
        return {"cell": self.cell.init(key), "readout": {"kernel": jnp.full((16, 1), 0.1), "bias": jnp.zeros(1)}}

    def initial_state(self, params):
        return self.cell.initial_state(params["cell"])

    def step(self, params, state, x):
        c, h = state
        y = params["readout"]["kernel"].T @ h + params["readout"]["bias"]
        return self.cell.step(params["cell"], state, y)[0], y


loop = ClosedLoop(cell)
loop_params = {"cell": params, "readout": variables["params"]["readout"]}
promises = sj.testing.check_cell(loop, x=jnp.zeros(0))
print(len(promises), "promises of the contract hold")

# %% [markdown]
# It begins where the model stands after it has read 400 values, and from there on reads nothing but what it says.

# %%
length = 1000 if FAST else 4000
silence = jnp.zeros((4, length, 0))  # no input: no features
free = sj.verdict(loop, loop_params, silence, state=final, k=4)
print(free)

# %% [markdown]
# The same weights, and another verdict: not contracting but chaotic. Its largest exponent is that of the map that
# made the data, 0.4192 nats a step, though the model was trained to predict a single step and has never been told of
# it. (Gradients over many steps of a chaotic trajectory belong to rounding errors; the verdict says so.) The second
# exponent is not the map's, $\ln 0.3 - 0.4192 = -1.6232$: the map has two directions, and the network thirty-two, in
# which it forgets at its own pace.

# %%
said = np.asarray(sj.unroll(loop, loop_params, silence, state=final)[1])[..., 0]
truth = henon(4, length, seed=3)[..., 0]
fig, (left, right) = plt.subplots(1, 2, figsize=(10, 3.9), layout="constrained")
left.plot(truth[:, :-1].ravel(), truth[:, 1:].ravel(), ".", color=GREY, markersize=6, label="the Henon map")
left.plot(said[:, :-1].ravel(), said[:, 1:].ravel(), ".", color=VERMILLION, markersize=1, label="the model, left alone")
left.set(xlabel="value at t", ylabel="value at t + 1")
left.set_title("What it says when nobody speaks to it", loc="left", fontsize="medium")
left.legend(fontsize="small", markerscale=2, framealpha=0.75)
plots.lyapunov_convergence(free.exponents, ax=right, most=2)
right.axhline(0.41922, color=GREY, linestyle="--")
right.text(right.get_xlim()[1], 0.40, "the Henon map, 0.4192", ha="right", va="top", fontsize="small")
lambda_1 = float(free.exponents.mean[0])
print(f"lambda_1 = {lambda_1:.4f}, one sequence's interval {free.exponents.low[:, 0].mean():.4f} to "
      f"{free.exponents.high[:, 0].mean():.4f}")

# %% [markdown]
# Its fixed points tell the same. The map stands still at $x^* = 1 - 1.4\,x^{*2} + 0.3\,x^*$, so at $x^* = 0.63135$,
# and around it perturbations are multiplied by the roots of $\mu^2 + 2.8\,x^*\,\mu - 0.3 = 0$, $-1.92374$ and
# $0.15595$. The model has this point and its unstable direction; its other eigenvalues are those of its own memory.
# In the plane of the states it lies apart from those that are visited: they never stay at 0.63 for as long as the
# slowest of these memories takes to settle. (The map has a second fixed point, at $-1.13135$, off the attractor. The
# model was never shown it, and what it has out there is guesswork.)

# %%
trajectory = sj.trajectory(loop, loop_params, silence[:, :200], state=final)
points = sj.fixed_points(loop, loop_params, jnp.zeros(0), starts=trajectory, count=96)
print(points.reason)
h = np.asarray(jax.tree.leaves(points.states)[1])
answers = h @ np.asarray(loop_params["readout"]["kernel"], float)[:, 0] + float(loop_params["readout"]["bias"][0])
nearest = int(np.argmin(np.abs(answers - 0.63135)))
for i, answer in enumerate(answers):
    print(f"  {points.kind[i]}, {points.unstable[i]} unstable, answers {answer:.4f}, reached from {points.counts[i]} "
          f"starts; eigenvalues " + ", ".join(f"{v:.3f}" for v in points.eigenvalues[i, :3]) + ", ...")
fixed_value, unstable = answers[nearest], points.eigenvalues[nearest, 0]

fig, (left, right) = plt.subplots(1, 2, figsize=(10, 4.2), layout="constrained")
mean, plane, share = plots.principal_plane(trajectory)
states = np.concatenate([leaf.reshape(-1, 16) for leaf in jax.tree.leaves(trajectory)], axis=-1)
left.plot(*((states - mean) @ plane.T).T, ".", color=BLUE, markersize=3, label="states, left alone")
left.plot(*(points.points[nearest] - mean) @ plane.T, "X", color=VERMILLION, markersize=9, label="fixed point")
left.set(xlabel=f"component 1 ({share[0]:.0%} of the variance)", ylabel=f"component 2 ({share[1]:.0%})")
left.set_title("Its attractor, in the state", loc="left", fontsize="medium")
left.legend(fontsize="small", framealpha=0.75)
plots.eigenvalues(sj.analysis.matrix_spectrum(points.jacobians[nearest]), ax=right, title="Eigenvalues at its fixed point")
right.plot([-1.92374, 0.15595], [0, 0], "+", color=GREY, markersize=14, label="of the Henon map", zorder=1)
right.legend(fontsize="small", framealpha=0.75, loc="upper right");

# %% [markdown]
# # 5. The same with flax.nnx
#
# An nnx module holds its weights itself. So the adapter takes the class and its arguments, and `params_from` takes
# the weights out of the module that you have. Here it is one with the weights of section 1.

# %%
module = nnx.LSTMCell(1, 16, rngs=nnx.Rngs(0))
for name, weights in variables["params"]["cell"].items():
    nnx.update(getattr(module, {"if": "if_"}.get(name, name)), weights)

nnx_cell = sj.from_nnx(nnx.LSTMCell, 1, 16)
nnx_params = nnx_cell.params_from(module)

nnx_difference = largest_difference(nnx.RNN(module)(jnp.asarray(xs)), sj.unroll(nnx_cell, nnx_params, xs)[1])
exponents = sj.lyapunov_exponents(nnx_cell, nnx_params, xs)
between = float(np.abs(exponents.exponents - driven.exponents.exponents).max())
print(f"flax.nnx less seqjax: outputs at most {nnx_difference:.1e}; exponents less those by linen at most {between:.1e}")

nnx_loop = ClosedLoop(nnx_cell)
nnx_loop_params = {"cell": nnx_params, "readout": loop_params["readout"]}
nnx_free = sj.lyapunov_exponents(nnx_loop, nnx_loop_params, silence, state=final, k=4)
print(f"left alone, lambda_1 = {nnx_free.mean[0]:.4f}")

# %% [markdown]
# The same ten lines went around the nnx cell as around the linen one. An equinox module comes in as an nnx one does,
# by `sj.from_equinox` and `params_from`.
#
# # The numbers that this notebook must print
#
# | name | value | within |
# |---|---|---|
# | linen outputs less seqjax | 0 | 0.00001 |
# | linen gradients less seqjax | 0 | 0.00001 |
# | nnx outputs less seqjax | 0 | 0.00001 |
# | sj.LSTM outputs less linen | 0 | 0.00001 |
# | Jacobian in closed form less linen | 0 | 0.00001 |
# | sum of exponents less mean ln det | 0 | 0.000000001 |
# | contracting when driven | 1 | 0 |
# | promises of the contract | 9 | 0 |
# | chaotic when left alone | 1 | 0 |
# | lambda_1 left alone, linen | 0.4192 | 0.03 |
# | lambda_1 left alone, nnx | 0.4192 | 0.03 |
# | fixed point's answer | 0.63135 | 0.01 |
# | its unstable eigenvalue | -1.92374 | 0.1 |
# | mean squared error | 0 | 0.0005 |

# %%
numbers = {
    "linen outputs less seqjax": linen_difference,
    "linen gradients less seqjax": gradient_difference,
    "nnx outputs less seqjax": nnx_difference,
    "sj.LSTM outputs less linen": own_difference,
    "Jacobian in closed form less linen": jacobian_difference,
    "sum of exponents less mean ln det": sum_of_exponents - by_determinants,
    "contracting when driven": driven.contracting,
    "promises of the contract": len(promises),
    "chaotic when left alone": free.regime == "chaotic",
    "lambda_1 left alone, linen": lambda_1,
    "lambda_1 left alone, nnx": nnx_free.mean[0],
    "fixed point's answer": fixed_value,
    "its unstable eigenvalue": unstable.real,
    "mean squared error": np.mean(losses[-50:]),
}
for name, value in numbers.items():
    print(f"{name:45} {float(value):.7g}")
