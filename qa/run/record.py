"""Write run.json, which records everything that is needed to repeat a run."""
from __future__ import annotations

import importlib.metadata
import os
import platform
import shlex
import socket
import subprocess
import sys
from datetime import datetime, timezone
from pathlib import Path
from typing import Dict, Optional

import torch

from ipu_options.config import IPUConfig
from qa.data.rows import TrainingRows
from qa.run.checkpoint import Checkpoint
from qa.settings import TrainSettings
from runtime import processes
from runtime.files import write_json

_ROOT = Path(__file__).resolve().parents[2]
_PACKAGES = ("torch", "poptorch", "transformers", "tokenizers", "datasets", "evaluate", "numpy",
             "safetensors", "pyarrow")


def write_run_record(settings: TrainSettings, ipu_config: IPUConfig, rows: TrainingRows,
                     saved: Optional[Checkpoint]) -> None:
    """Write OUTPUT_DIR/run.json, unless nothing is trained (settings.dry_run).

    ipu_config: that of the training pipeline, with all values resolved. rows: the training rows.
    saved: the checkpoint from which the run continues, or None. The access token for the hub is
    masked, in the command line as well. Raises OSError.
    """
    if settings.dry_run or not processes.is_first():
        return
    command, hide = [], False
    for word in sys.argv:
        command.append(
            "***" if hide else "--hub_token=***" if word.startswith("--hub_token=") else word)
        hide = word == "--hub_token"
    record = {
        "command": " ".join(map(shlex.quote, command)),
        "settings": {**settings.values(), "hub_token": "***" if settings.hub_token else None},
        "ipu_config": ipu_config.to_dict(), "data_fingerprint": rows.windows.fingerprint,
        "resumed_from": str(saved.folder) if saved else None,
        "time": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "git_revision": git_revision(),
        "versions": {"python": platform.python_version(), **_versions()},
        "machine": {"host": socket.gethostname(), "platform": platform.platform(),
                    "cpus": os.cpu_count(), "threads": torch.get_num_threads(),
                    "processes": processes.count(), "launcher": processes.place().launcher},
    }
    write_json(Path(settings.output_dir) / "run.json", record)


def git_revision() -> Optional[str]:
    """Return the commit of the project, or None outside a git clone.

    It ends in "-dirty" if tracked files differ from the commit.
    """
    try:
        revision = subprocess.run(
            ["git", "-C", str(_ROOT), "describe", "--always", "--dirty", "--abbrev=40",
             "--exclude=*"], capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return revision.stdout.strip() or None


def _versions() -> Dict[str, str]:
    """Return the versions of those of _PACKAGES that are installed."""
    found = {}
    for package in _PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            pass
    return found
