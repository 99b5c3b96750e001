"""How training with a batch on many devices would scale, from measured updates and the data sheets of networks.

    python -m benchmarks.scaling        a second; reads update.json and gpu.json, writes ../docs/scaling.md

An update on p devices takes t(p) = (time of the rows of one device) + (time to add the gradients). With g bytes of
gradients, a link of b bytes per second and a latency of l seconds:

    ring:  2 (p - 1) (l + g / (p b))              every device sends to its neighbour
    tree:  2 log2(p) l + 2 (p - 1) g / (p b)      halving and doubling distances

Nothing here was measured on several devices. The gradients are added after the backward pass and not during it, because
a recurrent network has all its gradients at the first step of the sequence.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import NamedTuple

from benchmarks.update import JOBS, VOCABULARY

DEVICES = (1, 2, 8, 64, 512)
HERE = Path(__file__).parent


class Link(NamedTuple):
    """A network between devices, from its data sheet; the latency includes that of the library."""

    name: str
    bandwidth: float  # bytes per second and direction
    latency: float  # seconds
    most: int = 512  # devices


LINKS = {
    "CPU": [Link("Ethernet 25 Gb/s", 25e9 / 8, 50e-6), Link("InfiniBand 400 Gb/s", 400e9 / 8, 10e-6)],
    "GPU": [Link("InfiniBand 400 Gb/s per GPU", 400e9 / 8, 10e-6), Link("NVLink 4 in one server", 450e9, 5e-6, most=8)],
}


class Job(NamedTuple):
    """A measured update.

    Attributes:
        name: what it is.
        kind: "CPU", whose time is proportional to the rows, or "GPU", whose time does not fall with fewer rows because
            the launches of the steps take it.
        rows: the batch of the measured update.
        seconds: its time.
        parameters: the number of parameters, with a gradient in float32 each.
    """

    name: str
    kind: str
    rows: int
    seconds: float
    parameters: int

    def compute(self, rows: float) -> float:
        """The seconds of the rows of one device; more than were measured run one batch after another."""
        share = rows / self.rows
        return self.seconds * (share if self.kind == "CPU" else max(share, 1.0))


def jobs() -> list[Job]:
    updates = json.loads((HERE / "update.json").read_text())
    gpu = json.loads((HERE / "gpu.json").read_text())["found"]

    def of_update(name: str, title: str) -> Job:
        job = JOBS[name]
        cells = sum(4 * row.hidden * (row.features + row.hidden + 1) for row in job.rows())
        parameters = VOCABULARY * job.embedding + cells + VOCABULARY * (job.hidden + 1)
        return Job(title, "CPU", job.batch, updates[name]["ways"]["seqjax"]["min"], parameters)

    return [
        of_update("lstm", "LSTM of 256 units, window 128, on two cores"),
        of_update("deep", "2 LSTMs of 512 units, window 128, on two cores"),
        Job(
            "LSTM of 768 units, 1024 steps, float32, on an H100",
            "GPU",
            16,
            gpu["16,1024,768,768"]["seqjax"]["backward"]["min"],
            4 * 768 * (768 + 768 + 1),
        ),
    ]  # fmt: skip


def ring(p: int, size: float, link: Link) -> float:
    return 2 * (p - 1) * (link.latency + size / (p * link.bandwidth))


def tree(p: int, size: float, link: Link) -> float:
    return 2 * math.log2(p) * link.latency + 2 * (p - 1) * size / (p * link.bandwidth)


def weak(job: Job, link: Link) -> list[str]:
    """Every device has the measured batch: the share of the time that is not communication."""
    lines = []
    for p in (p for p in DEVICES if p <= link.most):
        sums = [add(p, 4 * job.parameters, link) for add in (ring, tree)]
        shares = " | ".join(f"{1e3 * s:.2f} | {job.seconds / (job.seconds + s):.0%}" for s in sums)
        lines.append(f"| {p} | {p * job.rows} | {shares} |")
    return lines


def strong(job: Job, link: Link) -> list[str]:
    """The batch of eight devices, divided among p: the speed relative to one device, and its share of p."""
    total, lines = 8 * job.rows, []
    for p in (p for p in DEVICES if p <= link.most):
        if p > total:
            lines.append(f"| {p} | less than one row | | |")
            continue
        seconds = job.compute(total / p) + min(add(p, 4 * job.parameters, link) for add in (ring, tree))
        gain = job.compute(total) / seconds
        lines.append(f"| {p} | {total // p} | {1e3 * seconds:.2f} | {gain:.1f} ({gain / p:.0%}) |")
    return lines


def document() -> str:
    lines = ["# Training on many devices: a model", "", *(__doc__ or "").split("\n\n", 2)[2].strip().splitlines(), ""]
    for job in jobs():
        lines += [f"## {job.name}", "", f"One update of {job.rows} rows takes {1e3 * job.seconds:.1f} ms, and its "
                  f"gradients are {4e-6 * job.parameters:.1f} MB.", ""]  # fmt: skip
        for link in LINKS[job.kind]:
            lines += [f"### {link.name}", "", f"Weak scaling, {job.rows} rows on each device:", ""]
            lines += ["| devices | rows | ring, ms | efficiency | tree, ms | efficiency |", "|---" * 6 + "|"]
            lines += [*weak(job, link), "", f"Strong scaling, {8 * job.rows} rows in total:", ""]
            lines += ["| devices | rows on each | ms per update | faster (efficiency) |", "|---" * 4 + "|"]
            lines += [*strong(job, link), ""]
    return "\n".join([*lines, CONCLUSION.strip()]) + "\n"


CONCLUSION = """
## Where it stops paying

- More rows pay for a long time: with a tree, communication stays below a tenth of an update up to 512 devices for all
  jobs and links here. A ring has the latency of 2 (p - 1) messages, so beyond 8 devices a tree is faster. Whether more
  rows per update help the loss is another question.
- A fixed number of rows pays until a device has few of them. On a CPU the time falls with the rows until a product of
  few rows no longer fills the vectors, below about four rows. On a GPU the time of a step is that of its launches, so
  fewer rows than measured do not make it shorter: beyond 8 devices there is no gain at all. Up to 8 the table flatters,
  because one GPU runs 128 rows at once in less time than eight times 16 rows.
- Then other means are used: shorter windows (`truncated_grad`, or `reset` with several windows side by side) turn time
  into rows; `sj.unroll_parallel` divides time itself where the network contracts; a batch in parts (`accumulate`) sends
  its gradient once; members of an ensemble need no communication; and optimiser states that are sharded save memory,
  not time.

`sj.fit(..., devices=jax.devices())` and `seqjax train --devices N --coordinator HOST:PORT --processes M` train in this
way. `sj.fit_many(..., devices=jax.devices())` divides an ensemble, and an engine for tasks runs a sweep on several
machines, as in [sweep_with_dask.py](sweep_with_dask.py).
"""


def main() -> None:
    out = HERE.parent / "docs" / "scaling.md"
    out.parent.mkdir(exist_ok=True)
    out.write_text(document())
    print(out)


if __name__ == "__main__":
    main()
