"""Measure how fast examples become windows with labels, compared with the Rust tokenizer alone.

    python -m benchmarks.features [--file train.json] [--examples 10000] [--tokenizer FOLDER]
                                  [--runs 5] [--run_qa]

--run_qa measures run_qa's implementation as well. Without --file the text is made up
(benchmarks/questions.py); five questions share a context, as in SQuAD, unless
--questions_per_context 1 gives each question a context of its own. All sides use the same text,
tokenizer and number of threads (RAYON_NUM_THREADS). The peak memory is that of this process.
"""
import argparse
import os
import resource
import statistics
import tempfile
from functools import partial

from benchmarks import run_qa
from benchmarks.measure import alternate, compare, describe, machine
from benchmarks.questions import as_dataset, train_tokenizer

MAX_SEQ_LENGTH, DOC_STRIDE = 384, 128


def main():
    given = arguments()
    os.environ.update(HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1")
    import datasets
    from transformers import AutoTokenizer

    from qa.data.dataset import load_examples
    from qa.data.windows import make_windows

    datasets.disable_progress_bars()
    with tempfile.TemporaryDirectory() as folder:
        examples = (
            load_examples(split="train", file=given.file, version_2_with_negative=True,
                          cache_dir=folder)
            if given.file else as_dataset(given.examples, given.questions_per_context, folder))
        tokenizer = AutoTokenizer.from_pretrained(
            given.tokenizer) if given.tokenizer else train_tokenizer(examples[:2000]["context"])
        pairs = [(question.lstrip(), context)
                 for question, context in zip(examples["question"], examples["context"])]
        backend = type(tokenizer.backend_tokenizer).from_str(tokenizer.backend_tokenizer.to_str())
        backend.enable_truncation(MAX_SEQ_LENGTH, stride=DOC_STRIDE, strategy="only_second")

        def rust():
            for begin in range(0, len(pairs), 1000):
                backend.encode_batch(pairs[begin:begin + 1000])

        def ours():
            make_windows(examples, tokenizer, max_seq_length=MAX_SEQ_LENGTH, doc_stride=DOC_STRIDE,
                         labels=True, offsets=False, overwrite_cache=True)

        sides = {"the Rust tokenizer alone": rust, "make_windows": ours}
        if given.run_qa:
            sides["run_qa's way"] = lambda: examples.map(
                partial(run_qa.features, tokenizer=tokenizer), batched=True,
                remove_columns=examples.column_names, load_from_cache_file=False)
        seconds = alternate(sides, given.runs)
    print(f"{len(examples)} examples, {len(set(examples['context']))} contexts; {machine()}")
    for name, times in seconds.items():
        describe(name, times, len(examples), "examples")
    tokenizer_time = statistics.median(seconds["the Rust tokenizer alone"])
    for name in list(sides)[1:]:
        ratios = [
            side / alone for side, alone in zip(seconds[name], seconds["the Rust tokenizer alone"])]
        print(
            f"  {name} takes {statistics.median(ratios):.2f} times as long as the tokenizer alone "
            f"({min(ratios):.2f} .. {max(ratios):.2f})")
    compare(1.3 * tokenizer_time / statistics.median(seconds["make_windows"]), 1,
            "1.3 times the tokenizer's time over ours")
    print("  peak memory of the process: "
          f"{resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024:.0f} MiB")


def arguments():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--file", help="questions in any format that train.py reads")
    parser.add_argument("--examples", type=int, default=10_000)
    parser.add_argument("--questions_per_context", type=int, default=5)
    parser.add_argument("--tokenizer",
                        help="folder of a tokenizer; default: a byte-level BPE trained on the text")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--run_qa", action="store_true", help="measure run_qa's way as well")
    return parser.parse_args()


if __name__ == "__main__":
    main()
