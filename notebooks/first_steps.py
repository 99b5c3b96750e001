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
# # First steps
#
# What you will see: one recurrent network as an equation, as a loop and as a scan; where its gradient comes from, state
# by state and step by step; what truncation leaves out; and a network that learns to remember. Each number that is
# printed is predicted in the line above it.

# %%
import jax
import jax.numpy as jnp
import optax

import seqjax as sj

# %% [markdown]
# ## A step, and the same step again
#
# $h_t = \tanh(W_{xh} x_t + W_{hh} h_{t-1} + b_h)$, with the same parameters at every $t$. A step is one example at one
# time. `unroll` takes (batch, time, feature) and gives back the final state and every output.

# %%
cell = sj.VanillaRNN(input_size=3, hidden_size=4)
params = cell.init(jax.random.key(0))
xs = jax.random.normal(jax.random.key(1), (2, 6, 3))

state = cell.initial_state(params)
for t in range(6):
    state, output = cell.step(params, state, xs[0, t])

final, outputs = sj.unroll(cell, params, xs)
# The loop and the scan differ by rounding alone: below 0.000001.
print(f"{jnp.abs(final.h[0] - state.h).max():.6f}")

# %% [markdown]
# ## Sequences of different lengths
#
# The second sequence ends after two steps. Where the mask is False the state is held and the output is zero, and what
# stands there is never read, not even by the gradient.

# %%
mask = sj.length_mask([6, 2], 6)
spoilt = xs.at[1, 2:].set(jnp.nan)
final, outputs = sj.unroll(cell, params, spoilt, mask=mask)
cut, _ = sj.unroll(cell, params, xs[1:, :2])
# The final state is that of the sequence cut after two steps: 0.0
print(float(jnp.abs(final.h[1] - cut.h[0]).max()))

# %% [markdown]
# ## Where the gradient comes from
#
# Backpropagation through time is `jax.grad` of a loss of `unroll`. On a linear cell with $W_{hh} = 0.8$ it can be
# checked by hand: $\partial h_T / \partial h_t = 0.8^{T-t}$.

# %%
linear = sj.VanillaRNN(1, 1, activation="identity")
weights = sj.VanillaParams(W_xh=jnp.eye(1), W_hh=0.8 * jnp.eye(1), b_h=jnp.zeros(1))
ones = jnp.ones((1, 20, 1))
gradients = sj.state_gradients(linear, weights, ones, lambda states: states.h[:, -1].sum())
# 0.8^20 = 0.0115
print(f"{gradients.h[0, 0, 0]:.4f}")

# %% [markdown]
# The gradient of the shared weights is a sum over steps, and a truncated gradient keeps the last $k$ of them. With
# $\partial h_T / \partial b = \sum_{j<k} 0.8^j = (1 - 0.8^k) / 0.2$:


# %%
def last(outputs):
    return outputs[:, -1].sum()


by_step = sj.weight_gradients_by_step(linear, weights, ones, last).b_h[:, 0]
full = jax.grad(lambda w: last(sj.unroll(linear, w, ones)[1]))(weights).b_h[0]
# The steps sum to the full gradient, (1 - 0.8^20) / 0.2 = 4.9424, twice.
print(f"{by_step.sum():.4f} {full:.4f}")
# Of windows of 1, 5 and 20 steps: 1.0000 3.3616 4.9424
print(*(f"{sj.truncated_grad(linear, weights, ones, last, k).b_h[0]:.4f}" for k in (1, 5, 20)))

# %% [markdown]
# ## A network that learns to remember
#
# The adding problem: two of twenty numbers are marked, and their sum is asked for at the end. Always answering 1 has a
# mean squared error of 1/6.

# %%
model = sj.Model(sj.LSTM(2, 32), sj.Gaussian(32, 1, std=1.0))
stream = sj.data.adding_problem(jax.random.key(0), batch=64, time=20)
fitted = sj.fit(model, stream, steps=500, optimizer=optax.adam(1e-2), loss=sj.ManyToOne(), key=jax.random.key(1))
test = next(sj.data.adding_problem(jax.random.key(2), batch=1000, time=20))
final, _ = sj.unroll(model.cell, fitted.params.cell, test.xs)
answers = jax.vmap(lambda h: model.head.moments(fitted.params.head, h).mean)(final.h)
error = jnp.mean((answers - test.targets) ** 2)
# Below 0.01, beside 0.1667 for doing nothing.
print(f"{error:.4f} {sj.data.ADDING_BASELINE:.4f}")

# %% [markdown]
# Numbers that this notebook must print: 0.000000, 0.0, 0.0115, 4.9424 twice, 1.0000 3.3616 4.9424, and an error below
# 0.01.
