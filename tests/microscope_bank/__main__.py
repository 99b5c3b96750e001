"""Prints the confusion matrix of the bank, or of some groups only: python -m tests.microscope_bank gru-60"""

from __future__ import annotations

import argparse
import time

from .judge import confusion, judge, problems, score
from .networks import groups


def main() -> None:
    """Runs the groups, prints what is not right, the matrix, and the shares."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("groups", nargs="*", help=f"of {', '.join(groups())}; all by default")
    answers, began = [], time.perf_counter()
    for name, make in groups().items():
        if name not in (parser.parse_args().groups or groups()):
            continue
        since = time.perf_counter()
        found = [answer for network in make() for answer in judge(network)]
        answers += found
        print(f"{name:16} {score(found)}; {time.perf_counter() - since:.0f} s", flush=True)
    print("", *problems(answers), "", confusion(answers), "", score(answers), sep="\n")
    print(f"{time.perf_counter() - began:.0f} s")


if __name__ == "__main__":
    main()
