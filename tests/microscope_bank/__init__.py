"""An independent judge of the verdict: networks whose regime is known by brute force, and the table of its answers.

No module here uses `seqjax.analysis` to find a truth. `python -m tests.microscope_bank` prints the confusion matrix.
`python -m tests.microscope_bank.coverage` prints how often an interval of the largest exponent contains the true one.
"""
