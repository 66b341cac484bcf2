"""`python -m data_pipelines` is `emma-data`."""

import sys

from data_pipelines.cli import main

if __name__ == "__main__":
    sys.exit(main())
