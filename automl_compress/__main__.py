"""`python -m automl_compress` is the command line."""

import sys

from automl_compress.cli import main

if __name__ == "__main__":
    sys.exit(main())
