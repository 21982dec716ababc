"""`python -m reflow`: the `reflow` command where scripts are not on the path."""

from reflow.cli import main

if __name__ == "__main__":
    main()
