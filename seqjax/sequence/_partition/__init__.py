"""The program of a cell's step, taken apart: what runs once, once per chunk, and once per time step."""
