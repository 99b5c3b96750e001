"""A sweep over sizes and learning rates on many machines, with Dask.

    pip install distributed
    dask scheduler                          on one machine
    dask worker tcp://NODE0:8786            on every machine, once per accelerator
    python docs/sweep_with_dask.py tcp://NODE0:8786

Networks of one size are one program (`sj.fit_many`), and each size is a task of Dask. Without an address, the tasks run
in processes of this machine.
"""

from __future__ import annotations

import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import seqjax as sj

SIZES = (8, 16, 32)
RATES = (1e-3, 3e-3, 1e-2, 3e-2)


def train(hidden: int, steps: int = 300) -> list[tuple[int, float, float]]:
    """Trains one GRU of this size for each learning rate, and returns (size, rate, validation loss) of each."""
    model = sj.Model(sj.GRU(2, hidden), sj.Gaussian(hidden, 1, std=1.0))
    found = sj.fit_many(
        model,
        sj.data.adding_problem(jax.random.key(0), batch=64, time=20),
        keys=jax.random.split(jax.random.key(1), len(RATES)),
        steps=steps,
        settings={"learning_rate": jnp.array(RATES)},
        loss=sj.ManyToOne(),
        validation=lambda: [next(sj.data.adding_problem(jax.random.key(2), batch=500, time=20))],
        validate_every=steps,
    )
    losses = found.history["validation"][:, -1]
    # A failed network stays at its last finite parameters, and is the last of the table.
    failed = [reason.startswith("not finite") for reason in found.reasons]
    return [(hidden, r, float(np.where(f, np.inf, v))) for r, v, f in zip(RATES, losses, failed, strict=True)]


def sweep(client: Any, sizes: tuple[int, ...] = SIZES, **options: int) -> list[tuple[int, float, float]]:
    """All networks, the best one first; `client` is a `dask.distributed.Client`."""
    of_sizes = client.gather(client.map(train, sizes, **options))
    return sorted((row for rows in of_sizes for row in rows), key=lambda row: row[2])


def main() -> None:
    """Prints the table of all networks."""
    from dask.distributed import Client

    with Client(*sys.argv[1:2]) as client:
        for hidden, rate, loss in sweep(client):
            print(f"{hidden} units, learning rate {rate:g}: {loss:.4f}")


if __name__ == "__main__":
    main()
