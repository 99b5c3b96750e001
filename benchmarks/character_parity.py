"""Learning parity with torch: the character model of `seqjax train` and the same model in torch.

Both use the same data, model and schedule: embedding 64, LSTM 256, batch 32, window 128 with the state carried over and
detached, Adam at 2e-3, gradients clipped to norm 1, and ten passes over the first 90 % of the Python manual's topics.
After each pass, bits per character are measured on the next 5 %. Each library uses its own default initialization and
runs in its own process.

    python -m benchmarks.character_parity            ten passes; about six minutes on two cores
    python -m benchmarks.character_parity --passes 1

Needs torch (`pip install --group parity`). Writes character_parity.json and character_parity.md beside this file.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import multiprocessing
import sys
import time
from pathlib import Path

import numpy as np

from benchmarks.machine import machine

EMBEDDING, HIDDEN, BATCH, WINDOW, LEARNING_RATE, CLIP = 64, 256, 32, 128, 2e-3, 1.0


def seqjax_curve(passes: int, seed: int) -> dict:
    import jax

    from seqjax import data
    from seqjax.command import character_model

    corpus = data.manual_topics()
    training, validation, _ = data.split(corpus.tokens)
    per_pass = (len(training) - 1) // BATCH // WINDOW
    settings = character_model.Settings(
        embedding=EMBEDDING, hidden=HIDDEN, batch=BATCH, window=WINDOW, learning_rate=LEARNING_RATE, clip_norm=CLIP,
        steps=passes * per_pass, seed=seed,
    )  # fmt: skip
    model = character_model.build(settings, corpus.vocabulary)
    state, curve, began = character_model.first_state(settings, model), [], time.monotonic()
    for state, _ in character_model.train(settings, model, training, state):  # noqa: B020
        if int(state.step) % per_pass == 0:
            nats = character_model.mean_loss(settings, model, state.params, validation)
            curve.append(nats / math.log(2))
    size = sum(leaf.size for leaf in jax.tree.leaves(state.params))
    return {"curve": curve, "seconds": time.monotonic() - began, "parameters": size, "corpus": corpus.name,
            "sha256": corpus.sha256, "unigram": data.unigram_entropy(corpus.tokens)}  # fmt: skip


def torch_curve(passes: int, seed: int) -> dict:
    import torch

    from seqjax import data

    corpus = data.manual_topics()
    training, validation, _ = data.split(corpus.tokens)
    torch.manual_seed(seed)
    size = len(corpus.vocabulary)

    class CharacterModel(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.embedding = torch.nn.Embedding(size, EMBEDDING)
            self.lstm = torch.nn.LSTM(EMBEDDING, HIDDEN, batch_first=True)
            self.head = torch.nn.Linear(HIDDEN, size)

        def forward(self, xs, state):
            outputs, state = self.lstm(self.embedding(xs), state)
            return self.head(outputs), state

    model = CharacterModel()
    optimizer = torch.optim.Adam(model.parameters(), lr=LEARNING_RATE)

    def run(batch, state):
        xs, ys = (torch.tensor(np.asarray(part), dtype=torch.long) for part in (batch.xs, batch.targets))
        logits, state = model(xs, state if batch.continues else None)
        return torch.nn.functional.cross_entropy(logits.reshape(-1, size), ys.reshape(-1)), state

    def validate():
        with torch.no_grad():
            state, losses = None, []
            for batch in data.windows(validation, BATCH, WINDOW, passes=1):
                loss, state = run(batch, state)
                losses.append(loss.item())
        return float(np.mean(losses)) / math.log(2)

    curve, began = [], time.monotonic()
    for _ in range(passes):
        state = None
        for batch in data.windows(training, BATCH, WINDOW, passes=1):
            loss, state = run(batch, state)
            state = tuple(part.detach() for part in state)
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
            optimizer.step()
        curve.append(validate())
    parameters = sum(p.numel() for p in model.parameters())
    return {"curve": curve, "seconds": time.monotonic() - began, "parameters": parameters}


def table(passes: int, seeds: list[int], runs: dict[str, list[dict]]) -> str:
    best = {name: [min(run["curve"]) for run in of] for name, of in runs.items()}
    last = {name: [run["curve"][-1] for run in of] for name, of in runs.items()}
    ratio = np.mean(last["seqjax"]) / np.mean(last["torch"])
    lines = [
        "# Learning parity with torch",
        "",
        f"{runs['seqjax'][0]['corpus']}, sha256 {runs['seqjax'][0]['sha256'][:12]}; unigram entropy "
        f"{runs['seqjax'][0]['unigram']:.3f} bits. {machine('jax', 'torch')}.",
        "",
        "Validation bits per character after each pass" + (f", mean of seeds {seeds}" if len(seeds) > 1 else "") + ":",
        "",
        "| pass | seqjax | torch |",
        "|---|---|---|",
    ]
    for n in range(passes):
        row = [np.mean([run["curve"][n] for run in runs[name]]) for name in ("seqjax", "torch")]
        lines.append(f"| {n + 1} | {row[0]:.4f} | {row[1]:.4f} |")
    lines += ["", f"After the last pass seqjax / torch = **{ratio:.4f}** (the bar is 1.01).", ""]
    for name, of in runs.items():
        each = ", ".join(f"{value:.4f}" for value in last[name])
        seconds = ", ".join(f"{run['seconds']:.0f}" for run in of)
        lines.append(f"- {name}: last {each}; best {min(best[name]):.4f}; {seconds} s of training and validation")
    difference = runs["torch"][0]["parameters"] - runs["seqjax"][0]["parameters"]
    lines.append(f"- torch has {difference} parameters more: its second bias of each gate")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--passes", type=int, default=10)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    arguments = parser.parse_args()
    runs: dict[str, list[dict]] = {"seqjax": [], "torch": []}
    with multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=1) as pool:
        for seed, (name, curve) in itertools.product(
            arguments.seeds, (("seqjax", seqjax_curve), ("torch", torch_curve))
        ):
            runs[name].append(pool.apply(curve, (arguments.passes, seed)))
            print(f"{name}, seed {seed}: {' '.join(f'{b:.3f}' for b in runs[name][-1]['curve'])}", flush=True)
    text = table(arguments.passes, arguments.seeds, runs)
    print("\n" + text)
    here = Path(__file__).with_suffix("")
    here.with_suffix(".json").write_text(
        json.dumps({"machine": machine("jax", "torch"), "passes": arguments.passes, "runs": runs}, indent=1)
    )
    here.with_suffix(".md").write_text(text)


if __name__ == "__main__":
    sys.exit(main())
