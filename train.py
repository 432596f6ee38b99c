"""`python train.py <flags>` is `miles train <flags>`: published launch scripts call this file."""

import sys

from miles.__main__ import main

if __name__ == "__main__":
    sys.exit(main(["train", *sys.argv[1:]]))
