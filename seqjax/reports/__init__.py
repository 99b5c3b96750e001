"""One self-contained page about a cell: the verdict first, then the figures, then every number."""
