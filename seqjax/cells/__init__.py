"""Cells, one per file: the equations, the parameters and the step."""
