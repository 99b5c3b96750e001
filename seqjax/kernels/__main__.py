"""`python -m seqjax.kernels`: compiles the kernel for this machine and prints its path."""

import argparse
import sys

from seqjax.kernels import build

if __name__ == "__main__":
    argparse.ArgumentParser(
        prog="python -m seqjax.kernels",
        description="Compiles the kernel for this machine with the compiler in $CXX, or with g++.",
    ).parse_args()
    try:
        print(f"compiled {build()}")
    except RuntimeError as error:
        sys.exit(str(error))
