"""Cells, one a file: the equations, the parameters, the step."""
