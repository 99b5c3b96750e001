"""`python -m seqjax.kernels`: compiles the kernel into the installed package, and says which variant runs."""

import argparse
import sys

import jax

from seqjax.kernels import status
from seqjax.kernels.build import build

if __name__ == "__main__":
    argparse.ArgumentParser(
        prog="python -m seqjax.kernels",
        description="Compiles the kernel into the installed package with the compiler in $CXX, or with g++ or clang++.",
    ).parse_args()
    try:
        print(f"compiled {build(jax.ffi.include_dir())}")
    except RuntimeError as error:
        sys.exit(str(error))
    print(status())
