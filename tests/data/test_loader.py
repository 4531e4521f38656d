"""The loader's processes: how they react to a terminal's signals, and when they end."""
import multiprocessing
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from ipu_options import poptorch
from qa.data.loader import open_loader
from qa.data.rows import TrainingRows
from tests.reference.synthetic_windows import SyntheticWindows

ROOT = Path(__file__).resolve().parents[2]

WORKER = """
import multiprocessing, os, signal
from runtime.signals import workers_ignore_signals
def work(pipe):
    for word in iter(pipe.recv, None):
        pipe.send(word)
if __name__ == "__main__":
    # A shell starts its background jobs with SIGINT ignored.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    ours, theirs = multiprocessing.get_context("spawn").Pipe()
    with workers_ignore_signals():
        worker = multiprocessing.get_context("spawn").Process(target=work, args=(theirs,),
                                                              daemon=True)
        worker.start()
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    for turn in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        ours.send(turn)
        assert ours.recv() == turn
        os.kill(worker.pid, turn)
    ours.send(None)
    worker.join()
    print("worker ended with", worker.exitcode)
"""


@pytest.mark.slow
def test_signals_leave_the_loaders_worker_alive(tmp_path):
    """The script is in a file, since a spawned process imports the main module again."""
    (tmp_path / "main.py").write_text(f"import sys; sys.path.insert(0, {str(ROOT)!r})\n{WORKER}")
    assert subprocess.check_output([sys.executable, str(tmp_path / "main.py")],
                                   universal_newlines=True) == "worker ended with 0\n"


@pytest.mark.slow
def test_the_loaders_process_ends_with_the_block_however_it_ends():
    windows = SyntheticWindows([20] * 24)
    rows = TrainingRows(windows, row_length=32, max_windows_per_row=1, pad_token_id=1,
                        micro_batch_size=2, micro_batches_per_update=2)
    with pytest.raises(ValueError):  # it keeps the traceback, and so all that its frames refer to
        with open_loader(poptorch.Options(), rows, 2) as batches:
            next(batches)
            assert multiprocessing.active_children()
            raise ValueError("in the loop")
    assert not multiprocessing.active_children()


@pytest.mark.parametrize("asynchronous", [True, False])
def test_every_batch_comes_once(asynchronous):
    """The first one is there when the block begins."""
    rows = TrainingRows(SyntheticWindows([20] * 24), row_length=32, max_windows_per_row=1,
                        pad_token_id=1, micro_batch_size=2, micro_batches_per_update=2)
    with open_loader(poptorch.Options(), rows, 2, asynchronous=asynchronous) as batches:
        input_ids = [batch["input_ids"].clone() for batch in batches]
    assert torch.equal(torch.cat(input_ids), rows.__getitems__(range(24))["input_ids"])
