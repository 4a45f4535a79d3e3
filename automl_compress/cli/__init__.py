"""The command line: `main` runs one and returns its exit code. A module here for each group of commands."""

from automl_compress.cli.app import main

__all__ = ["main"]
