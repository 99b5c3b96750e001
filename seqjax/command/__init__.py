"""The command line: parsing, training jobs, run folders, the character model, and the pages about runs."""
