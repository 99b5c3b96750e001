"""Self-contained HTML pages on a cell or on training runs: the verdict, figures, and tables with all numbers."""
