"""Parallel-in-time evaluation: all steps of a recurrence at once, by Newton's method over the whole trajectory."""
