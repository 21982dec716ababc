"""`deepspeed scripts/train.py --recipe NAME --run-dir DIR`: reflow train under the launcher. The same command resumes."""

import sys

from reflow.cli import main

if __name__ == "__main__":
    main(["train", *sys.argv[1:]])
