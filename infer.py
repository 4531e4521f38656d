#!/usr/bin/env python3
"""Answer questions with a fine-tuned checkpoint, on Graphcore IPUs or on this host.

    python infer.py --checkpoint output/demo --question "What did Ada fear?" --context "Ada was a baker. She was afraid of geese."
    python infer.py --checkpoint output/demo --input_file questions.json --output_file answers.jsonl
    python infer.py --checkpoint output/demo      asks for a text and for questions about it
"""
import json
import os
import sys
from dataclasses import asdict, replace
from pathlib import Path

from ipu_options.config import inference_pipeline
from ipu_options.errors import RunError, UsageError, run_script
from ipu_options.popvision import Spans, profiling_environment
from qa.files import written_whole
from qa.settings import check_row_length, parse_infer


def main():
    s, ipu_config = parse_infer()
    profiling_environment(s.profile_dir, "inference", {**asdict(s), **ipu_config.to_dict()})
    context = read_text(s.context_file) if s.context_file else s.context
    from ipu_options import poptorch
    from qa.inference import InferencePipeline
    from qa.model import load_config, load_model, load_tokenizer
    from qa.windows import Windows, make_windows, windows_of_few

    print(f"PopTorch: {poptorch.__name__} {poptorch.__version__}", file=sys.stderr)
    config = load_config(s.checkpoint)
    check_row_length(s, config)
    pipeline = inference_pipeline(ipu_config, config.num_hidden_layers, s.pod_type)
    if not s.input_file:  # a question by itself: one replica, and no more rows than the pipeline has stages
        few = replace(pipeline.config, device_iterations=len(pipeline.layout.stages()), replication_factor=1)
        pipeline = replace(pipeline, config=few)
    tokenizer = load_tokenizer(s.tokenizer_name or s.checkpoint)
    answering = InferencePipeline(load_model(s.checkpoint, config), pipeline, s)

    def answer(examples):
        """An answer as printed for each example, in order."""
        one, cut = isinstance(examples, OneQuestion), dict(max_seq_length=s.max_seq_length, doc_stride=s.doc_stride, on_bad_row=s.on_bad_row)
        with spans("windows"):
            windows = windows_of_few(examples.columns, tokenizer, **cut) if one else Windows(
                make_windows(examples, tokenizer, labels=False, offsets=True, num_proc=s.preprocessing_num_workers, **cut))
        os.environ["TOKENIZERS_PARALLELISM"] = "false"  # without this it warns of every process started later
        with spans("answer"):
            for question, found in zip(examples["question"], answering.answers(windows, examples, progress=not one)):
                yield shown(found, question, s.n_best)

    with Spans("infer", s.trace, s.profile_dir is not None) as spans:
        if s.input_file:
            from qa.data import load_examples
            examples = load_examples(split="test", file=s.input_file, need_answers=False, on_bad_row=s.on_bad_row,
                                     version_2_with_negative=s.version_2_with_negative)
            print_answers(answer(examples), s)
        elif s.question is not None:
            print_answers(answer(OneQuestion(s.question, context)), s)
        else:
            converse(answer, context, s)


def shown(found, question, n_best):
    """The object printed for a question. start and end are character offsets into the context, end not included."""
    nbest = [{key: entry[key] for key in ("text", "probability", "start", "end")} for entry in found["nbest"][:n_best]]
    odds = {"null_odds": found["null_odds"]} if "null_odds" in found else {}
    return {"id": found["id"], "question": question, "answer": found["text"], "score": found["score"], "start": found["start"],
            "end": found["end"], "nbest": nbest, **odds}


class OneQuestion:
    """A data set of one example as far as answering needs it. `datasets` itself takes longer to import than the answer takes."""

    def __init__(self, question, context):
        self.columns = {"id": ["0"], "question": [question], "context": [context]}

    def __len__(self):
        return 1

    def __getitem__(self, key):
        """A column by its name; a slice of all columns."""
        return self.columns[key] if isinstance(key, str) else {name: column[key] for name, column in self.columns.items()}

    def select_columns(self, names):
        """This one example, whose columns are all at hand."""
        return self


def as_text(answer):
    """An answer for people: the best one on a line, the others of --n_best below it."""
    def line(text, score, start, end):
        return f"{text}   ({score:.3f}, characters {start}-{end})" if text else f"(no answer)   ({score:.3f})"

    lines = [line(answer["answer"], answer["score"], answer["start"], answer["end"])]
    if len(answer["nbest"]) > 1:
        lines += [f"  {i}. {line(entry['text'], entry['probability'], entry['start'], entry['end'])}" for i, entry in enumerate(answer["nbest"], 1)]
    return "\n".join(lines)


def print_answers(answers, s):
    """Print the answers, or write them to --output_file, which appears when it is complete."""
    if not s.output_file:
        for answer in answers:
            text = f"{answer['question']}\n  {as_text(answer)}" if s.input_file else as_text(answer)
            print(json.dumps(answer) if s.json else text, flush=True)
        return
    try:
        with written_whole(s.output_file) as file:
            count = sum(1 for answer in answers if file.write(json.dumps(answer) + "\n"))
    except OSError as error:
        raise RunError(f"--output_file {s.output_file}: cannot be written ({error.strerror})") from error
    print(f"{count} answers in {s.output_file}", file=sys.stderr)


def converse(answer, context, s):
    """Ask for a text, then for questions about it; an empty question asks for another text, the end of input ends it."""
    def ask(prompt):
        print(prompt, end="", file=sys.stderr, flush=True)
        return (sys.stdin.readline() or "\x04").rstrip("\n")

    while True:
        while not context:
            context = ask("text> ").strip()
            if context == "\x04":
                return
        question = ask("question> ").strip()
        if question == "\x04":
            print(file=sys.stderr)
            return
        if question:
            print_answers(answer(OneQuestion(question, context)), s)
        else:
            context = None


def read_text(path):
    """The text of a UTF-8 file."""
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"--context_file {path}: not readable as UTF-8 text ({error})") from error
    if not text.strip():
        raise UsageError(f"--context_file {path}: is empty; it should hold the text to look in")
    return text


if __name__ == "__main__":
    sys.exit(run_script(main))
