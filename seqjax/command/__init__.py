"""The command line: parsing, run folders, the character model, and the pages about runs."""
