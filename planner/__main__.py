"""Runs `python -m planner COMMAND`; the commands are in commands.py."""
import sys

from planner.commands import main
from runtime.errors import run_script

if __name__ == "__main__":
    sys.exit(run_script(main))
