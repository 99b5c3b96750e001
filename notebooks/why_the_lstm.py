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
# # Why the cell path of the LSTM works
#
# This notebook shows:
#
# - the four gates, and the additive path of the cell state;
# - how the forget bias sets the memory length: 1.4 steps at $b = 0$ and 149 steps at $b = 5$;
# - why the product of the forget gates, the usual explanation, misses the true $\partial c_T / \partial c_0$ by orders
#   of magnitude;
# - gradients by lag of the LSTM, the GRU and the vanilla network;
# - Lyapunov exponents of the whole state $(h, c)$, and the wrong exponents that $h$ gives without $c$;
# - an initialization that spreads the memory over all lengths.
#
# All networks here are untrained, because gradients must arrive before a network can learn. The last cell prints the
# numbers that this notebook must reproduce.

# %%
import dataclasses
import os

import jax
import jax.numpy as jnp
import numpy as np
from matplotlib import pyplot as plt

import seqjax as sj
from seqjax import plots

FAST = os.environ.get("SEQJAX_FAST") == "1"  # a shorter run for the exponents, for the tests

# %% [markdown]
# # 1. The gates
#
# The state of an LSTM is two vectors, $h$ and $c$. Three gates between 0 and 1 and a candidate between $-1$ and 1 are
# computed from $x_t$ and $h_{t-1}$. The update of the cell state is a sum:
#
# $$\begin{aligned}
# i &= \sigma(W_i [x, h] + b_i), & f &= \sigma(W_f [x, h] + b_f), \\
# \tilde c &= \tanh(W_c [x, h] + b_c), & o &= \sigma(W_o [x, h] + b_o), \\
# c_t &= f * c_{t-1} + i * \tilde c, & h_t &= o * \tanh(c_t).
# \end{aligned}$$
#
# `sj.gates` returns all gates at every step, and `sj.gate_statistics` summarizes them over a run. Below, 32 units read
# noise. The forget bias is 1, so the forget gates are near $\sigma(1) = 0.73$, and the other gates are near $1/2$.

# %%
d, n, T = 4, 32, 300
lstm = sj.LSTM(d, n)
noise = jax.random.normal(jax.random.key(1), (4, T, d))


def initial(forget_bias):
    """Parameters of the LSTM, with the same weights for every forget bias."""
    return sj.LSTM(d, n, forget_bias=forget_bias).init(jax.random.key(0))


statistics = sj.gate_statistics(lstm, initial(1.0), noise)
print({name: round(gate.mean, 3) for name, gate in statistics.items()})
plots.gate_histogram(statistics);

# %% [markdown]
# # 2. The additive path without weights
#
# If no gate read $h$, the path from $c_{t-1}$ to $c_t$ would be only a multiplication by $f$,
#
# $$\frac{\partial c_T}{\partial c_0} = \prod_{t=1}^{T} f_t,$$
#
# with no weight matrix in it. To isolate this path, set all weights to zero. Then $f = \sigma(b)$ at every step. The
# state $(h, c)$ has $2n$ numbers and $2n$ Lyapunov exponents. Half of them are $\ln \sigma(b)$. The other half are
# minus infinity, because $h_t$ is a function of $c_t$ and does not depend on $h_{t-1}$. A value in $c$ decays like
# $e^{-k/\tau}$ with the time constant $\tau = -1 / \ln \sigma(b)$ steps.

# %%
biases = (0.0, 1.0, 3.0, 5.0)
exponents, constants = {}, {}
print("   b   sigma(b)   largest exponent   number n   number n + 1    tau (steps)")
for b in biases:
    without_weights = jax.tree.map(jnp.zeros_like, initial(b))._replace(b_h=initial(b).b_h)
    found = sj.lyapunov_exponents(lstm, without_weights, jnp.zeros((1, T, d)), k=n + 1).exponents[0]
    forget = sj.gate_statistics(lstm, without_weights, jnp.zeros((1, T, d)))["forget"]
    exponents[b], constants[b] = found[0], forget.time_constant[0]
    print(f"{b:4.0f}{forget.mean:11.4f}{found[0]:19.6f}{found[n - 1]:11.6f}{found[n]:15}{constants[b]:15.3f}")

# %% [markdown]
# # 3. The true path
#
# A real LSTM reads $h$. The content of $c_{t-1}$ goes through the output gate into $h_{t-1}$, and returns through the
# gates and the candidate. Near the zero state this has a closed form. There $i = o = \frac12$ and all slopes of tanh
# are 1, so $h_{t-1} = \frac12 c_{t-1}$ and
#
# $$c_t = \sigma(b)\, c_{t-1} + \tfrac12 W_c h_{t-1} = \big(\sigma(b) + \tfrac14 W_c\big)\, c_{t-1}.$$
#
# So the largest exponent is $\ln \max_i |\sigma(b) + \frac14 \lambda_i(W_c)|$, and not $\ln \sigma(b)$. The eigenvalues
# of an orthogonal $W_c$ have modulus one, so the loop through $h$ adds up to a quarter. At $b = 1$ the sum is
# $0.731 + 0.25 = 0.981$, and the memory is 50 steps instead of 3. At $b = 3$ it is 1.2, and the zero state is unstable.

# %%
still = jnp.zeros((1, T, d))  # no input, so that the state stays at zero
by_formula, measured = {}, {}
print("   b   ln sigma(b)   ln max|sigma(b) + eig(W_c)/4|   measured largest exponent")
for b in biases:
    params = initial(b)
    W_c = np.split(np.asarray(params.W_hh, np.float64), 4)[2]  # rows in the order i, f, c~, o
    by_formula[b] = np.log(np.abs(1 / (1 + np.exp(-b)) + np.linalg.eigvals(W_c) / 4).max())
    measured[b] = sj.lyapunov_exponents(lstm, params, still, k=n + 1).exponents[0, 0]
    print(f"{b:4.0f}{-np.log1p(np.exp(-b)):14.4f}{by_formula[b]:32.4f}{measured[b]:28.4f}")

# %% [markdown]
# With noise as input the state is not zero, the gates differ between units and steps, and there is no closed form.
# `sj.analysis.cell_path` differentiates the network. It compares the norm of the true
# $\partial c_T / \partial c_{T-k}$, through every path, with the product of the forget gates on the same run.

# %%
fig, axes = plt.subplots(1, 4, figsize=(14, 3.4), layout="constrained")
paths = {b: sj.analysis.cell_path(lstm, initial(b), noise, horizon=200) for b in biases}
for ax, (b, path) in zip(axes, paths.items()):
    plots.cell_path(path, ax=ax)
    ax.set_title(f"forget bias {b:.0f}", loc="left", fontsize="medium")
    true, product = path.log_true.mean(0)[50], path.log_forget.mean(0)[50]
    print(f"b = {b:.0f}, lag 50: true {np.exp(true):.3g}, product of the forget gates {np.exp(product):.3g}, "
          f"ratio {np.exp(true - product):.3g}")
missed = {b: (path.log_true.mean(0)[50] - path.log_forget.mean(0)[50]) / np.log(10) for b, path in paths.items()}

# %% [markdown]
# Two results follow. If the bias is small, the product of the forget gates is far too small: most of the gradient has
# passed through $h$. If the bias is large, the two agree at short lags. At longer lags the product still falls, while
# the true derivative stays or grows.
#
# So the cell path works, but not because a product of gates close to one is close to one. It works because it keeps the
# linear part of the recurrence near the identity, and the rest of the network adds to it. Nothing in it prevents
# growth, and this is why LSTMs are trained with clipping.
#
# # 4. Gradients by lag: LSTM, GRU and vanilla
#
# The figure shows the norm of $\partial s_t / \partial s_{t-k}$ over the whole state, with the same noise as input. The
# vanilla network has an orthogonal $W_{hh}$, the best possible case, and loses its gradient through the slopes of tanh.
# The GRU, $h_t = (1 - z) * \tilde h + z * h_{t-1}$, has a path like the LSTM's. Its update gate starts at $1/2$, like
# the forget gate of an LSTM with $b = 0$. The horizon is the first lag from which less than one percent of the gradient
# arrives.

# %%
cells = {
    "vanilla": (sj.VanillaRNN(d, n), sj.VanillaRNN(d, n).init(jax.random.key(0))),
    "GRU": (sj.GRU(d, n), sj.GRU(d, n).init(jax.random.key(0))),
    "LSTM, b = 1": (lstm, initial(1.0)),
    "LSTM, b = 3": (lstm, initial(3.0)),
}
by_lag = {
    name: sj.gradient_by_lag(cell, params, noise, horizon=200, times=[T]) for name, (cell, params) in cells.items()
}
for name, result in by_lag.items():
    print(f"{name:12} horizon {result.horizon:5.0f} steps; at lag 100 {np.exp(result.log_expected[100]):.2g} arrives")
plots.gradients_by_lag(by_lag);

# %% [markdown]
# # 5. The state is (h, c)
#
# An LSTM returns $h$, so an analysis may look at $h$ only. It then misses the cell path. To show the result of this
# error, we build it as a cell. Its state is $h$, and it reads the true $c_{t-1}$ as an input. So its Jacobian is the
# block $\partial h_t / \partial h_{t-1}$ of the true Jacobian. The trajectory and the weights are the same: uniform in
# $\pm 1/\sqrt n$, as is common, with a forget bias of 3.


# %%
@dataclasses.dataclass(frozen=True)  # compares by value, so it compiles once
class HOnly:
    """The LSTM with c as an input: its Jacobian is dh_t/dh_{t-1} with c fixed."""

    def init(self, key):
        return lstm.init(key)

    def initial_state(self, params):
        return lstm.initial_state(params).h

    def step(self, params, h, x_and_c):
        state, output = sj.lstm_step(params, sj.LSTMState(h, x_and_c[1]), x_and_c[0])
        return state.h, output


uniform = sj.LSTM(d, n, forget_bias=3.0, input_init=sj.Uniform(), recurrent_init=sj.Uniform()).init(jax.random.key(0))
long_noise = jax.random.normal(jax.random.key(1), (1, T if FAST else 3000, d))
c = sj.trajectory(lstm, uniform, long_noise).c[:, :-1]
whole = sj.lyapunov_exponents(lstm, uniform, long_noise, k=n + 1)
h_only = sj.lyapunov_exponents(HOnly(), uniform, (long_noise, c), k=n)
print(f"largest exponent of (h, c): {whole.exponents[0, 0]:.4f} nats per step "
      f"({whole.low[0, 0]:.4f} to {whole.high[0, 0]:.4f})")
print(f"of h only, which is wrong: {h_only.exponents[0, 0]:.4f}")
plots.lyapunov_spectra({"(h, c)": whole, "h only, wrong": h_only});

# %% [markdown]
# The true exponent is zero to within about one hundredth: this network forgets very slowly. According to $h$ only, it
# would lose all but $e^{-2} = 0.14$ of a perturbation at every step. The figure shows the two halves of the state. The
# first 32 exponents belong to the cell path and are near zero. Number 33 is far below, where the exponents of $h$
# begin.
#
# # 6. Chrono initialization
#
# One forget bias gives all units the same memory. If the longest span to remember is $T_{\max}$, draw
#
# $$b_f \sim \ln U[1, T_{\max} - 1], \qquad b_i = -b_f$$
#
# (Tallec and Ollivier 2018). The forget gates then start between $1/2$ and $1 - 1/T_{\max}$. Since
# $-1/\ln \sigma(\ln u) \approx u + \frac12$, the time constants are uniform between 1.4 and $T_{\max}$ steps. The input
# gates are small, $i = 1 - f$, so the loop through $h$, which grew in section 3, is weak.

# %%
spread = sj.LSTM(d, n, chrono=100).init(jax.random.key(0))
at_start = {
    name: sj.gate_statistics(lstm, params, jnp.zeros((1, 1, d)))["forget"]
    for name, params in (("b = 1", initial(1.0)), ("b = 5", initial(5.0)), ("chrono, 100 steps", spread))
}
gates = at_start["chrono, 100 steps"].unit_mean
print(f"chrono forget gates from {gates.min():.4f} to {gates.max():.4f}; between 0.5 and {1 - 1 / 100}")
b_i, b_f = np.split(np.asarray(spread.b_h), 4)[:2]

by_lag |= {
    "LSTM, b = 5": sj.gradient_by_lag(lstm, initial(5.0), noise, horizon=200, times=[T]),
    "LSTM, chrono": sj.gradient_by_lag(lstm, spread, noise, horizon=200, times=[T]),
}
fig, (left, right) = plt.subplots(1, 2, figsize=(10.5, 3.6), layout="constrained")
plots.time_constants(at_start, ax=left)
plots.gradients_by_lag({name: by_lag[name] for name in ("LSTM, b = 1", "LSTM, b = 5", "LSTM, chrono")}, ax=right)
for name in ("LSTM, b = 1", "LSTM, b = 5", "LSTM, chrono"):
    print(f"{name}: {np.exp(by_lag[name].log_expected[200]):.3g} of a gradient arrives at lag 200")

# %% [markdown]
# With $b = 1$ no gradient arrives from 200 steps back. With $b = 5$ all of it arrives, and it grows on the way. With
# the chrono initialization a few hundredths arrive, through the units with the longest memory, and other units serve
# short spans.
#
# # The numbers that this notebook must print
#
# | name | value | within |
# |---|---|---|
# | time constant at b = 0, steps | 1.443 | 0.001 |
# | time constant at b = 1, steps | 3.192 | 0.001 |
# | time constant at b = 3, steps | 20.58 | 0.01 |
# | time constant at b = 5, steps | 148.9 | 0.1 |
# | exponent without weights at b = 0 | -0.693147 | 0.00001 |
# | exponent without weights at b = 1 | -0.313262 | 0.00001 |
# | exponent without weights at b = 5 | -0.006715 | 0.00001 |
# | exponent at the zero state, b = 1 | -0.020 | 0.002 |
# | formula minus this exponent | 0 | 0.001 |
# | exponent at the zero state, b = 3 | 0.184 | 0.002 |
# | powers of ten that the gates miss, b = 1, lag 50 | 4.2 | 0.3 |
# | horizon of the vanilla network, steps | 17 | 2 |
# | horizon of the GRU, steps | 12 | 2 |
# | horizon of the LSTM, b = 1, steps | 40 | 3 |
# | largest exponent of (h, c) | 0 | 0.03 |
# | largest exponent of h only, which is wrong | -2.0 | 0.05 |
# | largest chrono forget gate | 0.985 | 0.005 |
# | chrono biases, b_i + b_f | 0 | 0 |

# %%
numbers = {
    "time constant at b = 0, steps": constants[0.0],
    "time constant at b = 1, steps": constants[1.0],
    "time constant at b = 3, steps": constants[3.0],
    "time constant at b = 5, steps": constants[5.0],
    "exponent without weights at b = 0": exponents[0.0],
    "exponent without weights at b = 1": exponents[1.0],
    "exponent without weights at b = 5": exponents[5.0],
    "exponent at the zero state, b = 1": measured[1.0],
    "formula minus this exponent": by_formula[1.0] - measured[1.0],
    "exponent at the zero state, b = 3": measured[3.0],
    "powers of ten that the gates miss, b = 1, lag 50": missed[1.0],
    "horizon of the vanilla network, steps": by_lag["vanilla"].horizon,
    "horizon of the GRU, steps": by_lag["GRU"].horizon,
    "horizon of the LSTM, b = 1, steps": by_lag["LSTM, b = 1"].horizon,
    "largest exponent of (h, c)": whole.exponents[0, 0],
    "largest exponent of h only, which is wrong": h_only.exponents[0, 0],
    "largest chrono forget gate": gates.max(),
    "chrono biases, b_i + b_f": np.abs(b_i + b_f).max(),
}
for name, value in numbers.items():
    print(f"{name:50} {float(value):.7g}")
