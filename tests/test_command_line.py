"""The command line: it trains, samples and scores as the library does, and a run that was broken off loses nothing."""

from __future__ import annotations

import json
import math
import os
import re
import signal
import subprocess
import sys
import time
import warnings

import jax
import numpy as np
import optax
import pytest
from small_runs import SEQJAX, TEXT, WINDOWS, assert_same_run, checkpoints, metrics, small, state, stop, train, write
from small_runs import finished as finished
from small_runs import seqjax_run as run

import seqjax as sj
import seqjax.__main__
from seqjax.command.character_model import Settings, build


def number(printed, name):
    """The number that stands behind a name."""
    return float(re.search(rf"{name}\s+(-?[\d.]+)", printed).group(1))


def test_the_command_trains_what_the_library_trains(finished):
    corpus = sj.data.Corpus.of("text", TEXT)
    training, validation, _ = sj.data.split(corpus.tokens)
    cell = sj.stack([sj.Embedding(len(corpus.vocabulary), 8), sj.LSTM(8, 16)])
    model, optimizer = sj.Model(cell, sj.Categorical(16, len(corpus.vocabulary))), optax.adam(2e-3)
    windows = list(sj.data.windows(training, 4, 16, passes=1))
    assert len(windows) == WINDOWS
    fitted = sj.fit(model, windows + windows, steps=12, optimizer=optimizer, key=jax.random.key(0))
    table = metrics(finished)
    for name in ("step", "loss", "grad_norm", "clipped", "param_norm"):
        np.testing.assert_allclose(table[name], fitted.history[name], rtol=1e-4, err_msg=name)
    stored, last = state(finished)
    assert stored == model
    for a, b in zip(jax.tree.leaves(last.params), jax.tree.leaves(fitted.params), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)
    loss = sj.evaluate(model, last.params, sj.data.windows(validation, 1, 16, passes=1))
    assert table.validation.iloc[-1] == pytest.approx(loss, rel=1e-6)


def test_a_run_is_a_folder_that_tells_everything(finished):
    told = json.loads((finished / "run.json").read_text("utf-8"))
    corpus = sj.data.Corpus.of("text", TEXT)
    assert told["settings"]["text"] == str((finished.parent / "text.txt").resolve())
    assert {name: told["settings"][name] for name in ("hidden", "steps", "seed")} == dict(hidden=16, steps=12, seed=0)
    assert told["corpus"]["vocabulary"] == corpus.vocabulary
    assert (told["corpus"]["sha256"], told["corpus"]["length"]) == (corpus.sha256, len(TEXT))
    assert told["versions"]["jax"] == jax.__version__
    assert told["kernels"] == ["lstm" if sj.kernels.available() else None] * len(told["kernels"]) != []
    table = metrics(finished)
    assert table.step.tolist() == list(range(1, 13))
    assert table.step[table.validation.notna()].tolist() == [4, 8, 12]
    assert table.characters.tolist() == [64 * step for step in range(1, 13)]
    assert table.seconds.is_monotonic_increasing
    assert checkpoints(finished) == [8, 12]


def test_training_prints_its_score_beside_that_of_no_memory_and_a_sample(tmp_path, capsys):
    path = train(tmp_path, steps=5)
    printed = capsys.readouterr().out
    assert printed.startswith(f"{path}: lstm, 1 x 16 hidden units")
    assert number(printed, "unigram entropy of the corpus") == pytest.approx(
        sj.data.unigram_entropy(list(map(ord, TEXT))), abs=6e-4
    )
    model, last = state(path)
    tokens = sj.data.split(sj.data.Corpus.of("text", TEXT).tokens)
    for name, part in (("validation text", tokens[1]), ("test text", tokens[2])):
        bits = sj.evaluate(model, last.params, sj.data.windows(part, 1, 16, passes=1)) / math.log(2)
        assert number(printed, f"bits per character, {name}") == pytest.approx(bits, abs=6e-4)
    said = printed.split("after the bar:")[1].split("more:")[0]
    prompt, written = re.sub(r"\n {4}", "\n", said.strip()).split("|")
    assert prompt == sj.data.decode(tokens[1][:20], sj.data.Corpus.of("text", TEXT).vocabulary)
    assert abs(len(written) - 200) <= 2
    assert f"seqjax sample {path}" in printed


@pytest.mark.parametrize(("step", "times"), [(4, 1), (WINDOWS + 1, 1), (WINDOWS + 3, 2)])
def test_an_interrupted_run_goes_on_bit_for_bit(step, times, finished, tmp_path, monkeypatch, capsys):
    text = write(tmp_path / "text.txt")
    with monkeypatch.context() as patch:
        stop(patch, step, times)
        assert run("train", "--text", text, "--out", tmp_path / "run", *small(steps=12)) == 130
    last = step + 1 if times == 1 else 8  # ended at once, it loses what came after the last checkpoint
    assert checkpoints(tmp_path / "run")[-1] == last
    assert times == 2 or f"interrupted at step {last}" in capsys.readouterr().out
    assert run("train", "--resume", tmp_path / "run") == 0
    assert f"going on after step {last}" in capsys.readouterr().out
    assert_same_run(tmp_path / "run", finished)


def test_a_run_that_goes_on_with_other_loops_says_so(tmp_path, capsys):
    path = train(tmp_path, steps=3)
    told = json.loads((path / "run.json").read_text("utf-8"))
    now = sj.info().kernel
    assert told["variant"] == now
    assert run("train", "--resume", path, "--steps", 4) == 0
    assert "ran the loops" not in capsys.readouterr().out
    (path / "run.json").write_text(json.dumps(told | {"variant": "another"}), "utf-8")
    assert run("train", "--resume", path, "--steps", 5) == 0
    expected = "XLA" if now is None else f"the compiled kernel ({now})"
    said = f"until now the compiled kernel (another) ran the loops, from here on {expected} runs them"
    assert said in capsys.readouterr().out


def test_a_finished_run_can_be_trained_further(finished, tmp_path):
    path = train(tmp_path, steps=8)
    before = (path / "metrics.csv").read_bytes()
    assert run("train", "--resume", path) == 0
    assert (path / "metrics.csv").read_bytes() == before
    assert run("train", "--resume", path, "--steps", 12) == 0
    assert_same_run(path, finished)


def test_an_interrupted_process_goes_on_bit_for_bit(tmp_path):
    text, path = write(tmp_path / "text.txt"), tmp_path / "run"
    seldom = dict(validate_every=99999, checkpoint_every=99999)
    arguments = ["train", "--text", str(text), "--out", str(path), *small(steps=99999, **seldom)]
    with subprocess.Popen([*SEQJAX, *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        table, deadline = path / "metrics.csv", time.monotonic() + 120
        while not (table.exists() and table.read_text().count("\n") > 3) and process.poll() is None:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        process.send_signal(signal.SIGINT)
        printed, complaint = process.communicate(timeout=120)
    assert (process.returncode, complaint) == (130, "")
    (kept,) = checkpoints(path)
    assert f"interrupted at step {kept}" in printed
    assert metrics(path).step.tolist() == list(range(1, kept + 1))
    # In processes of their own too: this one compiles with other optimisations, which round otherwise.
    unbroken = tmp_path / "unbroken"
    whole = ["train", "--text", str(text), "--out", str(unbroken), *small(steps=kept + 3, **seldom)]
    for rest in (["train", "--resume", str(path), "--steps", str(kept + 3)], whole):
        assert subprocess.run([*SEQJAX, *rest, "--no-report"], capture_output=True, timeout=120).returncode == 0
    assert_same_run(path, unbroken)


def test_training_stops_after_its_minutes(tmp_path):
    text, path = write(tmp_path / "text.txt"), tmp_path / "run"
    minutes = ("--minutes", 0.05)
    assert run("train", "--text", text, "--out", path, *minutes, *small(validate_every=99, checkpoint_every=99)) == 0
    seconds = metrics(path).seconds
    assert seconds.iloc[-1] >= 3
    assert (seconds.iloc[:-1] <= 3).all()  # which a rounded 2.9996 is
    assert checkpoints(path)[-1] == len(seconds)


def test_by_default_an_lstm_reads_six_hundred_times():
    assert (Settings().cell, Settings().last_step, Settings(minutes=1.0).last_step) == ("lstm", 600, None)
    assert (Settings(steps=3).last_step, Settings(steps=3, minutes=1.0).last_step) == (3, 3)


def test_by_default_the_manual_is_read_into_a_new_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert run("train", *small(cell="vanilla", steps=1, batch=32, window=64)) == 0
    (path,) = (tmp_path / "runs").iterdir()
    assert re.fullmatch(r"vanilla-\d{8}-\d{6}", path.name)
    assert json.loads((path / "run.json").read_text("utf-8"))["corpus"]["sha256"] == sj.data.manual_topics().sha256


def test_the_settings_name_the_model():
    cell = sj.stack([sj.Embedding(3, 8), sj.GRU(8, 16), sj.GRU(16, 16)])
    model = sj.Model(cell, sj.Categorical(16, 3))
    assert build(Settings(cell="gru", layers=2, embedding=8, hidden=16), "abc") == model


def sampled(capsys, path, *options):
    """What a model writes after "the "."""
    capsys.readouterr()
    assert run("sample", path, "--prompt", "the ", "--length", 30, *options) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("the ")
    assert len(printed) == 4 + 30 + 1
    return printed[4:-1]


def test_a_sample_is_drawn_by_its_seed(finished, capsys):
    once, again, other = (sampled(capsys, finished, "--seed", seed) for seed in (1, 1, 2))
    assert once == again != other


def test_without_temperature_each_character_is_the_likeliest(finished, capsys):
    (model, last), vocabulary = state(finished), "".join(sorted(set(TEXT)))
    tokens, s, expected = sj.data.encode("the ", vocabulary), None, ""
    for _ in range(30):
        s, outputs = sj.unroll(model.cell, last.params.cell, tokens[None], state=s)
        likeliest = int(model.head.logits(last.params.head, outputs[0, -1]).argmax())
        tokens, expected = np.array([likeliest], np.int32), expected + vocabulary[likeliest]
    for options in (("--temperature", 0), ("--top-k", 5, "--top-p", 1e-6)):
        assert sampled(capsys, finished, *options) == expected
    assert sampled(capsys, finished, "--top-k", 3, "--top-p", 0.9) != expected


@pytest.mark.parametrize("length", [2, 1024, 1025, 2500])
def test_the_score_is_the_log_probability_by_hand(length, finished, tmp_path, capsys):
    text = (TEXT * 5)[:length]
    model, last = state(finished)
    tokens = sj.data.encode(text, "".join(sorted(set(TEXT))))
    log_p = float(sj.sequence_log_prob(model, last.params, tokens[None, :-1], tokens[None, 1:])[0])
    assert run("score", finished, write(tmp_path / "other.txt", text)) == 0
    printed = capsys.readouterr().out
    assert number(printed, "characters predicted") == length - 1
    assert number(printed, "log-probability") == pytest.approx(log_p, rel=1e-5)
    assert number(printed, "bits per character") == pytest.approx(-log_p / (length - 1) / math.log(2), rel=1e-4)
    assert number(printed, "perplexity") == pytest.approx(math.exp(-log_p / (length - 1)), rel=1e-4)
    assert number(printed, "unigram entropy") == pytest.approx(sj.data.unigram_entropy(tokens), abs=6e-5)


def test_a_reader_that_goes_away_is_no_error(finished):
    command = f"{' '.join(SEQJAX)} sample {finished} --prompt the --length 3000 | head -c 5"
    done = subprocess.run(command, shell=True, capture_output=True, text=True, timeout=120, env=dict(os.environ))
    assert (done.stdout[:3], done.stderr) == ("the", "")


@pytest.mark.parametrize("package", ["tyro", "rich", "orbax.checkpoint"])
def test_without_its_packages_the_command_says_what_to_install(package, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)
    warnings.simplefilter("ignore")  # of orbax; pytest undoes it
    with pytest.raises(SystemExit) as stopped:
        seqjax.__main__.main()
    assert f'got no {package}: pip install "seqjax[cli]"' in stopped.value.code
