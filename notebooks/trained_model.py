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
# # A trained model under the microscope
#
# What you will see: one LSTM before and after training on a task whose demand on memory is known in closed form, seen
# through everything that the gradient microscope measures. The verdict on the task's inputs is "vanishing" before and
# after, and means two different things. One Lyapunov exponent moves to zero, and no other does. A stable point at
# zero becomes a line of slow points on which the remembered number lies. The forget gates, where one would look for
# the memory first, hardly move.
#
# The last cell prints the numbers that this notebook promises.

# %%
import functools
import os

import jax
import jax.numpy as jnp
import numpy as np
import optax
from matplotlib import pyplot as plt

import seqjax as sj
from seqjax import plots

FAST = os.environ.get("SEQJAX_FAST") == "1"  # shorter training and fewer sequences, for a check that everything runs
BLUE, VERMILLION, GREEN, GREY = "#0072b2", "#d55e00", "#009e73", "#808080"

# %% [markdown]
# # 1. A task whose demand is known
#
# Sample and hold: at each step a mark comes with probability $p = 0.05$, and with it a number from $U[-1, 1]$. The
# answer at every step is the number that came with the last mark. Training sequences have 100 steps, and the first
# step is always marked.
#
# Two things are known without any training. Whoever remembers nothing and always answers 0 has a mean squared error
# of $\mathrm{E} v^2 = 1/3$. And the answer at a step depends on the input $k$ steps before exactly if no mark came
# since, so the share of steps that need a memory of $k$ steps is $(1 - p)^k$: half of them 13 steps, a tenth of them
# 45.

# %%
p = 0.05


@functools.partial(jax.jit, static_argnums=(1, 2))
def draw(key, batch, time):
    """Inputs (batch, time, 2), the number where there is a mark and the mark, and the answers (batch, time, 1)."""
    key_number, key_mark = jax.random.split(key)
    numbers = jax.random.uniform(key_number, (batch, time), minval=-1.0)
    marks = jax.random.bernoulli(key_mark, p, (batch, time)).at[:, 0].set(True)
    last = jax.lax.cummax(jnp.where(marks, jnp.arange(time)[None], 0), axis=1)  # the step of the last mark
    answers = jnp.take_along_axis(numbers, last, axis=1)
    marks = marks.astype(numbers.dtype)
    return jnp.stack([numbers * marks, marks], axis=-1), answers[..., None]


def stream(key, batch=32, time=100):
    while True:
        key, now = jax.random.split(key)
        yield sj.Batch(*draw(now, batch, time))


n = 8 if FAST else 32
xs, answers = draw(jax.random.key(3), n, 300)  # to measure on: marks as in training
held = np.zeros((n, 300, 2), np.float32)  # and one mark at the first step, then silence
held[:, 0] = np.stack([np.linspace(-0.9, 0.9, n), np.ones(n)], axis=1)

fig, ax = plt.subplots(figsize=(8, 2.4), layout="constrained")
steps = np.arange(1, 101)
ax.step(steps, answers[0, :100, 0], where="post", color=BLUE, label="answer")
marked = np.flatnonzero(xs[0, :100, 1])
ax.plot(steps[marked], xs[0, marked, 0], "o", color=VERMILLION, label="number with a mark")
ax.set(xlabel="time t (steps)", ylabel="number", ylim=(-1.1, 1.1), xlim=(0, 101))
ax.set_title("Sample and hold", loc="left", fontsize="medium")
ax.legend(ncols=2, fontsize="small", framealpha=0.75, loc="lower right");

# %% [markdown]
# The demand can also be measured with the microscope itself. A cell that solves the task keeps one number, $h_t =
# h_{t-1} + m_t (v_t - h_{t-1})$, and its Jacobian is $1 - m_t$: one in silence, zero at a mark. So the mean square of
# $\partial h_t / \partial h_{t-k}$ is the share of steps without a mark in between, $(1 - p)^k$, and its expected
# norm is $(1 - p)^{k/2}$. Any cell that solves the task must let gradients fall with that curve: what a mark replaces
# must be forgotten.


# %%
class Holder:
    """h_t = h_{t-1} + m_t (v_t - h_{t-1}), the exact solution."""

    def init(self, key):
        return {}

    def initial_state(self, params):
        return jnp.zeros(1)

    def step(self, params, h, x):
        h = h + x[1] * (x[0] - h)
        return h, h


many, many_answers = draw(jax.random.key(4), 100, 400)
slopes = np.asarray(sj.step_jacobians(Holder(), {}, many).by_state)[:, :, 0, 0]  # dh_t/dh_(t-1)
over_20 = np.lib.stride_tricks.sliding_window_view(slopes, 20, axis=1).prod(axis=-1)
at_lag_20 = float(np.mean(over_20**2))
print(f"mean square at lag 20: {at_lag_20:.3f}; (1 - p)^20 = {(1 - p)**20:.3f}")

# %% [markdown]
# # 2. Training, and what clipping did to it
#
# An LSTM of 16 units with a forget bias of zero, so that its forget gates start at one half. The head answers with a
# Gaussian of standard deviation 1, whose loss is half the squared error plus $\frac12 \ln 2\pi$ nats. The gradient's
# norm is clipped at 1.

# %%
updates = 300 if FAST else 1000
model = sj.Model(sj.LSTM(2, 16, forget_bias=0.0), sj.Gaussian(16, 1, std=1.0))
before = model.init(jax.random.key(0))
fitted = sj.fit(model, stream(jax.random.key(1)), steps=updates, params=before, key=jax.random.key(2),
                optimizer=optax.adam(optax.cosine_decay_schedule(1e-2, updates)), clip_norm=1.0)
cell, networks = model.cell, {"before": before, "after": fitted.params}


def squared_error(loss):
    return 2 * (loss - 0.5 * np.log(2 * np.pi))


acted = sj.analysis.clipping_statistics(fitted.history, 1.0)
last = np.flatnonzero(acted.clipped)[-1] + 1
final_error = squared_error(sj.evaluate(model, fitted.params, [sj.Batch(xs, answers)]))
print(f"squared error on new sequences {final_error:.5f}, of always answering 0: {1 / 3:.3f}")
print(f"clipping cut {acted.fraction:.1%} of the updates, the last one at update {last}, the hardest to "
      f"{acted.smallest_factor:.2f} of its length, never more than {acted.longest_run} on end")

fig, (left, right) = plt.subplots(1, 2, figsize=(10, 3.4), layout="constrained")
curve = fitted.history["step"], squared_error(fitted.history["loss"])
plots.learning_curves({"training": curve}, ax=left, unit="mean squared error")
left.axhline(1 / 3, color=GREY, linestyle="--")
left.text(updates, 0.29, "always 0", ha="right", va="top", fontsize="small")
left.set_yscale("log")
plots.clipping(acted, ax=right);

# %% [markdown]
# Clipping acted early and at a setback, and not once the task was solved. It removed single steps that would have
# gone too far; it was not the learning rate in disguise, as it is where nearly every update is cut.
#
# # 3. Where the loss is
#
# A mean over everything hides what is remembered for how long. Of sequences with one mark at the first step, the
# score by position is the score by the age of the memory. Training sequences are over after 100 steps, so all beyond
# is new to the network. And a score by length, with marks as in training, tells whether long sequences harm.

# %%
numbers_held = np.linspace(-1, 1, 100, dtype=np.float32)
one_mark = np.zeros((100, 400, 2), np.float32)
one_mark[:, 0] = np.stack([numbers_held, np.ones(100)], axis=1)
to_hold = sj.Batch(one_mark, np.tile(numbers_held[:, None, None], (1, 400, 1)), mask=np.ones((100, 400), bool))
lengths = np.repeat([25, 50, 100, 200, 400], 20)
mixed = sj.Batch(many, many_answers, mask=sj.length_mask(lengths, 400))

by_age, by_length = {}, {}
for name, params in networks.items():
    by_age[name] = squared_error(sj.score_by_length(model, params, [to_hold]).by_position)
    by_length[name] = sj.score_by_length(model, params, [mixed])

fig, (left, right) = plt.subplots(1, 2, figsize=(10, 3.4), layout="constrained", sharey=True)
looks = dict(zip(networks, ({"color": BLUE}, {"color": VERMILLION, "linestyle": "--"})))
for name, look in looks.items():
    left.plot(np.arange(400), by_age[name], label=name, **look)
    right.plot(by_length[name].length, squared_error(by_length[name].by_length), marker="o", label=name, **look)
left.axvline(100, color=GREY, linestyle=":", label="longest in training")
for ax, place in ((left, "lower right"), (right, "center right")):
    ax.axhline(1 / 3, color=GREY, linestyle="-.", label="always 0")
    ax.set_yscale("log")
    ax.legend(fontsize="small", framealpha=0.75, loc=place)
left.set(xlabel="age of the memory (steps)", ylabel="mean squared error")
left.set_title("One mark, then silence", loc="left", fontsize="medium")
right.set(xlabel="length of the sequence (steps)")
right.set_title("Marks as in training", loc="left", fontsize="medium")
for age in (0, 1, 20, 100, 399):
    print(f"age {age:3}: squared error {by_age['after'][age]:.5f}")

# %% [markdown]
# Length does no harm: with marks as in training the network is as good on sequences of 400 steps as on those of 100.
# Age does: the memory fades slowly and without a cliff, and after 400 steps of silence the error is a hundred times
# what it is after 20, though still far below that of always answering 0. Fresh memories are a little worse, too: the
# state needs a few steps to settle. The following sections find out why.
#
# # 4. The verdict in words
#
# First on the task's own inputs.

# %%
on_task = {name: sj.verdict(cell, params.cell, xs, horizon=150) for name, params in networks.items()}
for name, found in on_task.items():
    print(f"{name.upper()}\n{found}\n")

# %% [markdown]
# Vanishing before, and vanishing after. For the trained network that is no complaint, and its advice is not needed:
# gradients must vanish where marks erase, and they now do so at the pace of the marks. A verdict speaks of the inputs
# that it was measured on. To see the memory itself, measure where nothing erases it: one mark, then silence.

# %%
in_silence = {name: sj.verdict(cell, params.cell, held, horizon=150) for name, params in networks.items()}
for name, found in in_silence.items():
    print(f"{name.upper()}\n{found}\n")

# %% [markdown]
# Before, the untrained network forgets in silence as fast as under marks: nothing tells it when to forget. After, it
# keeps.
#
# # 5. The gradient by lag, beside what the task needs
#
# On the left, the expected norm on the task's inputs, beside that of the exact solution on the same sequences and
# times, which falls by a factor of about $0.95^{10} = 0.6$ for every 20 steps (and ends where no span of so many steps
# is without a mark). Before training the gradient falls a thousandfold in that time. After, it falls in parallel to the
# demand, and lies below it, since of a random gradient on 32 numbers (h and c) only the part along one direction is
# kept. In silence, on the right, it loses next to nothing after the first steps. The shaded area is the share of steps
# that need a memory of so many steps.

# %%
fig, (left, right) = plt.subplots(1, 2, figsize=(10.5, 3.8), layout="constrained", sharey=True)
lags = np.arange(151)
for ax, verdicts in ((left, on_task), (right, in_silence)):
    plots.gradients_by_lag({name: found.by_lag for name, found in verdicts.items()}, ax=ax)
by_lag = on_task["after"].by_lag
kept = np.cumprod([1 - np.asarray(xs)[:, by_lag.times - k, 1] for k in lags[1:]], axis=0)  # no mark in k steps
needed = np.sqrt(np.concatenate([[1.0], kept.mean(axis=(1, 2))]))
some = needed > 0
left.plot(lags[some], np.log10(needed[some]), color=GREEN, linestyle="-.", label="what the task needs")
left.legend(fontsize="small", framealpha=0.75, loc="lower right")
left.set_title("Expected gradient norm by lag, on the task", loc="left", fontsize="medium")
right.set_title("The same in silence", loc="left", fontsize="medium")
right.set_ylim(-6, 0.3)
left.set_yticks(range(-6, 1), [f"$10^{{{power}}}$" for power in range(-6, 1)])
share = right.twinx()
share.fill_between(lags, (1 - p) ** lags, color=GREEN, alpha=0.2, linewidth=0)
share.set(ylim=(0, 1), ylabel="share of steps that need it")
for name in networks:
    print(f"{name}: memory horizon {on_task[name].by_lag.horizon:.0f} steps on the task, "
          f"{in_silence[name].by_lag.horizon:.0f} in silence")
at_60 = [np.exp(found.by_lag.log_expected[60]) for found in on_task.values()]
print(f"at lag 60 on the task: before {at_60[0]:.1e}, after {at_60[1]:.3f}, what the task needs {needed[60]:.3f}")

# %% [markdown]
# # 6. Lyapunov exponents
#
# In silence the exponents say at what rate each direction of the state is forgotten. Before training, zero is a fixed
# point at which every gate is one half, and the Jacobian has the eigenvalues $\frac12 + \frac14 \mu$, with $\mu$
# those of the candidate's orthogonal matrix $W_c$, and 16 zeros. All $\mu$ lie on the unit circle, so the largest
# modulus is 3/4 where $\mu = 1$ is among them, as it is here, and $\lambda_1 = \ln \frac34 = -0.288$: a memory of
# $-1/\lambda_1 = 3.5$ steps.
#
# After, one exponent has moved to zero, and the others a little away from it: one direction is kept, and the rest are
# forgotten as fast as before, or faster. Zero is what a kept number needs, and one number has to be kept.

# %%
fig, (left, right) = plt.subplots(1, 2, figsize=(10, 3.4), layout="constrained", sharey=True)
for ax, (name, found) in zip((left, right), in_silence.items()):
    plots.lyapunov_spectrum(found.exponents, ax=ax)
    ax.set_title(f"Lyapunov exponents in silence, {name}", loc="left", fontsize="medium")
exponents = {name: found.exponents for name, found in in_silence.items()}
for name, found in exponents.items():
    low, high = found.low[:, 0].mean(), found.high[:, 0].mean()
    print(f"{name}: lambda_1 = {found.mean[0]:.4f} ({low:.4f} to {high:.4f}), lambda_2 = {found.mean[1]:.3f}; "
          f"memory {-1 / found.mean[0]:.0f} steps and {-1 / found.mean[1]:.1f} steps")

# %% [markdown]
# # 7. The gates, and where the memory is not
#
# An LSTM is said to remember in its cell state, with a forget gate near one: $c_t = f_t c_{t-1} + \dots$ decays by
# $f$ a step, with a time constant of $-1 / \ln f$. That is not what this one learned.

# %%
statistics = {name: sj.gate_statistics(cell, params.cell, xs) for name, params in networks.items()}
paths = {name: sj.analysis.cell_path(cell, params.cell, held, horizon=60) for name, params in networks.items()}
fig, axes = plt.subplots(1, 4, figsize=(16, 3.9), layout="constrained")
for ax, (name, gates) in zip(axes, statistics.items()):
    plots.gate_histogram(gates, ax=ax)
    ax.set(ylim=(0, 1), title="")
    ax.set_title(f"Gate values, {name}", loc="left", fontsize="medium")
    ax.set_xlabel("place in range (0 shut, 1 open)")
plots.time_constants({name: gates["forget"] for name, gates in statistics.items()}, ax=axes[2])
axes[2].axhline(np.log10(1 / p), color=GREY, linestyle=":")
axes[2].text(0.5, np.log10(1 / p) + 0.03, "mean time between marks", ha="center", fontsize="small")
axes[2].set(ylim=(0, 1.6))
axes[2].set_yticks(np.log10([1, 2, 5, 10, 20]), [1, 2, 5, 10, 20])
axes[2].set_title("Forget gates: memory of the units", loc="left", fontsize="medium")
plots.cell_path(paths["after"], ax=axes[3])
axes[3].set_title("Memory of c in silence, after", loc="left", fontsize="medium")
for name, gates in statistics.items():
    tau = gates["forget"].time_constant
    print(f"{name}: time constants of the forget gates {tau.min():.2f} to {tau.max():.2f} steps; "
          f"shut or open (beyond 0.1 and 0.9): "
          + ", ".join(f"{gate} {found.saturated_low + found.saturated_high:.1%}" for gate, found in gates.items()))
print(f"dc_t/dc_(t-60) after training: {np.exp(paths['after'].log_true[:, 60].mean()):.3f}; "
      f"by forget gates alone {np.exp(paths['after'].log_forget[:, 60].mean()):.0e}")

# %% [markdown]
# Before, every forget gate is near one half, $\tau = 1/\ln 2 = 1.44$ steps, and no gate is ever saturated. After,
# much the same: no unit's forget gate would keep a value for two steps. By the product of its forget gates the cell
# state would lose all but a thousandth within ten steps. The true $\partial c_t / \partial c_{t-k}$ stays where it is
# after the first few: c is written anew at every step through h, and the loop through both is what has a gain of one.
# From gate activations alone one would have concluded that this network cannot remember.
#
# # 8. Fixed points: the line on which the number lies
#
# Where does the state stand still when nothing comes in? The search starts from states of the held trajectories.

# %%
points, trajectories = {}, {}
for name, params in networks.items():
    trajectories[name] = sj.trajectory(cell, params.cell, one_mark[::5, :200])
    points[name] = sj.fixed_points(cell, params.cell, jnp.zeros(2), starts=trajectories[name], count=96)


def answer(params, h):
    return np.asarray(jax.vmap(lambda h: model.head.moments(params.head, h).mean)(jnp.asarray(h, jnp.float32)))[:, 0]


for name, found in points.items():
    print(f"{name}: {found.reason}")
    for i, said in enumerate(answer(networks[name], found.states.h)):
        first, second = np.abs(found.eigenvalues[i, :2])
        kind = "slow" if found.kind[i] == "slow" else "stable" if found.stable[i] else "unstable"
        print(f"  {kind:8} answers {said:6.3f}, moves {found.residual[i]:.0e} a step, moduli of the eigenvalues "
              f"{first:.5f}, {second:.3f}, ...")

fig, axes = plt.subplots(1, 2, figsize=(11, 4.6), layout="constrained")
for ax, name in zip(axes, networks):
    plots.state_portrait(trajectories[name], points[name], ax=ax, most=20)
    mean, plane, _ = plots.principal_plane(trajectories[name])
    at_20 = np.concatenate([trajectories[name].h[:, 21], trajectories[name].c[:, 21]], axis=-1)
    dots = ax.scatter(*((at_20 - mean) @ plane.T).T, c=numbers_held[::5], cmap="viridis", s=22, zorder=2.5)
    ax.set_title(f"Paths in silence, {name}", loc="left", fontsize="medium")
fig.colorbar(dots, ax=axes, label="number to hold (dots: state 20 steps later)");

# %% [markdown]
# Before, everything falls into the one stable point at zero, and 20 steps after the mark all dots lie on it. After,
# each mark throws the state above a curve, it falls onto it at a place that belongs to its number, and the dots lie
# along it in order. Only a few points of the curve are fixed; along the rest the state creeps, away from unstable
# points and towards stable ones. (A slow point is where it creeps slowest; the speed has a minimum there, which makes
# one eigenvalue exactly one.) Every largest eigenvalue is within a hundredth of one, and the next is far below: along
# the line a state needs hundreds of steps to move, and across it a few.
#
# That explains section 3: the state needs a few steps to fall onto the line, and then drifts along it towards the
# number of the next stable point. An exact line of fixed points would need an eigenvalue of exactly one everywhere,
# and nothing in training asks for more than 100 steps.

# %%
drift = {name: answer(params, sj.unroll(cell, params.cell, one_mark)[0].h) for name, params in networks.items()}
fig, ax = plt.subplots(figsize=(4.6, 3.6), layout="constrained")
ax.plot([-1, 1], [-1, 1], color=GREY, label="held exactly")
for name, said in drift.items():
    ax.plot(numbers_held, said, label=f"{name} training", **looks[name])
ax.set(xlabel="number to hold", ylabel="answer 400 steps later", xticks=[-1, -0.5, 0, 0.5, 1])
ax.set_title("Where the numbers drift", loc="left", fontsize="medium")
ax.legend(fontsize="small", framealpha=0.75);

# %% [markdown]
# # 9. How the parameters reach the state
#
# $\partial s_t / \partial b_h$ collects what a small change of the biases does at every step so far. Where memory is
# short it settles within a few steps; where a number is kept, the changes of all silent steps add up, and it grows in
# proportion to the age of the memory. That is why a line of fixed points is hard to hit exactly. A gradient that
# arrives at the output after 60 steps tells the same from the other side: before, what reaches the biases comes from
# the last steps alone; after, every step back to the mark has an equal share.

# %%
def pull_at_the_end(outputs):
    return outputs[:, -1].sum()


sensitivity = {name: sj.parameter_sensitivity(cell, params.cell, one_mark[55::5, :60], loss=pull_at_the_end)
               for name, params in networks.items()}
fig, (left, right) = plt.subplots(1, 2, figsize=(10, 3.4), layout="constrained")
for name, found in sensitivity.items():
    typical = np.median(found.log_norm["b_h"], axis=0)
    left.plot(np.arange(1, 61), np.exp(typical), label=name, **looks[name])
    right.plot(np.arange(1, 61), np.cumsum(found.share["b_h"]), label=name, **looks[name])
left.set(xlabel="time t (steps)", ylabel="norm of ds_t/db_h (ratio)")
left.set_title("Sensitivity of the state to the biases", loc="left", fontsize="medium")
right.set(xlabel="time t (steps)", ylabel="share of the gradient up to t")
right.set_title("Where the gradient of the biases comes from", loc="left", fontsize="medium")
for ax in (left, right):
    ax.legend(fontsize="small", framealpha=0.75)
recent = {name: float(found.share["b_h"][-10:].sum()) for name, found in sensitivity.items()}
for name, part in recent.items():
    print(f"{name}: {part:.0%} of the gradient of b_h comes from the last ten of 60 steps")

# %% [markdown]
# # 10. What changed and what did not
#
# Changed: one Lyapunov exponent in silence, from $\ln \frac34$ to almost zero, and with it the memory horizon there,
# from 13 steps to beyond 150; the one stable fixed point, which became a line along which the state hardly moves; and
# where the gradient of the biases comes from, from the last steps to all steps back to the mark.
#
# Not changed: "contracting", on the task and in silence; "vanishing" on the task, if with a horizon that marks now
# set; the second exponent, or not much, so that other directions are forgotten as before; the forget gates, still
# near one half; and no gate saturates.

# %%
print(f"{'':42}{'before':>12}{'after':>12}")
for what, of in {
    "squared error, 20 steps after the mark": lambda name: by_age[name][20],
    "verdict on the task": lambda name: on_task[name].regime,
    "memory horizon on the task, steps": lambda name: on_task[name].by_lag.horizon,
    "memory horizon in silence, steps": lambda name: in_silence[name].by_lag.horizon,
    "lambda_1 in silence": lambda name: exponents[name].mean[0],
    "lambda_2 in silence": lambda name: exponents[name].mean[1],
    "mean forget gate": lambda name: statistics[name]["forget"].mean,
    "longest time constant of one, steps": lambda name: statistics[name]["forget"].time_constant.max(),
    "fixed and slow points": lambda name: len(points[name].kind),
}.items():
    row = [of(name) for name in networks]
    print(f"{what:42}" + "".join(f"{v:>12}" if isinstance(v, str) else f"{float(v):>12.4g}" for v in row))

# %% [markdown]
# # The numbers that this notebook must print
#
# | name | value | within |
# |---|---|---|
# | squared error of always answering 0 | 0.3333 | 0.01 |
# | mean square at lag 20 of the exact solution | 0.3585 | 0.05 |
# | squared error after training | 0 | 0.005 |
# | share of updates that were clipped | 0.04 | 0.04 |
# | horizon on the task, before | 13 | 1 |
# | lambda_1 in silence, before | -0.28768 | 0.005 |
# | radius of the fixed point, before | 0.75 | 0.000001 |
# | fixed points, before | 1 | 0 |
# | forget gates' time constant, before | 1.4427 | 0.03 |
# | lambda_1 in silence, after | 0 | 0.01 |
# | lambda_2 in silence, after | -0.33 | 0.08 |
# | radius of the slowest point, after | 1 | 0.01 |
# | longest forget time constant, after | 1.6 | 0.3 |
# | gates saturated, after | 0 | 0.02 |
# | gradient from the last ten steps, before | 1 | 0.03 |
# | gradient from the last ten steps, after | 0.17 | 0.15 |

# %%
numbers = {
    "squared error of always answering 0": float((many[..., 0] ** 2).sum() / many[..., 1].sum()),
    "mean square at lag 20 of the exact solution": at_lag_20,
    "squared error after training": final_error,
    "share of updates that were clipped": acted.fraction,
    "horizon on the task, before": on_task["before"].by_lag.horizon,
    "lambda_1 in silence, before": exponents["before"].mean[0],
    "radius of the fixed point, before": points["before"].spectral_radius[0],
    "fixed points, before": len(points["before"].kind),
    "forget gates' time constant, before": statistics["before"]["forget"].time_constant.mean(),
    "lambda_1 in silence, after": exponents["after"].mean[0],
    "lambda_2 in silence, after": exponents["after"].mean[1],
    "radius of the slowest point, after": max(points["after"].spectral_radius),
    "longest forget time constant, after": statistics["after"]["forget"].time_constant.max(),
    "gates saturated, after": max(g.saturated_low + g.saturated_high for g in statistics["after"].values()),
    "gradient from the last ten steps, before": recent["before"],
    "gradient from the last ten steps, after": recent["after"],
}
for name, value in numbers.items():
    print(f"{name:50} {float(value):.7g}")
