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
# This notebook starts with an LSTM that is written and trained in flax.linen and optax. Two lines bring its cell to
# seqjax, and the outputs agree with those of flax's own `nn.RNN`. Then we measure its gradients, exponents and gates.
#
# A user's cell of ten lines feeds the predictions of the model back as its inputs. The model of chaotic data is chaotic
# itself, and it has the exponent and the fixed point of the system that generated the data, which are known. The same
# works with flax.nnx.
#
# The last cell prints the numbers that this notebook must reproduce.

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

FAST = os.environ.get("SEQJAX_FAST") == "1"  # shorter training, for the tests
BLUE, VERMILLION, GREY = "#0072b2", "#d55e00", "#808080"

# %% [markdown]
# # 1. The flax model
#
# The data is one coordinate of the Henon map, $x_{t+1} = 1 - 1.4\,x_t^2 + 0.3\,x_{t-1}$, and the model predicts the
# next value. This section does not use seqjax. It has a flax module, its variables, a loss and a training loop.


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


losses, positions = [], np.random.default_rng(0)
with jax.numpy_dtype_promotion("standard"):  # optax computes float ** int, a strict-mode error
    variables = predictor.init(jax.random.key(0), series[:, :5])
    moments = optimizer.init(variables)
    for _ in range(steps):
        t = positions.integers(0, 3900)
        variables, moments, value = update(variables, moments, series[:, t : t + 51])
        losses.append(float(value))
print(f"mean squared error of the last 50 updates {np.mean(losses[-50:]):.6f}; variance of the data {series.var():.3f}")
jax.tree.map(jnp.shape, variables["params"])

# %% [markdown]
# # 2. Two lines
#
# `sj.from_linen` takes your cell, and its parameters are the part of your variables that belongs to the cell. The
# result has the three methods of a seqjax cell, so every function of the library accepts it.

# %%
cell = sj.from_linen(nn.LSTMCell(16), input_size=1)
params = {"params": variables["params"]["cell"]}

# %% [markdown]
# Is it the same network? We compare flax's own unroll with that of seqjax on a new series. The states agree, and the
# gradients of a loss agree too.

# %%
xs = henon(4, 400, seed=2)
final, hs = sj.unroll(cell, params, xs)


def flax_outputs(params):
    return nn.RNN(nn.LSTMCell(16, parent=None)).apply({"params": {"cell": params["params"]}}, xs)


def seqjax_outputs(params):
    return sj.unroll(cell, params, xs)[1]


def largest_difference(a, b):
    pairs = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    return max(float(jnp.abs(one - other).max()) for one, other in pairs)


linen_difference = largest_difference(flax_outputs(params), hs)
flax_gradient, seqjax_gradient = (
    jax.grad(lambda params: jnp.mean(run(params) ** 2))(params) for run in (flax_outputs, seqjax_outputs))
gradient_difference = largest_difference(flax_gradient, seqjax_gradient)
print(f"flax minus seqjax: outputs at most {linen_difference:.1e}, gradients at most {gradient_difference:.1e}")

# %% [markdown]
# # 3. The microscope
#
# The state of flax's cell is the pair (c, h), and the microscope measures all of it. First the verdict, on a series like
# those of the training.

# %%
driven = sj.verdict(cell, params, xs)
print(driven)

# %% [markdown]
# The data is chaotic, but the network that reads it is not. The input determines the state, so two different states
# that read the same series converge. This is correct for this task. The next value depends on the last two values, so
# the network need not store anything older, and gradients vanish within about twenty steps.

# %%
fig, (left, right) = plt.subplots(1, 2, figsize=(10, 3.6), layout="constrained")
plots.gradient_by_lag(driven.by_lag, ax=left)
plots.lyapunov_spectrum(driven.exponents, ax=right);

# %% [markdown]
# Are the numbers right for a cell that is not part of seqjax? The sum of all 32 exponents must be the mean of
# $\ln |\det J_t|$, exactly and for any length. In float64:

# %%
with jax.enable_x64(True):
    double = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float64), params)
    long = jnp.asarray(xs[:1], jnp.float64)
    all_exponents = sj.lyapunov_exponents(cell, double, long, k=32, burn_in=50, frame_burn_in=50)
    J = np.asarray(sj.step_jacobians(cell, double, long).by_state)[0]
sum_of_exponents = float(all_exponents.exponents.sum())
mean_log_det = float(np.linalg.slogdet(J[100:])[1].mean())
print(f"sum of 32 exponents {sum_of_exponents:.10f}, mean ln|det J| {mean_log_det:.10f}")

# %% [markdown]
# flax's cell does not name its gates, so `sj.gate_statistics` raises an error. Four lines copy the same weights into
# `sj.LSTM`, which names its gates. flax stores one transposed matrix per gate, and the bias beside the recurrent
# matrix.

# %%
try:
    sj.gate_statistics(cell, params, xs)
except TypeError as error:
    print("TypeError:", error)

kernels = params["params"]
W_xh = jnp.concatenate([kernels[f"i{gate}"]["kernel"].T for gate in "ifgo"])
W_hh = jnp.concatenate([kernels[f"h{gate}"]["kernel"].T for gate in "ifgo"])
b_h = jnp.concatenate([kernels[f"h{gate}"]["bias"] for gate in "ifgo"])
own, own_params = sj.LSTM(1, 16), sj.LSTMParams(W_xh, W_hh, b_h)

own_difference = largest_difference(sj.unroll(own, own_params, xs)[1], hs)
flax_step, own_step = sj.step_jacobians(cell, params, xs), sj.step_jacobians(own, own_params, xs)
jacobian_difference = max(
    largest_difference(flax_step.block(row, column), own_step.block(row, column))
    for row in ("c", "h") for column in ("c", "h"))
print(f"sj.LSTM minus flax: outputs at most {own_difference:.1e}, Jacobians at most {jacobian_difference:.1e}")

gates = sj.gate_statistics(own, own_params, xs)
fig, (left, right) = plt.subplots(1, 2, figsize=(10, 3.6), layout="constrained")
plots.gate_histogram(gates, ax=left)
plots.time_constants({"forget": gates["forget"]}, ax=right)
print(f"time constants of the forget gates: {gates['forget'].time_constant.min():.2f} to "
      f"{gates['forget'].time_constant.max():.2f} steps")

# %% [markdown]
# # 4. Your own cell, in ten lines
#
# A model that predicts can also run without data. Its output becomes its next input, which is another recurrence,
# without an input of its own. As a seqjax cell it has ten lines, around the flax cell and its readout.
#
# The class is a frozen dataclass, so two instances with equal fields compare equal and share compiled code. It needs no
# base class.


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
checks = sj.testing.check_cell(loop, x=jnp.zeros(0))
print(len(checks), "checks of the contract passed")

# %% [markdown]
# The closed loop starts at the state of the model after 400 values of data. From there it reads only its own
# predictions.

# %%
length = 1000 if FAST else 4000
no_input = jnp.zeros((4, length, 0))  # zero features
closed_loop = sj.verdict(loop, loop_params, no_input, state=final, k=4)
print(closed_loop)

# %% [markdown]
# The weights are the same, but the verdict is different: chaotic instead of contracting. Its largest exponent is that
# of the map that generated the data, 0.4192 nats per step. But the model was trained to predict one step only, and the
# exponent was not part of the training. (Over many steps of a chaotic trajectory, gradients are dominated by rounding
# errors; the verdict reports this.)
#
# The second exponent is not that of the map, $\ln 0.3 - 0.4192 = -1.6232$. The map has two directions. The network has
# thirty-two, and it forgets along them at its own rate.

# %%
predictions = np.asarray(sj.unroll(loop, loop_params, no_input, state=final)[1])[..., 0]
truth = henon(4, length, seed=3)[..., 0]
fig, (left, right) = plt.subplots(1, 2, figsize=(10, 3.9), layout="constrained")
left.plot(truth[:, :-1].ravel(), truth[:, 1:].ravel(), ".", color=GREY, markersize=6, label="the Henon map")
left.plot(predictions[:, :-1].ravel(), predictions[:, 1:].ravel(), ".", color=VERMILLION, markersize=1,
          label="the model in the closed loop")
left.set(xlabel="value at t", ylabel="value at t + 1")
left.set_title("Successive predictions in the closed loop", loc="left", fontsize="medium")
left.legend(fontsize="small", markerscale=2, framealpha=0.75)
plots.lyapunov_convergence(closed_loop.exponents, ax=right, most=2)
right.axhline(0.41922, color=GREY, linestyle="--")
right.text(right.get_xlim()[1], 0.40, "the Henon map, 0.4192", ha="right", va="top", fontsize="small")
lambda_1 = float(closed_loop.exponents.mean[0])
print(f"lambda_1 = {lambda_1:.4f}, one sequence's interval {closed_loop.exponents.low[:, 0].mean():.4f} to "
      f"{closed_loop.exponents.high[:, 0].mean():.4f}")

# %% [markdown]
# The fixed points agree too. The fixed point of the map satisfies $x^* = 1 - 1.4\,x^{*2} + 0.3\,x^*$, so
# $x^* = 0.63135$. Around it, perturbations are multiplied by the roots of $\mu^2 + 2.8\,x^*\,\mu - 0.3 = 0$, which are
# $-1.92374$ and $0.15595$. The model has this fixed point and its unstable direction. Its other eigenvalues are those
# of its own memory.
#
# In the plane of the states, the fixed point is separate from the visited states. The trajectory never stays near 0.63
# until the slowest of these memories has settled. (The map has a second fixed point, at $-1.13135$, outside the
# attractor. The model saw no data there, so its fixed points in that region are arbitrary.)

# %%
trajectory = sj.trajectory(loop, loop_params, no_input[:, :200], state=final)
points = sj.fixed_points(loop, loop_params, jnp.zeros(0), starts=trajectory, count=96)
print(points.reason)
h = np.asarray(jax.tree.leaves(points.states)[1])
predicted = h @ np.asarray(loop_params["readout"]["kernel"], float)[:, 0] + float(loop_params["readout"]["bias"][0])
nearest = int(np.argmin(np.abs(predicted - 0.63135)))
for i, value in enumerate(predicted):
    print(f"  {points.kind[i]}, {points.unstable[i]} unstable, output {value:.4f}, reached from {points.counts[i]} "
          f"starts; eigenvalues " + ", ".join(f"{v:.3f}" for v in points.eigenvalues[i, :3]) + ", ...")
fixed_value, unstable = predicted[nearest], points.eigenvalues[nearest, 0]

fig, (left, right) = plt.subplots(1, 2, figsize=(10, 4.2), layout="constrained")
mean, plane, share = plots.principal_plane(trajectory)
states = np.concatenate([leaf.reshape(-1, 16) for leaf in jax.tree.leaves(trajectory)], axis=-1)
left.plot(*((states - mean) @ plane.T).T, ".", color=BLUE, markersize=3, label="states of the closed loop")
left.plot(*(points.points[nearest] - mean) @ plane.T, "X", color=VERMILLION, markersize=9, label="fixed point")
left.set(xlabel=f"component 1 ({share[0]:.0%} of the variance)", ylabel=f"component 2 ({share[1]:.0%})")
left.set_title("The attractor in the state space", loc="left", fontsize="medium")
left.legend(fontsize="small", framealpha=0.75)
spectrum = sj.analysis.matrix_spectrum(points.jacobians[nearest])
plots.eigenvalues(spectrum, ax=right, title="Eigenvalues at the fixed point")
right.plot([-1.92374, 0.15595], [0, 0], "+", color=GREY, markersize=14, label="Henon map", zorder=1)
right.legend(fontsize="small", framealpha=0.75, loc="upper right");

# %% [markdown]
# # 5. The same with flax.nnx
#
# An nnx module stores its own weights. So the adapter takes the class and its arguments, and `params_from` extracts the
# weights from your module. Here the module has the weights of section 1.

# %%
module = nnx.LSTMCell(1, 16, rngs=nnx.Rngs(0))
for name, weights in variables["params"]["cell"].items():
    nnx.update(getattr(module, {"if": "if_"}.get(name, name)), weights)

nnx_cell = sj.from_nnx(nnx.LSTMCell, 1, 16)
nnx_params = nnx_cell.params_from(module)

nnx_difference = largest_difference(nnx.RNN(module)(jnp.asarray(xs)), sj.unroll(nnx_cell, nnx_params, xs)[1])
exponents = sj.lyapunov_exponents(nnx_cell, nnx_params, xs)
between = float(np.abs(exponents.exponents - driven.exponents.exponents).max())
print(f"flax.nnx minus seqjax: outputs at most {nnx_difference:.1e}; nnx minus linen: exponents at most {between:.1e}")

nnx_loop = ClosedLoop(nnx_cell)
nnx_loop_params = {"cell": nnx_params, "readout": loop_params["readout"]}
nnx_closed_loop = sj.lyapunov_exponents(nnx_loop, nnx_loop_params, no_input, state=final, k=4)
print(f"closed loop, lambda_1 = {nnx_closed_loop.mean[0]:.4f}")

# %% [markdown]
# The class of section 4 wraps the nnx cell without a change. For an equinox module, use `sj.from_equinox` and
# `params_from` in the same way.
#
# # The numbers that this notebook must print
#
# | name | value | within |
# |---|---|---|
# | linen outputs minus seqjax | 0 | 0.00001 |
# | linen gradients minus seqjax | 0 | 0.00001 |
# | nnx outputs minus seqjax | 0 | 0.00001 |
# | sj.LSTM outputs minus linen | 0 | 0.00001 |
# | Jacobian of sj.LSTM minus linen | 0 | 0.00001 |
# | sum of exponents minus mean ln det | 0 | 0.000000001 |
# | contracting with data as input | 1 | 0 |
# | checks of the contract | 9 | 0 |
# | chaotic in the closed loop | 1 | 0 |
# | lambda_1 in the closed loop, linen | 0.4192 | 0.03 |
# | lambda_1 in the closed loop, nnx | 0.4192 | 0.03 |
# | output at the fixed point | 0.63135 | 0.01 |
# | its unstable eigenvalue | -1.92374 | 0.1 |
# | mean squared error | 0 | 0.0005 |

# %%
numbers = {
    "linen outputs minus seqjax": linen_difference,
    "linen gradients minus seqjax": gradient_difference,
    "nnx outputs minus seqjax": nnx_difference,
    "sj.LSTM outputs minus linen": own_difference,
    "Jacobian of sj.LSTM minus linen": jacobian_difference,
    "sum of exponents minus mean ln det": sum_of_exponents - mean_log_det,
    "contracting with data as input": driven.contracting,
    "checks of the contract": len(checks),
    "chaotic in the closed loop": closed_loop.regime == "chaotic",
    "lambda_1 in the closed loop, linen": lambda_1,
    "lambda_1 in the closed loop, nnx": nnx_closed_loop.mean[0],
    "output at the fixed point": fixed_value,
    "its unstable eigenvalue": unstable.real,
    "mean squared error": np.mean(losses[-50:]),
}
for name, value in numbers.items():
    print(f"{name:45} {float(value):.7g}")
