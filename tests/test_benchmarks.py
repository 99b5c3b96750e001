"""The benchmarks measure what they say: libraries that agree, bars by their own arithmetic, and a script that runs."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest

from benchmarks import breakdown, microscope, scaling, update
from benchmarks.any_cell import tables as any_cell_tables
from benchmarks.any_cell.bars import BARS, summarize, verdicts
from benchmarks.any_cell.measure import KERNEL, OWN, XLA
from benchmarks.machine import OtherLoad, in_turns
from benchmarks.peers import jax_peers, measure, tables, torch_process
from benchmarks.peers.bars import bars, linear_in_time
from benchmarks.peers.rows import GROWTH, ROWS, Row, inputs, weights

ROOT = Path(__file__).parents[1]
TINY = Row(2, 5, 3, 4)
MODULES = {"flax": "flax", "dm-haiku": "haiku", "equinox": "equinox", "keras": "keras"}
PAIRS = [(way, kind) for way, of in jax_peers.WAYS.items() for kind in of.kinds if way != "seqjax"]


@pytest.fixture
def lenient(monkeypatch):
    """The other libraries promote as JAX does by default, and Keras asks for its backend when it is imported."""
    monkeypatch.setenv("KERAS_BACKEND", "jax")
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


def results(way, kind, row=TINY):
    """Outputs, and the gradient of W_hh."""
    peer = jax_peers.build(way, kind, row, weights(kind, row))
    arguments = (peer.params, *jax.device_put(inputs(row)))
    _, gradient = jax.jit(jax_peers.call(peer, "backward"))(*arguments)
    outputs = jax.jit(jax_peers.call(peer, "forward"))(*arguments)
    return np.asarray(outputs), np.asarray(peer.recurrent(jax.tree.map(np.asarray, gradient)))


@pytest.mark.parametrize(("way", "kind"), PAIRS)
def test_every_jax_peer_agrees_with_the_common_weights(way, kind, lenient):
    pytest.importorskip(MODULES[jax_peers.WAYS[way].package])
    difference = measure.agree(f"{way}, {kind}", results("seqjax", kind), results(way, kind))
    assert difference["outputs"] < 1e-6


@pytest.mark.parametrize("kind", torch_process.KINDS)
def test_torch_agrees_with_the_common_weights(kind):
    pytest.importorskip("torch")
    layer = torch_process.TorchLayer(kind, TINY)
    assert measure.agree(f"torch, {kind}", results("seqjax", kind), layer.results())["outputs"] < 1e-6
    assert len(layer.seconds("backward", 3)) == 3


def test_libraries_that_disagree_are_named():
    outputs, gradient = results("seqjax", "vanilla")
    with pytest.raises(measure.Disagreement, match=r"mine: outputs differ from seqjax's by 1\.0e-01"):
        measure.agree("mine", (outputs, gradient), (outputs + 0.1, gradient))
    with pytest.raises(measure.Disagreement, match="nan of its norm"):
        measure.agree("mine", (outputs, gradient), (outputs, gradient * np.nan))


def test_turns_alternate_and_time_every_way():
    order = []
    timers = {name: lambda calls, name=name: order.extend(name * calls) or [0.02] * calls for name in "ab"}
    found = in_turns(timers, budget=0, rounds=2)
    assert "".join(order[-4:]) == "abba"
    assert found["a"] == {"min": 0.02, "median": 0.02, "calls": 2}


def test_the_work_of_another_process_is_seen_and_our_own_is_not():
    busy = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    try:
        of_all, of_others = OtherLoad(), OtherLoad(busy.pid)
        time.sleep(0.5)
        difference = of_all.processors() - of_others.processors()
    finally:
        busy.kill()
        busy.wait()
    assert 0.1 < difference < 1.3


def entry(seconds, **more):
    return {"min": seconds, "median": 2 * seconds, "run": "today", "compile": 1.0, "temporaries": 100} | more


def test_bars_are_read_off_the_rows():
    times = {"seqjax": entry(1.0, temporaries=12), "flax RNN": entry(4.0), "haiku": entry(1.6), "torch": entry(0.8)}
    rows = {f"lstm {row.name}": {"forward": times, "backward": times} for row in ROWS}
    found = {what: (figure, verdict) for what, _, figure, verdict in bars({"rows": rows}, "lstm")}
    assert found["forward: fastest JAX peer / seqjax, geometric mean"] == ("1.600 (1.600)", "met")
    assert found["forward with backward: seqjax / fastest JAX peer, worst row"] == ("0.625 (0.625)", "met")
    assert found["forward with backward: torch / seqjax, geometric mean"] == ("0.800 (0.800)", "not met")
    assert found["forward with backward: share of rows faster than torch"] == ("0.000 (0.000)", "not met")
    assert found["forward with backward: seqjax / torch, worst row"] == ("1.250 (1.250)", "met")
    assert found["forward with backward: temporaries seqjax / flax RNN, T = 4096, worst row"] == ("0.120", "met")
    assert found["forward with backward: compile time seqjax / flax RNN, geometric mean"] == ("1.000", "met")
    del rows[f"lstm {ROWS[0].name}"]
    assert ("0.625 (0.625)", "met on 8 of 9 rows") in [line[2:] for line in bars({"rows": rows}, "lstm")]


def test_the_bars_of_any_cell_are_read_off_its_rows():
    ways = {
        XLA: entry(1.0, temporaries=30, products=[1, 0]),
        KERNEL: entry(0.5, temporaries=50, kernel=True),
        OWN: entry(1.2, products=[16, 8]),
    }
    rows = {f"linen-lstm {row.name}": {"forward": ways, "backward": ways, "run": {"backward": "now"}} for row in ROWS}
    slow = ways | {XLA: ways[XLA] | {"min": 1.3, "median": 2.0}}
    rows[f"linen-lstm {ROWS[0].name}"] = {"forward": slow, "backward": ways}
    results = {"runs": {"now": "here"}, "rows": rows}

    summary = summarize(results, "linen-lstm", XLA)
    assert summary.slowest["forward"] == pytest.approx((1.3 / 1.2, 2 / 2.4))
    assert summary.gain["forward"] == pytest.approx((1.2 / 1.3 ** (1 / 9), 1.2))
    assert summary.gain["backward"] == pytest.approx((1.2, 1.2))
    assert (summary.temporaries, summary.products["backward"], summary.own_products["backward"]) == (0.3, 1, 16)
    assert list(verdicts(summary).values()) == ["not met", "met", "not met", "met", "met"]
    with_kernel = verdicts(summarize(results, "linen-lstm", KERNEL))
    assert list(with_kernel) == list(BARS)
    assert list(with_kernel.values()) == ["met", "met", "met", "not met", ""]

    text = any_cell_tables.document(results)
    assert "| flax linen LSTMCell, XLA's loops | 1.083 (0.833) | 0.833 (0.833) |" in text
    assert "| flax linen LSTMCell, kernel in 18 of 18 calls | 0.417 (0.417) |" in text
    assert "| (1, 1000, 8, 8) | 1300.00 (2000.00) | 500.00 (1000.00) | 1200.00 (2400.00) | 0.92 | 2.40 |" in text

    del rows[f"linen-lstm {ROWS[0].name}"]
    ways[KERNEL]["kernel"] = False
    assert verdicts(summarize(results, "linen-lstm", XLA))["slowest forward"] == "met on 8 of 9 rows"
    text = any_cell_tables.document(results)
    assert "| flax linen LSTMCell, XLA's loops (the kernel does not run it) | 0.833 (0.833) |" in text
    assert "kernel in" not in text
    assert "500.00 (1000.00) =" in text


def test_a_time_that_grows_with_the_square_of_t_is_not_linear():
    def growth(power):
        points = {row.name: {"forward": {"seqjax": entry(1e-6 * row.time**power)}} for row in GROWTH["T"]}
        return linear_in_time({"growth": {"T": points}})[0][2:]

    assert growth(1) == ("1.000", "met")
    assert growth(2) == ("2.000", "not met")


@pytest.mark.parametrize("kind", ["vanilla", "lstm", "gru"])
def test_the_parts_of_an_unroll_run_alone_and_are_all_its_products(kind):
    row = Row(2, 700, 3, 3)  # with as many features as units, so that all products are alike
    calls, chunks = breakdown.parts(kind, row)
    for call, _ in calls.values():
        jax.block_until_ready(call())
    length = -(-row.time // chunks)
    one = length * row.batch * breakdown.GATES[kind] * row.hidden**2
    assert chunks > 1
    assert sum(multiplications for _, multiplications in calls.values()) == 7 * one
    assert ("back: states that were not saved" in calls) is (kind == "lstm")


def python(*arguments):
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    return subprocess.run([sys.executable, *arguments], cwd=ROOT, env=environment, capture_output=True, text=True)


def test_the_peers_command_merges_what_a_partial_run_measures(tmp_path):
    out = tmp_path / "peers"
    command = ["-m", "benchmarks.peers", "--rows", TINY.name, "--cells", "vanilla", "--budget", "0.001", "--out", out]
    first = python(*command, "--ways", "flax RNN", "--only", "forward")
    assert first.returncode == 0, first.stderr
    second = python(*command, "--ways", "flax nnx", "--only", "forward")
    assert second.returncode == 0, second.stderr
    found = json.loads(out.with_suffix(".json").read_text())
    assert list(found["rows"][f"vanilla {TINY.name}"]["forward"]) == ["seqjax", "flax RNN", "flax nnx"]
    assert out.with_suffix(".md").read_text() == tables.document(found)
    assert "| (2, 5, 3, 4)" in tables.document(found)


def test_the_gpu_script_runs_dry_and_says_where_there_is_no_gpu():
    dry = python("-m", "benchmarks.gpu", "--dry-run", "--no-torch", "--rows", TINY.name)
    assert dry.returncode == 0, dry.stderr
    assert "| seqjax |" in dry.stdout
    assert "jax.experimental.rnn is left out: it runs on a GPU only" in dry.stdout
    without = python("-m", "benchmarks.gpu")
    assert without.returncode == 2
    assert without.stderr.startswith("no GPU here")


def test_the_jacobians_that_are_timed_agree(lenient):
    found = microscope.jacobians(hidden=4, steps=3)
    assert all(numbers["difference"] < 1e-5 for numbers in found.values())


@pytest.mark.parametrize("cell", ["lstm", "gru"])
def test_the_updates_of_flax_and_of_seqjax_are_the_same(cell, lenient):
    job = update.Job(cell, batch=2, window=8, embedding=3, hidden=5, layers=2)
    ours, theirs = (list(itertools.islice(of(job), 4)) for of in (update.seqjax_updates, update.flax_updates))
    np.testing.assert_allclose(ours, theirs, rtol=1e-5)
    assert ours[0] != ours[-1]


def test_the_model_of_many_devices_is_that_of_the_committed_measurements():
    assert (ROOT / "docs" / "scaling.md").read_text() == scaling.document()
    ethernet, job = scaling.LINKS["CPU"][0], scaling.jobs()[0]
    assert scaling.ring(2, 1e6, ethernet) == scaling.tree(2, 1e6, ethernet) == 2 * (50e-6 + 1e6 / (2 * 25e9 / 8))
    assert job.compute(2 * job.rows) == 2 * job.seconds
