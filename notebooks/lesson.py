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
# # Recurrent networks: state, loss and gradient
#
# This notebook starts with a text whose exact cost in bits is known. A hidden state of one number, written by hand,
# reaches this cost. A vanilla network computes the same state, as a Python loop and as a scan. The gradient through
# time is then split by state, by step and by window, and compared with closed forms. At the end a network learns the
# hidden state from the text only, and we look at what it has learned.
#
# Shapes are the same everywhere: inputs are (batch, time, features) and states $h_t$ are (batch, n). The last cell
# prints the numbers that this notebook must reproduce.

# %%
import dataclasses
import os
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
from matplotlib import pyplot as plt

import seqjax as sj
from seqjax import plots

FAST = os.environ.get("SEQJAX_FAST") == "1"  # shorter training, for the tests

# %% [markdown]
# # 1. What a recurrent network is for
#
# ## 1.1 Sequential data
#
# A sequence $x_{1:T}$ is data whose order matters. Our sequence is a text written by a fair coin: heads writes `0`,
# tails writes `11`. Each toss carries one bit and writes one and a half symbols on average. So no code for this text
# can use fewer than 2/3 bit per symbol, and a reader who knows where the pairs begin needs exactly that much.
#
# Symbol frequencies are not enough to reach this cost. `1` makes up 2/3 of the text, and a source with this frequency
# has an entropy of $-\frac23 \log_2 \frac23 - \frac13 \log_2 \frac13 = 0.918$ bits. Any fixed number of past symbols is
# not enough either. In a run of ones, a pair has just begun or just ended, and which of the two depends on where the
# run began. The run can be arbitrarily long.

# %%
coin = np.random.default_rng(0)


def tossed(tosses):
    return "".join(np.where(coin.random(tosses) < 0.5, "0", "11"))


corpus = sj.data.Corpus.of("coin", tossed(40_000))
tokens = corpus.tokens  # integers (time,)
print(corpus.text[:60], "...")
print(f"tosses per symbol {40_000 / len(tokens):.4f}, entropy of the symbol frequencies "
      f"{sj.data.unigram_entropy(tokens):.4f} bits")

# %% [markdown]
# ## 1.2 Hidden state
#
# A recurrent network reads the sequence one step at a time and updates a state, $h_t = f(h_{t-1}, x_t)$. The state is
# all that the network knows about $x_{1:t}$. For our text one number is enough: 1 if a pair has begun and must be
# completed, and 0 otherwise. Reading a `1` changes 0 to 1 and 1 to 0. After a `0` the state is 0:
#
# $$h_t = x_t\,(1 - h_{t-1}), \qquad h_0 = 0.$$
#
# In seqjax, a cell is any object with three methods: `init`, `initial_state` and `step`. A step is one example at one
# time; `sj.unroll` and `sj.trajectory` run it over (batch, time).
#
# The class below is a frozen dataclass, so two instances with equal fields compare equal and share compiled code. An
# ordinary class compares by identity, and seqjax compiles it again at every call.


# %%
@dataclasses.dataclass(frozen=True)
class InAPair:
    """h_t = x_t (1 - h_{t-1})."""

    def init(self, key):
        return {}

    def initial_state(self, params):
        return jnp.zeros(1)

    def step(self, params, h, x):
        h = x.astype(h.dtype) * (1 - h)
        return h, h


states = sj.trajectory(InAPair(), {}, tokens[None, :40])  # h_0 .. h_40
fig, ax = plt.subplots(figsize=(8, 1.9), layout="constrained")
ax.step(np.arange(41), states[0, :, 0], where="mid", color="#0072b2")
ax.set(xlabel="step t and its symbol", ylabel="state h_t", yticks=[0, 1], xlim=(-0.5, 40.5))
ax.set_xticks(np.arange(1, 41), corpus.text[:40])
ax.set_title("One number records whether a pair is open", loc="left", fontsize="medium");

# %% [markdown]
# The state is the only value that passes from one call to the next, so a stream can be read in chunks of any length.
# One call and two calls return the same final state. The state has the same size after ten steps and after ten million.

# %%
whole, _ = sj.unroll(InAPair(), {}, tokens[None, :1000])
halfway, _ = sj.unroll(InAPair(), {}, tokens[None, :300])
in_two, _ = sj.unroll(InAPair(), {}, tokens[None, 300:1000], state=halfway)
print("one call", whole[0], "two calls", in_two[0], "bytes", whole.nbytes)

# %% [markdown]
# ## 1.3 Output distribution
#
# A head maps the state to a distribution of the next symbol, $p(y_t \mid x_{\le t}) = g(h_t)$. A categorical head is a
# softmax of $o_t = W_{hy} h_t + b_y$. We want equal probabilities if $h = 0$, and probability one for `1` if $h = 1$.
# So the logit of `0` is $-30\,h$ and the logit of `1` is 0. (`sj.Gaussian` is the head for real numbers. It has a mean,
# a standard deviation, and the log-density of a target.)

# %%
exact = sj.Model(InAPair(), sj.Categorical(1, 2))
exact_params = sj.ModelParams({}, sj.ReadoutParams(W_hy=jnp.array([[-30.0], [0.0]]), b_y=jnp.zeros(2)))
for h in (0.0, 1.0):
    logits = exact.head.logits(exact_params.head, jnp.array([h]))
    print(f"h = {h:.0f}: p(0) = {jax.nn.softmax(logits)[0]:.4f}, p(1) = {jax.nn.softmax(logits)[1]:.4f}")

# %% [markdown]
# ## 1.4 Autoregressive generation
#
# By the chain rule of probability, a distribution of the next symbol defines a distribution of whole texts,
#
# $$p(x_{1:T}) = \prod_t p(x_t \mid x_{<t}).$$
#
# It can be used in two ways. Given a text, it is a score: the log-probability, here in bits per symbol. The perplexity,
# two to the power of these bits, is the number of equally likely symbols with the same cost. Given only a first symbol,
# it generates a text: draw $x_t$, read it, and draw the next one.

# %%
text = tokens[None, :30_001]
_, log_p = sj.log_probs(exact, exact_params, text[:, :-1], text[:, 1:])
exact_bits = float(sj.bits_per_character(log_p))
print(f"{exact_bits:.4f} bits per symbol, perplexity {sj.perplexity(log_p):.4f}")

generated = sj.generate(exact, exact_params, jnp.array([[0]]), 2000, jax.random.key(0)).tokens


def odd_blocks(text):
    """The fraction of blocks of ones that have an odd length."""
    blocks = re.findall(r"(?<=0)1+(?=0)", text)
    return sum(len(block) % 2 for block in blocks) / len(blocks)


sample = sj.data.decode(np.asarray(generated), corpus.vocabulary)
print(sample[:60], f"... blocks of odd length: {odd_blocks(sample):.0%}")

# %% [markdown]
# # 2. The vanilla network
#
# ## 2.1 State update, and 2.2 output head
#
# States are usually not written by hand. The vanilla network is a family of state updates with parameters that can be
# learned,
#
# $$h_t = \tanh(W_{xh} x_t + W_{hh} h_{t-1} + b_h), \qquad o_t = W_{hy} h_t + b_y.$$
#
# One unit can represent our state, with $-1$ for "no pair is open" and $+1$ for "a pair is open". Take
# $\tanh(6 x - 3 h - 6)$. After a `0` it is near $-1$, since $6 \cdot 0 - 3 h - 6 \le -3$. After a `1` it is
# $\tanh(-3 h)$, which changes the sign of $h$.

# %%
vanilla = sj.VanillaRNN(input_size=1, hidden_size=1)
by_hand = sj.VanillaParams(W_xh=jnp.array([[6.0]]), W_hh=jnp.array([[-3.0]]), b_h=jnp.array([-6.0]))
model = sj.Model(vanilla, sj.Categorical(1, 2))
params = sj.ModelParams(by_hand, sj.ReadoutParams(W_hy=jnp.array([[-4.0], [4.0]]), b_y=jnp.array([-4.0, 4.0])))


def bits(model, params, tokens, state=None):
    xs = tokens[:, :-1, None].astype(np.float32)  # the symbol is the only feature
    return sj.bits_per_character(sj.log_probs(model, params, xs, tokens[:, 1:], state=state)[1])


print(f"{bits(model, params, text):.4f} bits per symbol")

# %% [markdown]
# ## 2.3 Parameter sharing
#
# $\theta_t = \theta$: every step uses the same parameters, so their number does not depend on $T$. A network with $d$
# inputs and $n$ units has $n d + n^2 + n$ parameters. For $d = 3$ and $n = 4$ this is $12 + 16 + 4 = 32$.

# %%
cell = sj.VanillaRNN(input_size=3, hidden_size=4)
weights = cell.init(jax.random.key(0))
count = sum(leaf.size for leaf in jax.tree.leaves(weights))
print(count, "parameters;", *(sj.unroll(cell, weights, jnp.ones((2, T, 3)))[1].shape for T in (10, 1000)))

# %% [markdown]
# ## 2.4 The unrolled graph
#
# Unrolled over time, the network is a deep network of $T$ equal layers, $h_0 \to h_1 \to \dots \to h_T$. As code this
# is a Python loop. `sj.unroll` runs it as one compiled scan. The two agree in value and in gradient, up to rounding.

# %%
xs = jax.random.normal(jax.random.key(1), (1, 6, 3))


def loop(weights):
    state = cell.initial_state(weights)
    for t in range(6):
        state, output = cell.step(weights, state, xs[0, t])
    return jnp.sum(state.h**2)


def scan(weights):
    final, outputs = sj.unroll(cell, weights, xs)
    return jnp.sum(final.h**2)


by_loop, by_scan = jax.value_and_grad(loop)(weights), jax.value_and_grad(scan)(weights)
difference = max(float(jnp.abs(a - b).max()) for a, b in zip(jax.tree.leaves(by_loop), jax.tree.leaves(by_scan)))
print(f"loop minus scan, value and gradient: at most {difference:.1e}")

# %% [markdown]
# Sequences of different lengths are padded to the same length and come with a mask. If the mask is False, the state
# does not change and the output is zero. The input at that step affects no value and no gradient. Here it is NaN.

# %%
two = jax.random.normal(jax.random.key(2), (2, 6, 3)).at[1, 2:].set(jnp.nan)  # the second one ends after two steps
final, _ = sj.unroll(cell, weights, two, mask=sj.length_mask([6, 2], 6))
shortened, _ = sj.unroll(cell, weights, two[1:, :2])
padding_difference = float(jnp.abs(final.h[1] - shortened.h[0]).max())
print(f"final state with padding minus that of the first two steps: at most {padding_difference:.0e}")

# %% [markdown]
# ## 2.5 Initial state
#
# $h_0 = 0$ is the usual choice, and for the network above it is wrong. 0 lies between "open" and "not open", and in a
# run of ones $\tanh(-3 \cdot 0) = 0$ stays there. The state for "no pair is open" is $-1$. You can pass this state to
# `unroll`. Or you can learn it: `sj.LearnedState` wraps any cell and makes the initial state a parameter with a
# gradient.
#
# We learn it from many short texts, with small steps along the sign of $-dL/dh_0$. We ignore the size of the gradient
# because it is nearly a million: at the undecided state each `1` multiplies a gradient by $-3$, and one long run of
# ones multiplies many times. The notebook on vanishing and exploding gradients explains this growth.

# %%
short = np.stack([sj.data.encode(tossed(20)[:17], corpus.vocabulary) for _ in range(64)])
no_pair = sj.VanillaState(jnp.full((64, 1), -1.0))
learned = sj.Model(sj.LearnedState(vanilla), model.head)
learn_h0 = jax.jit(jax.value_and_grad(lambda h: bits(
    learned, sj.ModelParams(sj.LearnedStateParams(by_hand, sj.VanillaState(h)), params.head), short)))

h_0 = jnp.zeros(1)
gradient_at_zero = float(learn_h0(h_0)[1][0])
for _ in range(30):
    loss, gradient = learn_h0(h_0)
    h_0 = h_0 - 0.02 * jnp.sign(gradient)
at_zero, at_given, at_learned = (float(b) for b in (
    bits(model, params, short), bits(model, params, short, state=no_pair), learn_h0(h_0)[0]))
print(f"h_0 = 0: {at_zero:.4f} bits, dL/dh_0 = {gradient_at_zero:.3g}")
print(f"h_0 = -1, given: {at_given:.4f} bits")
print(f"h_0 = {h_0[0]:.2f}, learned: {at_learned:.4f} bits")

# %% [markdown]
# # 3. Learning through time
#
# ## 3.1 Sequence loss
#
# The loss of a sequence is $L = \sum_t \ell_t$, or the mean over the valid steps. With
# $\ell_t = -\log p(y_t \mid x_{\le t})$ it is the code length of the text in nats, or in bits with the logarithm to the
# base two. `sj.sequence_loss` computes both and ignores padded steps. For the losses 1, 2 and 3 nats, with NaN in the
# padding, the sum is 6 and the mean is 2.

# %%
losses, valid = jnp.array([[1.0, 2.0, jnp.nan], [3.0, jnp.nan, jnp.nan]]), sj.length_mask([2, 1], 3)
print("sum", sj.sequence_loss(losses, valid, reduce="sum"), "nats, mean", sj.sequence_loss(losses, valid), "nats,",
      f"{sj.sequence_loss(losses, valid, unit='bits'):.4f} bits")

# %% [markdown]
# ## 3.2 The temporal chain rule
#
# A state affects the loss directly, and through the next state:
#
# $$\frac{dL}{dh_t} = \frac{\partial \ell_t}{\partial h_t}
#   + \Big(\frac{\partial h_{t+1}}{\partial h_t}\Big)^{\!\top} \frac{dL}{dh_{t+1}}.$$
#
# This recurrence runs backward from the last step. It is called backpropagation through time. `sj.state_gradients`
# returns $dL/dh_t$ for every $t$ from one backward pass. We check it on a linear cell, $h_t = 0.8\,h_{t-1} + x_t + b$,
# with a loss that reads only the last state, $L = h_{20}$. Then $dL/dh_t = 0.8^{20 - t}$, which is 0.0115 for $t = 0$.

# %%
linear = sj.VanillaRNN(1, 1, activation="identity")
decay = sj.VanillaParams(W_xh=jnp.eye(1), W_hh=0.8 * jnp.eye(1), b_h=jnp.zeros(1))
ones = jnp.ones((1, 20, 1))
dL_dh = sj.state_gradients(linear, decay, ones, lambda states: states.h[:, -1].sum()).h[0, :, 0]
expected = 0.8 ** (20 - np.arange(21))
print(f"dL/dh_0 = {dL_dh[0]:.6f}, and the largest difference from 0.8^(20 - t): {np.abs(dL_dh - expected).max():.1e}")

# %% [markdown]
# ## 3.3 The weight gradient, step by step
#
# Every step uses the parameters, so their gradient is a sum over steps,
#
# $$\frac{dL}{d\theta} = \sum_t \Big(\frac{\partial h_t}{\partial \theta}\Big)^{\!\top} \frac{dL}{dh_t}.$$
#
# `sj.weight_gradients_by_step` returns the terms. For the bias of the linear cell, term $t$ is $0.8^{20 - t}$. The
# terms sum to $(1 - 0.8^{20}) / 0.2 = 4.9424$, and `jax.grad` returns the same number.


# %%
def last(outputs):
    return outputs[:, -1].sum()


by_step = sj.weight_gradients_by_step(linear, decay, ones, last).b_h[:, 0]
full = float(jax.grad(lambda w: last(sj.unroll(linear, w, ones)[1]))(decay).b_h[0])
print(f"the terms sum to {by_step.sum():.4f}; jax.grad gives {full:.4f}")

# %% [markdown]
# ## 3.4 Truncated backpropagation
#
# A window of $k$ steps, $t-k+1 \dots t$, uses the last $k$ terms of this sum and drops the older ones. It takes less
# time and memory, and its error is the sum of the dropped terms. Here $\sum_{j<k} 0.8^j = (1 - 0.8^k)/0.2$: a window of
# one step gives 1.0000, five steps give 3.3616, and twenty steps, the whole sequence, give 4.9424.

# %%
sizes = np.arange(1, 21)
truncated = np.array([float(sj.truncated_grad(linear, decay, ones, last, int(k)).b_h[0]) for k in sizes])
print(*(f"k = {k}: {truncated[k - 1]:.4f}" for k in (1, 5, 20)), sep=", ")

fig, (left, right) = plt.subplots(1, 2, figsize=(9, 3.1), layout="constrained")
left.bar(np.arange(1, 21), by_step, color="#0072b2")
left.set(xlabel="step t", ylabel="term t of dL/db", xticks=[1, 5, 10, 15, 20])
left.set_title("The gradient is a sum over steps", loc="left", fontsize="medium")
right.plot(sizes, truncated, "o-", color="#d55e00", markersize=4, label="truncated")
right.axhline(full, color="#808080", linestyle="--", label="full gradient")
right.set(xlabel="window k (steps)", ylabel="dL/db", ylim=(0, None), xticks=[1, 5, 10, 15, 20])
right.set_title("A window uses the last k terms", loc="left", fontsize="medium")
right.legend(frameon=False);

# %% [markdown]
# ## 3.5 State detachment
#
# An endless text has no last step from which to go backward. So it is read in windows. The state continues from one
# window to the next, and the gradient stops there, $h \leftarrow \mathrm{stopgrad}(h)$. `sj.detach` does this, and
# `sj.fit` applies it when a batch continues the batch before. The first state of a window is then a constant for the
# gradient. If the linear cell is cut in the middle, the gradient of the second half has only its own ten terms,
# $(1 - 0.8^{10})/0.2 = 4.4631$, although its value is that of all twenty steps.


# %%
def in_two_windows(w):
    middle, _ = sj.unroll(linear, w, ones[:, :10])
    return last(sj.unroll(linear, w, ones[:, 10:], state=sj.detach(middle))[1])


value, cut_gradient = jax.value_and_grad(in_two_windows)(decay)
print(f"h_20 = {value:.4f} in two windows, {last(sj.unroll(linear, decay, ones)[1]):.4f} in one; "
      f"dL/db = {cut_gradient.b_h[0]:.4f}, not {full:.4f}")

# %% [markdown]
# # All of it together
#
# A vanilla network with eight units reads the text of the coin. It reads at 32 places in parallel, in windows of 32
# steps, and the state is carried over and detached. The network is not told about pairs. Its cost falls from 0.918
# bits, which needs only the frequencies, to 2/3 bit, which only a reader of the pairs can reach. Each isolated peak of
# the curve is the start of a new pass over the text. There all 32 states start at zero in the middle of the text, and
# no reader can know whether a pair is open.

# %%
steps = 200 if FAST else 500
train, validation, test = sj.data.split(tokens)
network = sj.Model(sj.stack([sj.Embedding(2, 2), sj.VanillaRNN(2, 8)]), sj.Categorical(8, 2))
fitted = sj.fit(network, sj.data.windows(train, batch=32, window=32), steps=steps,
                optimizer=optax.adam(optax.cosine_decay_schedule(2e-2, steps)), key=jax.random.key(0))
trained_bits = sj.evaluate(network, fitted.params, sj.data.windows(test, 1, 100, passes=1)) / np.log(2)
print(f"{trained_bits:.4f} bits per symbol on unseen text")

fig, ax = plt.subplots(figsize=(6, 3.2), layout="constrained")
curve = fitted.history["step"], fitted.history["loss"] / np.log(2)
plots.learning_curves({"training": curve}, ax=ax, unit="bits per symbol")
ax.axhline(0.9183, color="#808080", linestyle=":")
ax.axhline(2 / 3, color="#808080", linestyle="--")
ax.text(steps, 0.925, "frequencies only, 0.918", ha="right", va="bottom", fontsize="small")
ax.text(steps, 0.635, "the coin itself, 0.667", ha="right", va="top", fontsize="small")
ax.set_ylim(0.5, 1.2);

# %% [markdown]
# What has the network learned? It reads a new text beside the handwritten state of section 1.2. We plot its eight units
# in the plane in which they vary most. The network never saw the two values of the handwritten state, but they are
# separate in the plane: one straight line divides them.

# %%
states = sj.trajectory(network.cell, fitted.params.cell, test[None, :1500])
learned_h = states[1].h[:, 50:]  # second layer; in the first steps it cannot know where pairs begin
truth = np.asarray(sj.trajectory(InAPair(), {}, test[None, :1500]))[0, 50:, 0]
mean, plane, share = plots.principal_plane(learned_h)
points = (np.asarray(learned_h[0]) - mean) @ plane.T

fig, ax = plt.subplots(figsize=(5, 3.8), layout="constrained")
for value, name, colour, marker in ((0, "no pair is open", "#0072b2", "o"), (1, "a pair is open", "#d55e00", "^")):
    ax.scatter(*points[truth == value].T, s=16, color=colour, marker=marker, alpha=0.5, label=name)
ax.set(xlabel=f"component 1 ({share[0]:.0%} of the variance)", ylabel=f"component 2 ({share[1]:.0%})")
ax.set_title("The learned state", loc="left", fontsize="medium")
ax.legend(frameon=False)

probability = jax.vmap(lambda h: jax.nn.softmax(network.head.logits(fitted.params.head, h)))(learned_h[0])[:, 1]
print(f"mean p(1) if a pair is open: {probability[truth == 1].mean():.3f}; "
      f"if not: {probability[truth == 0].mean():.3f}")

# %% [markdown]
# The network also generates text like the coin: blocks of ones have even lengths. Its state takes the same 32 bytes for
# each text, after any number of symbols.

# %%
generated = sj.generate(network, fitted.params, jnp.array([[0]]), 4000, jax.random.key(2)).tokens
learned_sample = sj.data.decode(np.asarray(generated), corpus.vocabulary)
print(learned_sample[:60], f"... blocks of odd length: {odd_blocks(learned_sample):.1%}")

# %% [markdown]
# # The numbers that this notebook must print
#
# | name | value | within |
# |---|---|---|
# | entropy of the frequencies, bits | 0.9183 | 0.003 |
# | exact model, bits per symbol | 0.6667 | 0.005 |
# | odd blocks sampled from the exact model | 0 | 0 |
# | parameters of the vanilla network | 32 | 0 |
# | loop minus scan | 0 | 0.00001 |
# | padded state minus shortened state | 0 | 0.000001 |
# | learned minus given initial state, bits | 0 | 0.005 |
# | dL/dh_0 of the linear cell | 0.011529 | 0.000001 |
# | sum of the terms by step | 4.942354 | 0.00001 |
# | window of 1 step | 1 | 0.00001 |
# | window of 5 steps | 3.3616 | 0.00001 |
# | window of 20 steps | 4.942354 | 0.00001 |
# | second of two windows | 4.463129 | 0.00001 |
# | trained network, bits per symbol | 0.667 | 0.012 |
# | odd blocks sampled from the trained network | 0 | 0.06 |

# %%
numbers = {
    "entropy of the frequencies, bits": sj.data.unigram_entropy(tokens),
    "exact model, bits per symbol": exact_bits,
    "odd blocks sampled from the exact model": odd_blocks(sample),
    "parameters of the vanilla network": count,
    "loop minus scan": difference,
    "padded state minus shortened state": padding_difference,
    "learned minus given initial state, bits": at_learned - at_given,
    "dL/dh_0 of the linear cell": dL_dh[0],
    "sum of the terms by step": by_step.sum(),
    "window of 1 step": truncated[0],
    "window of 5 steps": truncated[4],
    "window of 20 steps": truncated[19],
    "second of two windows": cut_gradient.b_h[0],
    "trained network, bits per symbol": trained_bits,
    "odd blocks sampled from the trained network": odd_blocks(learned_sample),
}
for name, value in numbers.items():
    print(f"{name:45} {float(value):.6g}")
