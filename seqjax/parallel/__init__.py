"""Parallel-in-time evaluation: all steps of a recurrence at once, by Newton's method on the whole trajectory."""
