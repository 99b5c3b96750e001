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
# This notebook analyses one LSTM before and after training, with everything that the gradient microscope measures. The
# memory that the task needs is known in closed form.
#
# - On the task's inputs the verdict is "vanishing" before and after training, for two different reasons.
# - One Lyapunov exponent moves to zero, and the others do not.
# - A stable point at zero becomes a line of slow points, and the position on this line stores the number.
# - The forget gates, the expected place of the memory, hardly change.
#
# The last cell prints the numbers that this notebook must reproduce.

# %%
import dataclasses
import functools
import os

import jax
import jax.numpy as jnp
import numpy as np
import optax
from matplotlib import pyplot as plt

import seqjax as sj
from seqjax import plots

FAST = os.environ.get("SEQJAX_FAST") == "1"  # shorter training and fewer sequences, for the tests
BLUE, VERMILLION, GREEN, GREY = "#0072b2", "#d55e00", "#009e73", "#808080"

# %% [markdown]
# # 1. A task with a known demand on memory
#
# The task is sample and hold. At each step a mark comes with probability $p = 0.05$, and a number from $U[-1, 1]$ comes
# with the mark. The target at every step is the number of the last mark. Training sequences have 100 steps, and the
# first step always has a mark.
#
# Two facts are known without training. A model without memory that always answers 0 has a mean squared error of
# $\mathrm{E} v^2 = 1/3$. And the target depends on the input $k$ steps before exactly if no mark has come since. So the
# share of steps that need a memory of $k$ steps is $(1 - p)^k$: half of the steps need 13 steps, and a tenth need 45.

# %%
p = 0.05


@functools.partial(jax.jit, static_argnums=(1, 2))
def draw(key, batch, time):
    """Inputs (batch, time, 2), which are number * mark and mark, and the answers (batch, time, 1)."""
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
xs, answers = draw(jax.random.key(3), n, 300)  # the task: marks as in training
silence = np.zeros((n, 300, 2), np.float32)  # one mark at the first step, then silence
silence[:, 0] = np.stack([np.linspace(-0.9, 0.9, n), np.ones(n)], axis=1)

fig, ax = plt.subplots(figsize=(8, 2.4), layout="constrained")
steps = np.arange(1, 101)
ax.step(steps, answers[0, :100, 0], where="post", color=BLUE, label="answer")
marked = np.flatnonzero(xs[0, :100, 1])
ax.plot(steps[marked], xs[0, marked, 0], "o", color=VERMILLION, label="number with a mark")
ax.set(xlabel="time t (steps)", ylabel="number", ylim=(-1.1, 1.1), xlim=(0, 101))
ax.set_title("Sample and hold", loc="left", fontsize="medium")
ax.legend(ncols=2, fontsize="small", framealpha=0.75, loc="lower right");

# %% [markdown]
# The microscope can also measure this demand. A cell that solves the task stores one number,
# $h_t = h_{t-1} + m_t (v_t - h_{t-1})$. Its Jacobian is $1 - m_t$: one without a mark, and zero at a mark. So the mean
# square of $\partial h_t / \partial h_{t-k}$ is the share of spans of $k$ steps without a mark, $(1 - p)^k$, and its
# expected norm is $(1 - p)^{k/2}$. The gradient of any cell that solves the task must follow this curve, because the
# state before a mark must be forgotten.


# %%
@dataclasses.dataclass(frozen=True)  # compares by value, so it compiles once
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
# # 2. Training, and the effect of clipping
#
# The model is an LSTM of 16 units with a forget bias of zero, so its forget gates start at one half. The head is a
# Gaussian with standard deviation 1. Its loss is half the squared error plus $\frac12 \ln 2\pi$ nats. The gradient norm
# is clipped at 1.

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
print(f"squared error on new sequences {final_error:.5f}; always answering 0 gives {1 / 3:.3f}")
print(f"clipping shortened {acted.fraction:.1%} of the updates, the last at update {last}, one of them to "
      f"{acted.smallest_factor:.2f} of its norm, and at most {acted.longest_run} consecutive updates")

fig, (left, right) = plt.subplots(1, 2, figsize=(10, 3.4), layout="constrained")
curve = fitted.history["step"], squared_error(fitted.history["loss"])
plots.learning_curves({"training": curve}, ax=left, unit="mean squared error")
left.axhline(1 / 3, color=GREY, linestyle="--")
left.text(updates, 0.29, "always 0", ha="right", va="top", fontsize="small")
left.set_yscale("log")
plots.clipping(acted, ax=right);

# %% [markdown]
# Clipping acted early in training and at one setback, and no longer after the task was solved. It shortened single
# steps that were too long. If clipping shortens nearly every update, it only rescales the learning rate. That is not
# the case here.
#
# # 3. The loss by age and by length
#
# A mean over all steps hides how long something is remembered. If a sequence has one mark, at the first step, then the
# score by position is the score by the age of the memory. Training sequences have 100 steps, so all later positions are
# new to the network. The score by length, with marks as in training, shows whether long sequences are worse.

# %%
stored_numbers = np.linspace(-1, 1, 100, dtype=np.float32)
one_mark = np.zeros((100, 400, 2), np.float32)
one_mark[:, 0] = np.stack([stored_numbers, np.ones(100)], axis=1)
one_mark_batch = sj.Batch(one_mark, np.tile(stored_numbers[:, None, None], (1, 400, 1)), mask=np.ones((100, 400), bool))
lengths = np.repeat([25, 50, 100, 200, 400], 20)
mixed = sj.Batch(many, many_answers, mask=sj.length_mask(lengths, 400))

by_age, by_length = {}, {}
for name, params in networks.items():
    by_age[name] = squared_error(sj.score_by_length(model, params, [one_mark_batch]).by_position)
    by_length[name] = sj.score_by_length(model, params, [mixed])

fig, (left, right) = plt.subplots(1, 2, figsize=(10, 3.4), layout="constrained", sharey=True)
line_styles = dict(zip(networks, ({"color": BLUE}, {"color": VERMILLION, "linestyle": "--"})))
for name, line_style in line_styles.items():
    left.plot(np.arange(400), by_age[name], label=name, **line_style)
    right.plot(by_length[name].length, squared_error(by_length[name].by_length), marker="o", label=name, **line_style)
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
# Length does not matter: with marks as in training, sequences of 400 steps have the same error as those of 100. Age
# does matter. The memory fades slowly and without a sudden loss. After 400 steps in silence the error is a hundred
# times the error after 20 steps, but still far below that of always answering 0. Very fresh memories are also slightly
# worse, because the state needs a few steps to settle. The next sections explain this.
#
# # 4. The verdict in words
#
# First on the task's own inputs.

# %%
on_task = {name: sj.verdict(cell, params.cell, xs, horizon=150) for name, params in networks.items()}
for name, found in on_task.items():
    print(f"{name.upper()}\n{found}\n")

# %% [markdown]
# The verdict is "vanishing" before and after. For the trained network this is no defect, and it does not need the
# advice: gradients must vanish when a mark erases the memory, and they now vanish at the rate of the marks. A verdict
# holds for the inputs on which it was measured. To see the memory itself, measure where nothing erases it: one mark,
# then silence.

# %%
in_silence = {name: sj.verdict(cell, params.cell, silence, horizon=150) for name, params in networks.items()}
for name, found in in_silence.items():
    print(f"{name.upper()}\n{found}\n")

# %% [markdown]
# In silence, the untrained network forgets as fast as with marks, because it has not learned when to forget. The
# trained network remembers.
#
# # 5. The gradient by lag, and the demand of the task
#
# The left figure shows the expected norm on the task's inputs. Beside it is the norm of the exact solution on the same
# sequences and times. This norm falls by a factor of about $0.95^{10} = 0.6$ per 20 steps, and ends where every span
# has a mark. Before training, the gradient falls a thousandfold in 20 steps. After training, it is parallel to the
# demand. It lies below the demand, because only one direction of a random gradient on 32 numbers (h and c) is
# preserved.
#
# The right figure shows silence. There the trained network loses almost nothing after the first steps. The shaded area
# is the share of steps that need a memory of so many steps.

# %%
fig, (left, right) = plt.subplots(1, 2, figsize=(10.5, 3.8), layout="constrained", sharey=True)
lags = np.arange(151)
for ax, verdicts in ((left, on_task), (right, in_silence)):
    plots.gradients_by_lag({name: found.by_lag for name, found in verdicts.items()}, ax=ax)
times = on_task["after"].by_lag.times[0]
times = times[times >= lags[-1]]  # the others have no such lags
unmarked = np.cumprod([1 - np.asarray(xs)[:, times - k, 1] for k in lags[1:]], axis=0)
needed = np.sqrt(np.concatenate([[1.0], unmarked.mean(axis=(1, 2))]))
some = needed > 0
left.plot(lags[some], np.log10(needed[some]), color=GREEN, linestyle="-.", label="demand of the task")
left.legend(fontsize="small", framealpha=0.75, loc="lower right")
left.set_title("Expected gradient norm by lag, on the task", loc="left", fontsize="medium")
right.set_title("Expected gradient norm in silence", loc="left", fontsize="medium")
right.set_ylim(-6, 0.3)
left.set_yticks(range(-6, 1), [f"$10^{{{power}}}$" for power in range(-6, 1)])
share = right.twinx()
share.fill_between(lags, (1 - p) ** lags, color=GREEN, alpha=0.2, linewidth=0)
share.set(ylim=(0, 1), ylabel="share of steps with this demand")
for name in networks:
    print(f"{name}: memory horizon {on_task[name].by_lag.horizon:.0f} steps on the task, "
          f"{in_silence[name].by_lag.horizon:.0f} in silence")
at_60 = [np.exp(found.by_lag.log_expected[60]) for found in on_task.values()]
print(f"at lag 60 on the task: before {at_60[0]:.1e}, after {at_60[1]:.3f}, demand of the task {needed[60]:.3f}")

# %% [markdown]
# # 6. Lyapunov exponents
#
# In silence, the exponents are the rates at which each direction of the state is forgotten. Before training, zero is a
# fixed point, and every gate there is one half. The Jacobian has the eigenvalues $\frac12 + \frac14 \mu$, where $\mu$
# are the eigenvalues of the candidate's orthogonal matrix $W_c$, and 16 zeros. All $\mu$ lie on the unit circle. So the
# largest modulus is 3/4 if $\mu = 1$ is one of them. It is one here, so $\lambda_1 = \ln \frac34 = -0.288$, which is a
# memory of $-1/\lambda_1 = 3.5$ steps.
#
# After training, one exponent is near zero, and the others are slightly further from zero. One direction is remembered,
# and the others are forgotten as fast as before or faster. A stored number needs one exponent of zero, and the task
# stores one number.

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
# # 7. The gates do not store the memory
#
# An LSTM is said to remember in its cell state, with a forget gate near one: $c_t = f_t c_{t-1} + \dots$ decays by $f$
# per step, with the time constant $-1 / \ln f$. This network learned something else.

# %%
statistics = {name: sj.gate_statistics(cell, params.cell, xs) for name, params in networks.items()}
paths = {name: sj.analysis.cell_path(cell, params.cell, silence, horizon=60) for name, params in networks.items()}
fig, axes = plt.subplots(1, 4, figsize=(16, 3.9), layout="constrained")
for ax, (name, gates) in zip(axes, statistics.items()):
    plots.gate_histogram(gates, ax=ax)
    ax.set(ylim=(0, 1), title="")
    ax.set_title(f"Gate values, {name}", loc="left", fontsize="medium")
    ax.set_xlabel("position in its range (0 closed, 1 open)")
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
          f"saturated (below 0.1 or above 0.9): "
          + ", ".join(f"{gate} {found.saturated_low + found.saturated_high:.1%}" for gate, found in gates.items()))
print(f"dc_t/dc_(t-60) after training: {np.exp(paths['after'].log_true[:, 60].mean()):.3f}; "
      f"product of the forget gates {np.exp(paths['after'].log_forget[:, 60].mean()):.0e}")

# %% [markdown]
# Before training, every forget gate is near one half, $\tau = 1/\ln 2 = 1.44$ steps, and no gate is ever saturated.
# After training, this is nearly the same: the forget gate of no unit would preserve a value for two steps. According to
# the product of its forget gates, the cell state would lose all but one thousandth within ten steps. The true
# $\partial c_t / \partial c_{t-k}$ does not fall after the first few steps. The reason is that every step writes c
# again through h, and the loop through both has a gain of one. The gate activations suggest that this network cannot
# remember, which is wrong.
#
# # 8. Fixed points: a line that stores the number
#
# Where does the state stay constant without input? The search starts from states of the trajectories in silence.

# %%
points, trajectories = {}, {}
for name, params in networks.items():
    trajectories[name] = sj.trajectory(cell, params.cell, one_mark[::5, :200])
    points[name] = sj.fixed_points(cell, params.cell, jnp.zeros(2), starts=trajectories[name], count=96)


def answer(params, h):
    return np.asarray(jax.vmap(lambda h: model.head.moments(params.head, h).mean)(jnp.asarray(h, jnp.float32)))[:, 0]


for name, found in points.items():
    print(f"{name}: {found.reason}")
    for i, value in enumerate(answer(networks[name], found.states.h)):
        first, second = np.abs(found.eigenvalues[i, :2])
        kind = "slow" if found.kind[i] == "slow" else "stable" if found.stable[i] else "unstable"
        print(f"  {kind:8} answers {value:6.3f}, moves {found.residual[i]:.0e} per step, moduli of the eigenvalues "
              f"{first:.5f}, {second:.3f}, ...")

fig, axes = plt.subplots(1, 2, figsize=(11, 4.6), layout="constrained")
for ax, name in zip(axes, networks):
    plots.state_portrait(trajectories[name], points[name], ax=ax, most=20)
    mean, plane, _ = plots.principal_plane(trajectories[name])
    at_20 = np.concatenate([trajectories[name].h[:, 21], trajectories[name].c[:, 21]], axis=-1)
    dots = ax.scatter(*((at_20 - mean) @ plane.T).T, c=stored_numbers[::5], cmap="viridis", s=22, zorder=2.5)
    ax.set_title(f"Paths in silence, {name}", loc="left", fontsize="medium")
fig.colorbar(dots, ax=axes, label="stored number (dots: state 20 steps later)");

# %% [markdown]
# Before training, every trajectory falls into the only stable point, at zero, and 20 steps after the mark all dots are
# there. After training, each mark moves the state above a curve. The state falls onto the curve at a position that
# depends on its number, and the dots lie along the curve in order.
#
# Only a few points of the curve are fixed points. Along the rest the state moves slowly, away from unstable points and
# towards stable points. (A slow point is a minimum of the speed, so one eigenvalue there is exactly one.) Every largest
# eigenvalue is within one hundredth of one, and the next is far smaller. So the state needs hundreds of steps to move
# along the line, and a few steps to move across it.
#
# This explains section 3. The state needs a few steps to fall onto the line. Then it drifts along the line towards the
# number of the next stable point. An exact line of fixed points would need an eigenvalue of exactly one everywhere, and
# training needs no more than 100 steps.

# %%
drift = {name: answer(params, sj.unroll(cell, params.cell, one_mark)[0].h) for name, params in networks.items()}
fig, ax = plt.subplots(figsize=(4.6, 3.6), layout="constrained")
ax.plot([-1, 1], [-1, 1], color=GREY, label="exact memory")
for name, final_answer in drift.items():
    ax.plot(stored_numbers, final_answer, label=f"{name} training", **line_styles[name])
ax.set(xlabel="stored number", ylabel="answer 400 steps later", xticks=[-1, -0.5, 0, 0.5, 1])
ax.set_title("Drift of the stored numbers", loc="left", fontsize="medium")
ax.legend(fontsize="small", framealpha=0.75);

# %% [markdown]
# # 9. The effect of the parameters on the state
#
# $\partial s_t / \partial b_h$ is the sum of the effects of a small change of the biases at all steps so far. If the
# memory is short, it becomes constant within a few steps. If a number is stored, the effects of all steps in silence
# add up, and it grows in proportion to the age of the memory. So training rarely finds an exact line of fixed points.
# The gradient of the output after 60 steps shows the same from the other side. Before training, the gradient of the
# biases comes only from the last steps. After training, every step since the mark contributes equally.

# %%
def last_output(outputs):
    return outputs[:, -1].sum()


sensitivity = {name: sj.parameter_sensitivity(cell, params.cell, one_mark[55::5, :60], loss=last_output)
               for name, params in networks.items()}
fig, (left, right) = plt.subplots(1, 2, figsize=(10, 3.4), layout="constrained")
for name, found in sensitivity.items():
    typical = np.median(found.log_norm["b_h"], axis=0)
    left.plot(np.arange(1, 61), np.exp(typical), label=name, **line_styles[name])
    right.plot(np.arange(1, 61), np.cumsum(found.share["b_h"]), label=name, **line_styles[name])
left.set(xlabel="time t (steps)", ylabel="norm of ds_t/db_h (ratio)")
left.set_title("Sensitivity of the state to the biases", loc="left", fontsize="medium")
right.set(xlabel="time t (steps)", ylabel="share of the gradient up to t")
right.set_title("Origin of the biases' gradient", loc="left", fontsize="medium")
for ax in (left, right):
    ax.legend(fontsize="small", framealpha=0.75)
recent = {name: float(found.share["b_h"][-10:].sum()) for name, found in sensitivity.items()}
for name, part in recent.items():
    print(f"{name}: {part:.0%} of the gradient of b_h comes from the last ten of 60 steps")

# %% [markdown]
# # 10. What changed and what did not
#
# Training changed:
#
# - one Lyapunov exponent in silence, from $\ln \frac34$ to almost zero, and with it the memory horizon in silence, from
#   13 steps to more than 150;
# - the only stable fixed point, which became a line along which the state hardly moves;
# - the origin of the biases' gradient, from the last steps to all steps since the mark.
#
# Training did not change:
#
# - "contracting" on the task;
# - "vanishing" on the task, but the marks now determine the horizon;
# - the second exponent, which moved only slightly, so the other directions are forgotten as before;
# - the forget gates, which are still near one half, and the saturation, which is still zero.

# %%
print(f"{'':42}{'before':>12}{'after':>12}")
for what, value_of in {
    "squared error, 20 steps after the mark": lambda name: by_age[name][20],
    "verdict on the task": lambda name: on_task[name].regime,
    "memory horizon on the task, steps": lambda name: on_task[name].by_lag.horizon,
    "memory horizon in silence, steps": lambda name: in_silence[name].by_lag.horizon,
    "lambda_1 in silence": lambda name: exponents[name].mean[0],
    "lambda_2 in silence": lambda name: exponents[name].mean[1],
    "mean forget gate": lambda name: statistics[name]["forget"].mean,
    "its longest time constant, steps": lambda name: statistics[name]["forget"].time_constant.max(),
    "fixed and slow points": lambda name: len(points[name].kind),
}.items():
    row = [value_of(name) for name in networks]
    print(f"{what:42}" + "".join(f"{v:>12}" if isinstance(v, str) else f"{float(v):>12.4g}" for v in row))

# %% [markdown]
# # The numbers that this notebook must print
#
# | name | value | within |
# |---|---|---|
# | squared error of always answering 0 | 0.3333 | 0.01 |
# | mean square at lag 20 of the exact solution | 0.3585 | 0.05 |
# | squared error after training | 0 | 0.005 |
# | share of clipped updates | 0.04 | 0.04 |
# | horizon on the task, before | 13 | 1 |
# | lambda_1 in silence, before | -0.28768 | 0.005 |
# | radius of the fixed point, before | 0.75 | 0.000001 |
# | fixed points, before | 1 | 0 |
# | time constant of the forget gates, before | 1.4427 | 0.03 |
# | lambda_1 in silence, after | 0 | 0.01 |
# | lambda_2 in silence, after | -0.33 | 0.08 |
# | radius of the slowest point, after | 1 | 0.01 |
# | longest forget time constant, after | 1.6 | 0.3 |
# | saturated gates, after | 0 | 0.02 |
# | gradient from the last ten steps, before | 1 | 0.03 |
# | gradient from the last ten steps, after | 0.17 | 0.15 |

# %%
numbers = {
    "squared error of always answering 0": float((many[..., 0] ** 2).sum() / many[..., 1].sum()),
    "mean square at lag 20 of the exact solution": at_lag_20,
    "squared error after training": final_error,
    "share of clipped updates": acted.fraction,
    "horizon on the task, before": on_task["before"].by_lag.horizon,
    "lambda_1 in silence, before": exponents["before"].mean[0],
    "radius of the fixed point, before": points["before"].spectral_radius[0],
    "fixed points, before": len(points["before"].kind),
    "time constant of the forget gates, before": statistics["before"]["forget"].time_constant.mean(),
    "lambda_1 in silence, after": exponents["after"].mean[0],
    "lambda_2 in silence, after": exponents["after"].mean[1],
    "radius of the slowest point, after": max(points["after"].spectral_radius),
    "longest forget time constant, after": statistics["after"]["forget"].time_constant.max(),
    "saturated gates, after": max(g.saturated_low + g.saturated_high for g in statistics["after"].values()),
    "gradient from the last ten steps, before": recent["before"],
    "gradient from the last ten steps, after": recent["after"],
}
for name, value in numbers.items():
    print(f"{name:50} {float(value):.7g}")
