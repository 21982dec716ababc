"""`deepspeed --module reflow.training --recipe NAME --run-dir DIR`: scripts/train.py for an installed wheel."""

import sys

from reflow.cli import main

if __name__ == "__main__":
    main(["train", *sys.argv[1:]])
