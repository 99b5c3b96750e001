"""The example of a sweep runs on an engine, and orders the networks by their loss."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

FILE = Path(__file__).parents[1] / "docs" / "sweep_with_dask.py"


def example():
    spec = importlib.util.spec_from_file_location("sweep_with_dask", FILE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class InThisProcess:
    """What the example uses of a client."""

    def map(self, function, arguments, **options):
        return [function(argument, **options) for argument in arguments]

    def gather(self, results):
        return results


def check(module, client):
    rows = module.sweep(client, (2, 3), steps=2)
    assert sorted({(hidden, rate) for hidden, rate, _ in rows}) == [(n, r) for n in (2, 3) for r in module.RATES]
    losses = [loss for _, _, loss in rows]
    assert losses == sorted(losses)
    assert 0 < losses[0] < 10


def test_a_sweep_is_a_table_of_all_networks():
    check(example(), InThisProcess())


@pytest.mark.filterwarnings("ignore")
def test_a_sweep_runs_on_dask():
    distributed = pytest.importorskip("distributed")
    with distributed.Client(processes=False, n_workers=1, threads_per_worker=1, dashboard_address=None) as client:
        check(example(), client)
