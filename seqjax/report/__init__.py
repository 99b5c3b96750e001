"""One self-contained page about a cell or a training run: the verdict first, then the figures, then every number."""

from .one import report as report
from .runs import compare_runs as compare_runs
from .runs import report_run as report_run
