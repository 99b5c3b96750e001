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
# # Vanishing and exploding gradients
#
# This notebook shows:
#
# - a gradient that shrinks to 0.8^20 = 0.0115 or grows to 1.2^20 = 38.3, exactly;
# - the lag at which float32 loses it, and its size at lag 100 000 nevertheless;
# - a matrix with the spectral radius 0.9 that makes gradients grow 38.7-fold;
# - how the slope of tanh changes all of this;
# - the number that decides, the largest Lyapunov exponent, across the transition to chaos of a random network;
# - the wall in the loss that gradient clipping is for.
#
# The last cell prints the numbers that this notebook must reproduce.

# %%
import os

import jax
import jax.numpy as jnp
import numpy as np
from matplotlib import pyplot as plt

import seqjax as sj
from seqjax import plots

FAST = os.environ.get("SEQJAX_FAST") == "1"  # fewer networks and shorter runs, for the tests
BLUE, VERMILLION, GREY = "#0072b2", "#d55e00", "#808080"

# %% [markdown]
# # 1. A gradient through time is a product of matrices
#
# With the step Jacobians $J_t = \partial h_t / \partial h_{t-1}$, a gradient at step $t$ becomes at step $s$
#
# $$\frac{\partial L}{\partial h_s} = J_{s+1}^\top J_{s+2}^\top \cdots J_t^\top \frac{\partial L}{\partial h_t}.$$
#
# The product changes the norm of the gradient by a factor between its smallest and its largest singular value. In the
# simplest case every step is the same rotation times $g$: $h_t = W h_{t-1}$ with $W = g\,Q$ and $Q^\top Q = I$. Then
# all singular values of $k$ steps are $g^k$. A loss of one fifth per step leaves $0.8^{20} = 0.0115$ after twenty
# steps. A gain of one fifth per step gives $1.2^{20} = 38.3$.
#
# `sj.gradient_by_lag` computes $\partial s_t / \partial s_{t-k}$ from several steps $t$, for every lag $k$.

# %%
linear = sj.VanillaRNN(1, 2, activation="identity")


def linear_gradients(W):
    """Gradients by lag, 0 to 1000, of the linear network h_t = W h_{t-1}."""
    params = sj.VanillaParams(W_xh=jnp.zeros((2, 1)), W_hh=jnp.asarray(W, jnp.float32), b_h=jnp.zeros(2))
    return sj.gradient_by_lag(linear, params, jnp.zeros((1, 1000, 1)), horizon=1000, times=[1000])


def up_to(result, lag):
    """The gradients by lag from 0 to `lag`."""
    some = slice(lag + 1)
    return result._replace(
        lags=result.lags[some], log_expected=result.log_expected[some], log_worst=result.log_worst[some])


rotation = np.array([[np.cos(0.5), -np.sin(0.5)], [np.sin(0.5), np.cos(0.5)]])
by_lag = {f"{g} Q": linear_gradients(g * rotation) for g in (0.8, 1.0, 1.2)}
lag_20 = {name: np.exp(result.log_expected[20]) for name, result in by_lag.items()}
for name, value in lag_20.items():
    print(f"W = {name}: {value:.6f} after 20 steps")
plots.gradients_by_lag({name: up_to(result, 60) for name, result in by_lag.items()});

# %% [markdown]
# # 2. The range of float32, and how to go beyond it
#
# The smallest normal float32 is $2^{-126} = 1.2 \cdot 10^{-38}$, and the largest is $3.4 \cdot 10^{38}$. If we multiply
# step by step, $0.8^k$ leaves this range at lag 392, and $1.2^k$ at lag 487. A training program then gets a gradient of
# zero, or one that is not finite.

# %%
float32 = np.finfo(np.float32)
with np.errstate(over="ignore", under="ignore"):
    naive = {g: np.cumprod(np.full(1000, g, np.float32)) for g in (0.8, 1.2)}
underflows = int(np.argmax(naive[0.8] < float32.tiny)) + 1
overflows = int(np.argmax(np.isinf(naive[1.2]))) + 1
print(f"in float32, 0.8^k is not normal from lag {underflows} on, and 1.2^k is infinite from lag {overflows} on")

scalar = sj.VanillaRNN(1, 1, activation="identity")


def one(g):
    return sj.VanillaParams(W_xh=jnp.ones((1, 1)), W_hh=jnp.full((1, 1), g), b_h=jnp.zeros(1))


for g in (0.8, 1.2):
    states = sj.state_gradients(scalar, one(g), jnp.ones((1, 600, 1)), lambda states: states.h[:, -1].sum())
    print(f"g = {g}: dL/dh_0 over 600 steps, as training computes it: {states.h[0, 0, 0]}")

# %% [markdown]
# The analyses of seqjax store the scale of a product separately, as a power of two, and return logarithms. Then the lag
# does not matter: $\log_{10} 0.8^{100000} = -9691$ and $\log_{10} 1.2^{100000} = 7918$.

# %%
at_100_000 = {}
for g in (0.8, 1.2):
    product = sj.jacobian_product(scalar, one(g), jnp.zeros((1, 100_000, 1)))  # exp(log_scale) * matrix
    log = float(product.log_scale[0]) + np.log(abs(float(product.matrix[0, 0, 0])))
    at_100_000[g] = log / np.log(10)
    print(f"{g}^100000 = 10^{at_100_000[g]:.2f}; exactly 10^{100_000 * np.log10(g):.2f}")

fig, ax = plt.subplots(figsize=(6.4, 3.6), layout="constrained")
lags = np.arange(1, 1001)
for (g, values), colour in zip(naive.items(), (BLUE, VERMILLION)):
    safe = by_lag[f"{g} Q"]
    ax.plot(safe.lags, safe.log_expected / np.log(10), "--", color=colour, label=f"{g}, separate scale")
    normal = np.isfinite(values) & (values >= float32.tiny)
    ax.plot(lags[normal], np.log10(values[normal]), color=colour, linewidth=4, alpha=0.5, label=f"{g}, float32")
ax.axhspan(np.log10(float32.tiny), np.log10(float32.max), color=GREY, alpha=0.15, label="range of float32")
ax.set(xlabel="lag k (steps)", ylabel="log10 of the gradient norm (ratio)")
ax.set_title("A product in float32 ends where its range ends", loc="left", fontsize="medium")
ax.legend(fontsize="small", framealpha=0.75);

# %% [markdown]
# # 3. The spectral radius is not the norm
#
# Two different numbers are often said to decide whether gradients vanish. The spectral radius
# $\rho(J) = \max |\lambda|$ gives the limit of many equal steps. The largest singular value $\sigma_{\max}(J)$ bounds a
# single step. They are equal for normal matrices, such as $g\,Q$ above. They are not equal for
#
# $$J = \begin{pmatrix} 0.9 & 10 \\ 0 & 0.9 \end{pmatrix}, \qquad
#   J^k = 0.9^k \begin{pmatrix} 1 & 10\,k / 0.9 \\ 0 & 1 \end{pmatrix}.$$
#
# The radius is 0.9, so the powers finally vanish. Before that, the entry $10\,k\,0.9^{k-1}$ grows until
# $k = -1 / \ln 0.9 = 9.5$. A gradient can grow 38.7-fold.

# %%
J = np.array([[0.9, 10.0], [0.0, 0.9]])
found = sj.analysis.matrix_spectrum(J)
non_normal = up_to(linear_gradients(J), 120)
peak = int(np.argmax(non_normal.log_worst))
highest = float(np.exp(non_normal.log_worst[peak]))
print(f"spectral radius {found.spectral_radius:.4f}, norm {found.norm:.4f}; "
      f"the norm of J^k is largest at k = {peak}: {highest:.3f}")
ax = plots.gradient_by_lag(non_normal)
ax.plot(non_normal.lags, non_normal.lags * np.log10(0.9), color=GREY, linewidth=1, label="spectral radius^k")
ax.legend(fontsize="small", framealpha=0.75)
ax.set_title("A radius below one: growth before decay", loc="left", fontsize="medium");

# %% [markdown]
# # 4. The slope of tanh
#
# In a vanilla network the Jacobian is not $W_{hh}$ but
#
# $$J_t = \mathrm{diag}(1 - h_t^2)\, W_{hh},$$
#
# because $\tanh' = 1 - \tanh^2$. The slopes lie between 0 and 1, and they are smallest if units are saturated. Two
# facts follow. First, $\sigma_{\max}(J_t) \le \gamma\,\sigma_{\max}(W_{hh})$ with $\gamma = 1$ for tanh, so
# $\sigma_{\max}(W_{hh}) < 1$ is sufficient for vanishing gradients (Pascanu, Mikolov and Bengio 2013). Second,
# $\sigma_{\max}(W_{hh}) > 1$ implies nothing, and neither does $\rho(W_{hh}) > 1$, because the slopes can compensate
# for the matrix.
#
# We compare three matrices of 64 units, driven by the same noise with standard deviation 2: an orthogonal matrix times
# 0.8, and two Gaussian matrices with the spectral radii 0.9 and 1.2.

# %%
cell = sj.VanillaRNN(1, 64)
drawn = cell.init(jax.random.key(0))
noise = 2 * jax.random.normal(jax.random.key(1), (1, 200, 1))
matrices = {
    "0.8 Q": sj.Orthogonal(0.8), "radius 0.9": sj.SpectralRadius(0.9), "radius 1.2": sj.SpectralRadius(1.2),
}
spectra, verdicts = {}, {}
print(f"{'W_hh':12}{'rho(W)':>9}{'norm(W)':>9}{'bound < 1':>11}{'mean rho(J)':>13}{'max norm(J)':>13}{'horizon':>9}")
for name, draw in matrices.items():
    params = drawn._replace(W_hh=draw(jax.random.key(2), (64, 64)))
    spectra[name] = sj.spectrum(cell, params, noise, times=range(110, 201, 10))
    verdicts[name] = sj.verdict(cell, params, noise, horizon=100)
    W, steps = spectra[name].recurrent["W_hh"], spectra[name].steps
    print(f"{name:12}{W.spectral_radius:9.3f}{W.norm:9.3f}{spectra[name].bound_holds!s:>11}"
          f"{steps.spectral_radius.mean():13.3f}{steps.norm.max():13.3f}{verdicts[name].lag:9.0f}")

# %% [markdown]
# The horizon is the first lag from which a gradient is below one percent of its initial size. The bound holds only for
# the first matrix, where no step multiplies a gradient by more than 0.8. The other two have steps that make some
# gradients grow, and the last has a spectral radius above one. Still, gradients vanish in all three, because the slopes
# move the eigenvalues of $J_t$ towards zero.

# %%
fig, (left, middle, right) = plt.subplots(1, 3, figsize=(13, 3.9), layout="constrained")
W, steps = spectra["radius 1.2"].recurrent["W_hh"], spectra["radius 1.2"].steps
plots.eigenvalues(W, ax=left, title="Eigenvalues of W_hh, radius 1.2")
plots.eigenvalues(steps, ax=middle, title="Eigenvalues of J_t at ten steps")
for ax in (left, middle):
    ax.set_aspect("equal", adjustable="box")
    ax.set(xlim=(-1.6, 1.9), ylim=(-1.5, 1.5))
plots.gradients_by_lag({name: found.by_lag for name, found in verdicts.items()}, ax=right);

# %% [markdown]
# # 5. The number that decides: the largest Lyapunov exponent
#
# The Jacobians of a trajectory are different matrices, so neither the radius nor the norm of one of them determines
# their product. The mean growth rate of the product does,
#
# $$\lambda_1 = \lim_{T \to \infty} \frac{1}{T} \ln \sigma_{\max}(J_T \cdots J_1),$$
#
# with $\lambda_2, \lambda_3, \dots$ for the other directions. These are the Lyapunov exponents, in nats per step. If
# $\lambda_1 < 0$, perturbations and gradients vanish like $e^{\lambda_1 k}$. If $\lambda_1 > 0$, gradients explode, and
# the state, which tanh bounds, is chaotic.
#
# Take $h_t = \tanh(W h_{t-1})$ without inputs, with 256 units and independent $W_{ij} \sim N(0, g^2/n)$. If $g < 1$,
# the state decays to zero, and $\lambda_1 \to \ln g$ for large $n$. If $g > 1$, it does not decay (Sompolinsky,
# Crisanti and Sommers 1988). For large $n$ the input of each unit is Gaussian with a self-consistent variance $q$, and
#
# $$q = g^2\, \mathrm{E}\tanh^2(\sqrt q\, z), \qquad
#   \lambda_1 = \tfrac12 \ln\!\big(g^2\, \mathrm{E} \tanh'(\sqrt q\, z)^2\big), \qquad z \sim N(0, 1).$$

# %%
n, length = 256, 600 if FAST else 2000
gains = (0.5, 1.0, 3.0) if FAST else (0.5, 0.6, 0.7, 0.8, 0.9, 1.0, 1.1, 1.2, 1.35, 1.5, 1.75, 2.0, 2.5, 3.0)
random_net = sj.VanillaRNN(1, n)


def gaussian(g, n, key=jax.random.key(0)):
    key_w, key_h = jax.random.split(key)
    W = g / np.sqrt(n) * jax.random.normal(key_w, (n, n))
    return sj.VanillaParams(jnp.zeros((n, 1)), W, jnp.zeros(n)), sj.VanillaState(jax.random.normal(key_h, (1, n)))


exponents = {}
for g in gains:
    params, state = gaussian(g, n)
    exponents[g] = sj.lyapunov_exponents(random_net, params, jnp.zeros((1, length, 1)), state=state, k=16)


def theory(g):
    """lambda_1 for infinitely many units."""
    z = np.linspace(-8, 8, 401)
    weight = np.exp(-(z**2) / 2) / np.exp(-(z**2) / 2).sum()
    q = g * g
    for _ in range(1000):
        q = g * g * (weight @ np.tanh(np.sqrt(q) * z) ** 2)
    return 0.5 * np.log(g * g * (weight @ (1 - np.tanh(np.sqrt(q) * z) ** 2) ** 2))


for g in (0.5, 1.0, 3.0):
    print(f"g = {g}: lambda_1 = {exponents[g].exponents[0, 0]:.4f}, theory {theory(g):.4f}")

fig, (left, right) = plt.subplots(1, 2, figsize=(10, 3.6), layout="constrained")
fine = np.linspace(0.5, 3.0, 51)
left.axhline(0, color=GREY, linewidth=1)
left.plot(fine, [theory(g) for g in fine], color=GREY, label="theory, infinitely many units")
measured = np.array([exponents[g].exponents[0, 0] for g in gains])
interval = np.abs(np.array([[exponents[g].low[0, 0], exponents[g].high[0, 0]] for g in gains]).T - measured)
left.errorbar(gains, measured, interval, fmt="o", color=BLUE, markersize=4, label=f"measured, {n} units")
left.set(xlabel="gain g", ylabel="largest exponent (nats per step)")
left.set_title("The transition to chaos", loc="left", fontsize="medium")
left.legend(fontsize="small", frameon=False)
plots.lyapunov_spectra({f"g = {g}": exponents[g] for g in (0.5, 1.0, 3.0)}, ax=right);

# %% [markdown]
# A wrong exponent often looks plausible, so here is an exact check for any size. The determinant of a product is the
# product of the determinants, so the trajectory gives the mean of *all* exponents,
#
# $$\frac1n \sum_i \lambda_i = \frac1n \ln |\det W| + \frac1{nT} \sum_t \sum_i \ln \tanh'(a_{t,i}).$$
#
# In float64, for 32 units, both sides agree to all digits.

# %%
with jax.enable_x64(True):
    params, state = gaussian(1.5, 32)
    xs = jnp.zeros((1, 400, 1))
    all_exponents = sj.lyapunov_exponents(
        sj.VanillaRNN(1, 32, dtype="float64"), params, xs, state=state, k=32, burn_in=50, frame_burn_in=50)
    h = sj.trajectory(sj.VanillaRNN(1, 32, dtype="float64"), params, xs, state=state).h[0, 101:]
    by_determinant = np.linalg.slogdet(np.asarray(params.W_hh))[1] / 32 + float(jnp.log(1 - h**2).mean())
mean_exponent = float(all_exponents.exponents.mean())
print(f"mean exponent {mean_exponent:.9f}, from the determinants {by_determinant:.9f}")

# %% [markdown]
# # 6. The wall in the loss, and clipping
#
# Exploding gradients are rarely large everywhere. The smallest example is $h_t = \sigma(w h_{t-1} + b)$ with one unit,
# 50 steps and the loss $(h_{50} - 0.7)^2$ (Pascanu, Mikolov and Bengio 2013, figure 6). At the point where a stable
# fixed point disappears, a small change of $w$ or $b$ decides between two final values of the state. There the loss has
# a wall: it is flat on both sides, and the gradient on the wall is several hundred. A step of gradient descent that
# meets the wall jumps far out of the figure. Clipping keeps the direction and bounds the norm,
#
# $$g \leftarrow g\, \min\!\Big(1, \frac{c}{\|g\|}\Big).$$

# %%
cliff = sj.analysis.loss_cliff()
plain, clipped = cliff.norms
print(f"norm of the first gradient {plain[0]:.3f}, of the largest without clipping {plain.max():.0f}")
print("without clipping the descent ends at w = {:.1f}, b = {:.1f}".format(*cliff.plain[-1]),
      "and with clipping at w = {:.3f}, b = {:.3f}".format(*cliff.clipped[-1]))
plots.loss_cliff(cliff);

# %% [markdown]
# Clipping should act only at the wall. `sj.analysis.clipping_statistics` reports how often and how strongly it acted,
# here and in the history of any training with `sj.fit`.

# %%
acted = sj.analysis.clipping_statistics({"grad_norm": clipped}, cliff.clip_norm)
print(f"clipping shortened {acted.fraction:.0%} of the steps, one of them to {acted.smallest_factor:.3f} of its norm, "
      f"and at most {acted.longest_run} consecutive steps")
plots.clipping(acted);

# %% [markdown]
# # 7. The verdict in words
#
# `sj.verdict` measures exponents and gradients by lag, and prints the result, the evidence, and the usual remedies.
# Here it runs on the driven network of spectral radius 1.2, and on the random network of 64 units with $g = 3$:

# %%
params, state = gaussian(3.0, 64)
chaotic = sj.verdict(cell, params, jnp.zeros((1, 200, 1)), state=state, horizon=100)
print(verdicts["radius 1.2"], chaotic, sep="\n\n")

# %% [markdown]
# # The numbers that this notebook must print
#
# | name | value | within |
# |---|---|---|
# | 0.8^20 | 0.011529 | 0.000001 |
# | 1.2^20 | 38.3376 | 0.0005 |
# | lag at which 0.8^k leaves float32 | 392 | 0 |
# | lag at which 1.2^k leaves float32 | 487 | 0 |
# | log10 of 0.8^100000 | -9691.001 | 0.01 |
# | log10 of 1.2^100000 | 7918.125 | 0.01 |
# | spectral radius of J | 0.9 | 0.000001 |
# | norm of J | 10.08035 | 0.00001 |
# | largest norm of J^k | 38.746 | 0.001 |
# | k of the largest norm | 9 | 0 |
# | bound of 0.8 Q | 0.8 | 0.00001 |
# | spectral radius of the third matrix | 1.2 | 0.0001 |
# | lambda_1 of the third network | -0.2 | 0.08 |
# | lambda_1 at g = 0.5 | -0.693 | 0.05 |
# | lambda_1 at g = 1 | 0 | 0.05 |
# | lambda_1 at g = 3 | 0.310 | 0.03 |
# | theory at g = 3 | 0.3102 | 0.0002 |
# | mean exponent minus that of the determinants | 0 | 0.000000001 |
# | log10 of the largest gradient at the wall | 3 | 1 |
# | steps of the clipped descent outside the figure | 0 | 0 |

# %%
outside = (cliff.clipped < [cliff.w[0], cliff.b[0]]) | (cliff.clipped > [cliff.w[-1], cliff.b[-1]])
numbers = {
    "0.8^20": lag_20["0.8 Q"],
    "1.2^20": lag_20["1.2 Q"],
    "lag at which 0.8^k leaves float32": underflows,
    "lag at which 1.2^k leaves float32": overflows,
    "log10 of 0.8^100000": at_100_000[0.8],
    "log10 of 1.2^100000": at_100_000[1.2],
    "spectral radius of J": found.spectral_radius,
    "norm of J": found.norm,
    "largest norm of J^k": highest,
    "k of the largest norm": peak,
    "bound of 0.8 Q": spectra["0.8 Q"].bound,
    "spectral radius of the third matrix": spectra["radius 1.2"].recurrent["W_hh"].spectral_radius,
    "lambda_1 of the third network": verdicts["radius 1.2"].exponents.exponents[0, 0],
    "lambda_1 at g = 0.5": exponents[0.5].exponents[0, 0],
    "lambda_1 at g = 1": exponents[1.0].exponents[0, 0],
    "lambda_1 at g = 3": exponents[3.0].exponents[0, 0],
    "theory at g = 3": theory(3.0),
    "mean exponent minus that of the determinants": mean_exponent - by_determinant,
    "log10 of the largest gradient at the wall": np.log10(plain.max()),
    "steps of the clipped descent outside the figure": outside.any(axis=1).sum(),
}
for name, value in numbers.items():
    print(f"{name:50} {float(value):.7g}")
