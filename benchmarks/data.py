"""From questions to the training loop: windows, packed rows and batches."""
from __future__ import annotations

import tempfile
import threading
import time
from functools import partial
from typing import Tuple

import datasets
import numpy
import pyarrow
import torch
from transformers import AutoTokenizer

from benchmarks.measure import in_new_process, memory, run
from benchmarks.questions import as_dataset, train_tokenizer
from ipu_options import poptorch
from qa.data.dataset import load_examples
from qa.data.loader import collate
from qa.data.packing import pack
from qa.data.rows import TrainingRows
from qa.data.tokenizer import QATokenizer
from qa.data.windows import Windows, make_windows
from qa.settings import ModelSettings

ANEW = ModelSettings(max_seq_length=384, doc_stride=128, overwrite_cache=True)
PUBLISHED = 1_317  # windows/s of this job on 16 Mk2 IPUs (Graphcore/roberta-base-squad)
MICRO_BATCHES, REPLICAS = 16, 4  # its accumulation and replication


def features(examples=10_000, questions_per_context=5, runs=5) -> None:
    """Examples to windows with labels, against the Rust tokenizer alone on the same text.

    Both have the same number of threads (RAYON_NUM_THREADS).
    """
    datasets.disable_progress_bars()
    with tempfile.TemporaryDirectory() as folder:
        questions = as_dataset(examples, questions_per_context, folder)
        tokenizer = train_tokenizer(questions[:2000]["context"])
        pairs = list(zip(questions["question"], questions["context"]))
        backend = type(tokenizer.backend_tokenizer).from_str(tokenizer.backend_tokenizer.to_str())
        backend.enable_truncation(384, stride=128, strategy="only_second")

        def rust():
            for begin in range(0, len(pairs), 1000):
                backend.encode_batch(pairs[begin:begin + 1000])

        run({"the Rust tokenizer alone": rust,
             "make_windows": lambda: make_windows(questions, QATokenizer.of(tokenizer), ANEW,
                                                  labels=True, offsets=False)},
            {"the Rust tokenizer alone": 1 / 1.3}, runs=runs, amount=examples, unit="examples")


def packing(file=None, tokenizer=None, runs=3) -> None:
    """How full packed rows are, and how long packing takes.

    100,000 windows as long as SQuAD's are packed into rows of 384 tokens, up to 8 in a row; with
    --file and --tokenizer, the windows of those questions.
    """
    lengths = squad_lengths(numpy.random.default_rng(0), 100_000)
    if file:
        examples = load_examples(split="train", file=file, version_2_with_negative=True)
        lengths = make_windows(
            examples, QATokenizer.of(AutoTokenizer.from_pretrained(tokenizer)),
            ANEW, labels=True, offsets=False).lengths
    for most in (1, 8):
        rows = len(pack(lengths, 384, most).row_slots) - 1
        print(f"  {len(lengths):,} windows of {lengths.mean():.0f} tokens, up to {most} in a row: "
              f"{rows:,} rows, {100 * lengths.sum() / (rows * 384):.1f} % of their tokens are real")
    run({f"pack, up to {most} in a row": partial(pack, lengths, 384, most) for most in (1, 8)},
        runs=runs, amount=len(lengths), unit="windows")


def squad_lengths(random: numpy.random.Generator, count: int) -> numpy.ndarray:
    """Return int32 lengths of windows as SQuAD's: 180 tokens, 300 at the 95th percentile."""
    return random.gamma(7.5, 24, count).clip(20, 384).astype(numpy.int32)


def write_windows(folder: str, count: int) -> None:
    """Write made-up windows with labels as qa.data.windows.make_windows writes them."""
    datasets.disable_progress_bars()
    random = numpy.random.default_rng(0)
    lengths = squad_lengths(random, count)
    begins = numpy.concatenate([[0], numpy.cumsum(lengths)]).astype(numpy.int32)
    positions = random.integers(10, lengths).astype(numpy.int16)
    datasets.Dataset(pyarrow.table({
        "input_ids": pyarrow.ListArray.from_arrays(
            begins, random.integers(4, 50_000, begins[-1]).astype(numpy.uint16)),
        "example": numpy.arange(count, dtype=numpy.int32),
        "cls_position": numpy.zeros(count, numpy.int16),
        "context_start": numpy.full(count, 12, numpy.int16),
        "start_position": positions, "end_position": positions})).save_to_disk(folder)


def input_pipeline(windows=88_568, runs=3) -> None:
    """Windows to the loop through the asynchronous loader, against the published 16-IPU run.

    As many windows as in SQuAD v1's training set; `--windows 1000000 --runs 1` shows that memory
    does not grow during an epoch (what training process and worker hold, without pages of mapped
    files).
    """
    published = f"published, {PUBLISHED:,} windows/s"
    with tempfile.TemporaryDirectory() as folder:
        in_new_process(write_windows, folder, windows)
        for name, room in (("unpacked", 1), ("packed", 8)):
            run({published: lambda: windows / PUBLISHED,
                 f"rows {name}": lambda: in_new_process(epoch, folder, room)}, {published: 10},
                runs=runs, amount=windows, unit="windows", warm_up=False)


def epoch(folder: str, room: int) -> float:
    """Load an epoch of the windows in `folder`; return the seconds from the first batch on.

    room: windows in a row. Prints the memory after the first and after the last tenth.
    """
    torch.set_num_threads(1)
    options = poptorch.Options()
    options.Training.gradientAccumulation(MICRO_BATCHES)
    options.replicationFactor(REPLICAS)
    rows = TrainingRows(
        Windows(datasets.load_from_disk(folder)), row_length=384, max_windows_per_row=room,
        pad_token_id=1, micro_batch_size=1, micro_batches_per_update=MICRO_BATCHES * REPLICAS)
    loader = poptorch.DataLoader(options, rows, batch_size=1, collate_fn=collate,
                                 mode=poptorch.DataLoaderMode.Async)
    megabytes = []
    for step, _ in enumerate(loader, 1):
        if step == 1:
            begin = time.perf_counter()
        if step * 10 // rows.total_steps > len(megabytes):
            megabytes.append(memory("Anon|Shmem"))
    seconds = time.perf_counter() - begin
    loader.terminate()
    print(f"  memory after the first tenth {megabytes[0]:.0f} MB, "
          f"growth to the end {megabytes[-1] - megabytes[0]:+.1f} MB", flush=True)
    return seconds


def growth(examples=(1_000, 10_000, 100_000, 1_000_000)) -> None:
    """How the time and memory of make_windows grow; 4 GB of disk for a million examples.

    Time should grow linearly and memory hardly: it is the peak of what the process itself holds
    (RssAnon) less what it held at the start; examples and windows are in mapped files.
    """
    times = []
    for count in examples:
        with tempfile.TemporaryDirectory() as folder:
            in_new_process(write_examples, folder, count)
            seconds, megabytes = in_new_process(time_and_memory, folder)
        times.append(seconds / count)
        print(f"  {count:12,} examples {seconds:9.3f} s {megabytes:6.0f} MB; one takes "
              f"{times[-1] / times[0]:.2f} times as long as one of the fewest", flush=True)


def write_examples(folder: str, count: int) -> None:
    """Write made-up examples, and a tokenizer for them, to `folder`."""
    datasets.disable_progress_bars()
    with tempfile.TemporaryDirectory() as cache:
        examples = as_dataset(count, 5, cache)
        examples.save_to_disk(folder)
        train_tokenizer(examples[:2000:5]["context"]).save_pretrained(folder + "/bpe")


def time_and_memory(folder: str) -> Tuple[float, float]:
    """Make the windows of the examples in `folder`; return seconds and peak MB beyond the start."""
    datasets.disable_progress_bars()
    examples = datasets.load_from_disk(folder)
    before, seen, done = memory("Anon"), [], threading.Event()

    def watch() -> None:
        while not done.wait(0.01):
            seen.append(memory("Anon"))

    watcher = threading.Thread(target=watch)
    watcher.start()
    begin = time.perf_counter()
    make_windows(examples, QATokenizer.of(AutoTokenizer.from_pretrained(folder + "/bpe")), ANEW,
                 labels=True, offsets=False)
    seconds = time.perf_counter() - begin
    done.set()
    watcher.join()
    return seconds, max(seen, default=before) - before
