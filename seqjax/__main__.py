"""`seqjax` and `python -m seqjax`: the command line, or what to install for it."""

from __future__ import annotations

import os
import sys


def main() -> None:
    """Runs the command line."""
    try:
        import orbax.checkpoint  # noqa: F401
        import rich  # noqa: F401
        import tyro  # noqa: F401
    except ModuleNotFoundError as error:
        sys.exit(f'seqjax: expected the packages of the command line, got no {error.name}: pip install "seqjax[cli]"')
    from seqjax.command.cli import run
    from seqjax.command.processes import is_worker

    status = run(sys.argv[1:])
    if status and is_worker():
        sys.stdout.flush()
        os._exit(status)  # because JAX would wait for workers that may be gone
    sys.exit(status)


if __name__ == "__main__":
    main()
