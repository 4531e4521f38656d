"""python -m ipu_options plan | search | sweep | calibrate | report: see qa/planning/commands.py,
the one import upwards.
"""
import sys

from ipu_options.errors import run_script
from qa.planning.commands import main

if __name__ == "__main__":
    sys.exit(run_script(main))
