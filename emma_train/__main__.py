"""python -m emma_train: the same as emma-train."""

import sys

from emma_train.cli import main

if __name__ == "__main__":
    sys.exit(main())
