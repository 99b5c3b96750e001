"""Runs torch in a separate process without jax, because two runtimes in one process would compete for threads.

The parent sends a request over a pipe and waits for the reply, so the two processes never compute at the same time.
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
    """A torch layer with the common weights, and its two calls."""

    def __init__(self, kind: str, row: Row, device: str = "cpu", tf32: bool = False) -> None:
        import torch

        torch.set_num_threads(len(os.sched_getaffinity(0)))
        torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = tf32
        layers = {"vanilla": torch.nn.RNN, "relu": torch.nn.RNN, "lstm": torch.nn.LSTM, "gru": torch.nn.GRU}
        options = {"nonlinearity": "relu"} if kind == "relu" else {}
        self.torch, self.device = torch, device
        self.module = layers[kind](row.features, row.hidden, batch_first=True, **options).to(device)
        self.module.load_state_dict({name: torch.from_numpy(w) for name, w in named(weights(kind, row)).items()})
        self.xs, self.of_outputs = (torch.from_numpy(array).to(device) for array in inputs(row))

    def forward(self):
        with self.torch.inference_mode():
            return self.module(self.xs)[0]

    def backward(self):
        self.module.zero_grad(set_to_none=True)
        loss = (self.module(self.xs)[0] * self.of_outputs).sum()
        loss.backward()
        return loss

    def results(self) -> tuple[np.ndarray, np.ndarray]:
        """Returns the outputs, and the gradient of W_hh."""
        outputs = self.forward().cpu().numpy()
        self.backward()
        return outputs, self.module.weight_hh_l0.grad.cpu().numpy()

    def seconds(self, direction: str, calls: int) -> list[float]:
        """The seconds of each of `calls` calls."""
        call, wait = getattr(self, direction), self.torch.cuda.synchronize if self.device == "cuda" else lambda: None
        seconds = []
        for _ in range(calls):
            began = time.perf_counter()
            call()
            wait()
            seconds.append(time.perf_counter() - began)
        return seconds


def named(w: Weights) -> dict[str, np.ndarray]:
    """The weights by torch's names. The second bias is zero, except for b_hn of a GRU."""
    second = np.zeros_like(w.b_h)
    if w.b_hn is not None:
        second[-w.b_hn.size :] = w.b_hn
    return {"weight_ih_l0": w.W_xh, "weight_hh_l0": w.W_hh, "bias_ih_l0": w.b_h, "bias_hh_l0": second}


class TorchProcess:
    """The parent's side: sends requests to the torch process."""

    def __init__(self, device: str = "cpu", tf32: bool = False) -> None:
        self.device, self.tf32 = device, tf32
        command = [sys.executable, "-m", "benchmarks.peers.torch_process"]
        root = Path(__file__).parents[2]
        self.child = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=root)

    def ask(self, *request):
        pickle.dump(request, self.child.stdin)
        self.child.stdin.flush()
        return pickle.load(self.child.stdout)

    def ready(self) -> bool:
        """Whether torch sees the device."""
        return self.ask("ready", self.device)

    def build(self, kind: str, row: Row) -> tuple[np.ndarray, np.ndarray]:
        """Builds the layer for the next timings. Returns its outputs, and the gradient of W_hh."""
        return self.ask("build", kind, row, self.device, self.tf32)

    def seconds(self, direction: str, calls: int) -> list[float]:
        return self.ask("seconds", direction, calls)

    def close(self) -> None:
        self.child.communicate()  # the process ends at the end of its input


class Server:
    """The child's side: one method per request."""

    def __init__(self) -> None:
        self.layer: TorchLayer | None = None

    def ready(self, device: str) -> bool:
        import torch

        return device == "cpu" or torch.cuda.is_available()

    def build(self, *given) -> tuple[np.ndarray, np.ndarray]:
        self.layer = TorchLayer(*given)
        return self.layer.results()

    def seconds(self, direction: str, calls: int) -> list[float]:
        return self.layer.seconds(direction, calls)


def serve() -> None:
    replies, sys.stdout = sys.stdout.buffer, sys.stderr  # printed text must not reach the pipe
    server = Server()
    while True:
        try:
            request, *given = pickle.load(sys.stdin.buffer)
        except EOFError:
            return
        pickle.dump(getattr(server, request)(*given), replies)
        replies.flush()


if __name__ == "__main__":
    serve()
