"""Public functions with one argument changed give a result or one sentence: a sample of tests/fuzz_functions.py."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

FUZZER = Path(__file__).parent / "fuzz_functions.py"


@pytest.mark.parametrize("seed", [100, 101])
def test_no_changed_argument_ends_in_an_internal_error(seed):
    # In a process of its own, because the types of arguments are checked at run time in this one.
    environment = {**os.environ, "SEQJAX_KERNEL": "off", "PYTHONPATH": str(FUZZER.parent.parent)}
    done = subprocess.run(
        [sys.executable, FUZZER, "--draws", "300", "--seed", str(seed)], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    *faults, last = done.stdout.strip().splitlines()
    assert not [line for line in faults if line]
    counts = json.loads(re.sub("'", '"', last.partition(": ")[2]))
    assert counts["refused"] > 100
    assert counts["right"] > 20
    print(f"seed {seed}: {last}")
