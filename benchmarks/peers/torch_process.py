"""torch in a process of its own, which never imports jax: two runtimes in one process would share their threads.

The parent asks over a pipe, and waits for the answer; so the two never run at the same time.
"""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

from benchmarks.peers.rows import Row, Weights, inputs, weights

KINDS = ("vanilla", "lstm", "gru", "relu")


class TorchLayer:
    """A torch layer with given weights, and its two calls."""

    def __init__(self, kind: str, row: Row) -> None:
        import torch

        torch.set_num_threads(len(os.sched_getaffinity(0)))
        layers = {"vanilla": torch.nn.RNN, "relu": torch.nn.RNN, "lstm": torch.nn.LSTM, "gru": torch.nn.GRU}
        options = {"nonlinearity": "relu"} if kind == "relu" else {}
        self.torch = torch
        self.module = layers[kind](row.features, row.hidden, batch_first=True, **options)
        self.module.load_state_dict({name: torch.from_numpy(w) for name, w in named(weights(kind, row)).items()})
        self.xs, self.of_outputs = map(torch.from_numpy, inputs(row))

    def forward(self):
        with self.torch.inference_mode():
            return self.module(self.xs)[0]

    def backward(self):
        self.module.zero_grad(set_to_none=True)
        loss = (self.module(self.xs)[0] * self.of_outputs).sum()
        loss.backward()
        return loss

    def results(self) -> tuple[np.ndarray, np.ndarray]:
        """The outputs, and the gradient of W_hh."""
        outputs = self.forward().numpy()
        self.backward()
        return outputs, self.module.weight_hh_l0.grad.numpy()


def named(w: Weights) -> dict[str, np.ndarray]:
    """torch's second bias is zero, but for b_hn of a GRU."""
    second = np.zeros_like(w.b_h)
    if w.b_hn is not None:
        second[-w.b_hn.size :] = w.b_hn
    return {"weight_ih_l0": w.W_xh, "weight_hh_l0": w.W_hh, "bias_ih_l0": w.b_h, "bias_hh_l0": second}


class TorchProcess:
    """The parent's end."""

    def __init__(self) -> None:
        command = [sys.executable, "-m", "benchmarks.peers.torch_process"]
        root = Path(__file__).parents[2]
        self.child = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=root)

    def ask(self, *request):
        pickle.dump(request, self.child.stdin)
        self.child.stdin.flush()
        return pickle.load(self.child.stdout)

    def build(self, kind: str, row: Row) -> tuple[np.ndarray, np.ndarray]:
        return self.ask("build", kind, row)

    def seconds(self, direction: str, calls: int) -> list[float]:
        return self.ask("time", direction, calls)

    def close(self) -> None:
        self.child.communicate()  # the end of its input is its end


def serve() -> None:
    replies, sys.stdout = sys.stdout.buffer, sys.stderr  # nothing that prints may reach the pipe
    layer = None
    while True:
        try:
            request, *given = pickle.load(sys.stdin.buffer)
        except EOFError:
            return
        if request == "build":
            layer = TorchLayer(*given)
            reply = layer.results()
        else:
            reply = timed(getattr(layer, given[0]), given[1])
        pickle.dump(reply, replies)
        replies.flush()


def timed(call, calls: int) -> list[float]:
    seconds = []
    for _ in range(calls):
        began = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - began)
    return seconds


if __name__ == "__main__":
    serve()
