"""`python -m seqjax.native`: compiles the kernel for this machine and says where it lies."""

import sys

from seqjax.native import build

if __name__ == "__main__":
    try:
        print(f"compiled {build()}")
    except RuntimeError as error:
        sys.exit(str(error))
