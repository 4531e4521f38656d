"""Features: examples -> windows with labels, against the Rust tokenizer alone and against the way of run_qa.

    python -m benchmarks.features [--file train.json] [--examples 10000] [--tokenizer FOLDER] [--runs 5]

Without --file the text is made up: contexts of about 120 words, each shared by five questions as in SQuAD, or with one of its own
(--questions_per_context 1). All sides use the same text, tokenizer and threads (RAYON_NUM_THREADS). Peak memory is this process's.
"""
import argparse
import os
import random
import resource
import statistics
import tempfile

from benchmarks.measure import alternate, compare, describe, machine

MAX_SEQ_LENGTH, DOC_STRIDE = 384, 128


def main():
    given = arguments()
    os.environ.update(HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1")
    import datasets
    from transformers import AutoTokenizer

    from qa.data import load_examples
    from qa.windows import make_windows

    datasets.disable_progress_bars()
    with tempfile.TemporaryDirectory() as folder:
        examples = (load_examples(split="train", file=given.file, version_2_with_negative=True, cache_dir=folder) if given.file
                    else made_up(given.examples, given.questions_per_context, folder))
        tokenizer = AutoTokenizer.from_pretrained(given.tokenizer) if given.tokenizer else trained(examples)
        pairs = [(question.lstrip(), context) for question, context in zip(examples["question"], examples["context"])]
        backend = type(tokenizer.backend_tokenizer).from_str(tokenizer.backend_tokenizer.to_str())
        backend.enable_truncation(MAX_SEQ_LENGTH, stride=DOC_STRIDE, strategy="only_second")

        def rust():
            for begin in range(0, len(pairs), 1000):
                backend.encode_batch(pairs[begin:begin + 1000])

        def ours():
            make_windows(examples, tokenizer, max_seq_length=MAX_SEQ_LENGTH, doc_stride=DOC_STRIDE, labels=True, offsets=False,
                         overwrite_cache=True)

        sides = {"the Rust tokenizer alone": rust, "make_windows": ours}
        if given.run_qa:
            sides["run_qa's way"] = lambda: examples.map(lambda batch: run_qa_features(batch, tokenizer), batched=True,
                                                         remove_columns=examples.column_names, load_from_cache_file=False)
        seconds = alternate(sides, given.runs)
    print(f"{len(examples)} examples, {len(set(examples['context']))} contexts; {machine()}")
    for name, times in seconds.items():
        describe(name, times, len(examples), "examples")
    tokenizer_time = statistics.median(seconds["the Rust tokenizer alone"])
    for name in list(sides)[1:]:
        ratios = [side / alone for side, alone in zip(seconds[name], seconds["the Rust tokenizer alone"])]
        print(f"  {name} takes {statistics.median(ratios):.2f} times as long as the tokenizer alone "
              f"({min(ratios):.2f} .. {max(ratios):.2f})")
    compare(1.3 * tokenizer_time / statistics.median(seconds["make_windows"]), 1, "1.3 times the tokenizer's time over ours")
    print(f"  peak memory of the process: {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024:.0f} MiB")


def arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--file", help="questions in any format that train.py reads")
    parser.add_argument("--examples", type=int, default=10_000)
    parser.add_argument("--questions_per_context", type=int, default=5)
    parser.add_argument("--tokenizer", help="folder of a tokenizer; default: a byte-level BPE trained on the text")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--run_qa", action="store_true", help="measure run_qa's way as well")
    return parser.parse_args()


def made_up(count, questions_per_context, folder):
    """Random words in SQuAD's proportions, as a memory-mapped data set: made row by row, so memory does not grow with `count`."""
    import datasets

    def rows():
        rng = random.Random(0)
        words = ["".join(rng.choices("abcdefghijklmnopqrstuvwxyz", k=rng.randint(2, 10))) for _ in range(5000)]
        for number in range(count):
            if number % questions_per_context == 0:
                context = " ".join(rng.choices(words, k=rng.randint(60, 180)))
            start = context.index(" ", rng.randrange(len(context) // 2)) + 1
            yield {"id": str(number), "question": " ".join(rng.choices(words, k=10)) + "?", "context": context,
                   "answers": {"text": [context[start:start + 12]], "answer_start": [start]}}

    answers = {"text": datasets.Sequence(datasets.Value("string")), "answer_start": datasets.Sequence(datasets.Value("int32"))}
    columns = {name: datasets.Value("string") for name in ("id", "question", "context")}
    return datasets.Dataset.from_generator(rows, features=datasets.Features({**columns, "answers": answers}), cache_dir=folder)


def trained(examples):
    from tokenizers import ByteLevelBPETokenizer, Tokenizer
    from tokenizers.processors import RobertaProcessing
    from transformers import RobertaTokenizerFast

    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator(examples[:2000]["context"], vocab_size=20_000, show_progress=False,
                            special_tokens=["<s>", "<pad>", "</s>", "<unk>", "<mask>"])
    backend = Tokenizer.from_str(bpe.to_str())
    backend.post_processor = RobertaProcessing(("</s>", 2), ("<s>", 0), add_prefix_space=False)
    return RobertaTokenizerFast(tokenizer_object=backend)


def run_qa_features(batch, tokenizer):
    """Windows with labels as run_qa makes them: padded, each label found token by token."""
    encoded = tokenizer([question.lstrip() for question in batch["question"]], batch["context"], truncation="only_second",
                        max_length=MAX_SEQ_LENGTH, stride=DOC_STRIDE, return_overflowing_tokens=True, return_offsets_mapping=True,
                        padding="max_length")
    source, mapping = encoded.pop("overflow_to_sample_mapping"), encoded.pop("offset_mapping")
    encoded["start_positions"], encoded["end_positions"] = [], []
    for i, offsets in enumerate(mapping):
        texts, answers = encoded.sequence_ids(i), batch["answers"][source[i]]
        start = end = encoded["input_ids"][i].index(tokenizer.cls_token_id)
        if answers["text"]:
            first, after = answers["answer_start"][0], answers["answer_start"][0] + len(answers["text"][0])
            low, high = texts.index(1), len(texts) - 1
            while texts[high] != 1:
                high -= 1
            if offsets[low][0] <= first and offsets[high][1] >= after:
                while low < len(offsets) and offsets[low][0] <= first:
                    low += 1
                while offsets[high][1] >= after:
                    high -= 1
                start, end = low - 1, high + 1
        encoded["start_positions"].append(start)
        encoded["end_positions"].append(end)
    return encoded


if __name__ == "__main__":
    main()
