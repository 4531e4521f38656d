"""Runs `python -m ipu_options COMMAND`.

The commands are in qa/planning/commands.py. Importing them here is the only import from a lower
layer (ipu_options) to a higher one (qa).
"""
import sys

from ipu_options.errors import run_script
from qa.planning.commands import main

if __name__ == "__main__":
    sys.exit(run_script(main))
