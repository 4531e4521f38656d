#!/usr/bin/env python3
"""Answer questions with a fine-tuned checkpoint, on Graphcore IPUs or on this host.

    python infer.py --checkpoint output/demo --question "What did Ada fear?" --context "Ada ..."
    python infer.py --checkpoint output/demo --input_file questions.json --output_file answers.jsonl
    python infer.py --checkpoint output/demo      asks for a text and for questions about it
"""
import json
import sys

from ipu_options.config import inference_pipeline
from ipu_options.errors import run_script
from ipu_options.files import writing, written_whole
from ipu_options.popvision import Spans, profiling_environment
from qa.settings import check_row_length, parse_infer


def main(argv=None):
    """Run the command line `argv`, by default the process's own; returns the exit status."""
    settings, ipu_config = parse_infer(argv)
    profiling_environment(settings, ipu_config, "inference")
    with Spans("infer", settings) as spans:
        answer = load_answerer(settings, ipu_config, spans)
        if settings.input_file:
            from qa.data.dataset import load_examples
            print_answers(settings, answer(load_examples(
                split="test", file=settings.input_file, need_answers=False,
                on_bad_row=settings.on_bad_row,
                version_2_with_negative=settings.version_2_with_negative)))
        elif settings.question is not None:
            print_answers(settings, answer(one_question(settings.question, settings.context)))
        else:
            converse(settings, answer)
    return 0


def load_answerer(settings, ipu_config, spans):
    """The checkpoint on the IPUs, as a function: a data set of questions -> their answers."""
    from ipu_options import poptorch
    from qa.answers.inference import InferencePipeline
    from qa.answers.printing import printed_answer
    from qa.data.windows import windows_for_answers
    from qa.model.pretrained import load_config, load_model, load_tokenizer

    print(f"PopTorch: {poptorch.__name__} {poptorch.__version__}", file=sys.stderr)
    source = "--checkpoint"
    model_config = load_config(settings.checkpoint, source=source)
    check_row_length(settings, model_config)
    pipeline = inference_pipeline(ipu_config, model_config.num_hidden_layers, settings.pod_type)
    if not settings.input_file:
        pipeline, settings.eval_micro_batch_size = pipeline.for_single_rows(), 1
    tokenizer = load_tokenizer(settings.tokenizer_name or settings.checkpoint, source=source)
    model = load_model(settings.checkpoint, model_config, source=source)
    answering = InferencePipeline(model, pipeline, settings)

    def answer(examples):
        """Give an answer as it is printed for each example, in order."""
        with spans("windows"):
            windows = windows_for_answers(settings, tokenizer, examples)
        with spans("answer"):
            found = answering.answers(windows, examples, progress=settings.input_file is not None)
            for question, answer in zip(examples["question"], found):
                yield printed_answer(question, answer, settings.n_best)

    return answer


def one_question(question, context):
    """A data set of one question."""
    from qa.data.windows import FewQuestions
    return FewQuestions({"id": ["0"], "question": [question], "context": [context]})


def print_answers(settings, answers):
    """Print the answers, or write them to --output_file, which appears when it is complete."""
    if settings.output_file:
        name = f"--output_file {settings.output_file}"
        with writing(name), written_whole(settings.output_file) as file:
            count = sum(1 for answer in answers if file.write(json.dumps(answer) + "\n"))
        print(f"{count} answers in {settings.output_file}", file=sys.stderr)
        return
    from qa.answers.printing import as_text
    for answer in answers:
        heading = f"{answer['question']}\n  " if settings.input_file else ""
        print(json.dumps(answer) if settings.json else heading + as_text(answer), flush=True)


def converse(settings, answer):
    """Ask for a text, then for questions about it, until the input ends.

    An empty question asks for another text.
    """
    context, question = settings.context, ""
    while context is not None and question is not None:
        if not context:
            context = ask("text> ")
            continue
        question = ask("question> ")
        if question:
            print_answers(settings, answer(one_question(question, context)))
        elif question == "":
            context = ""
    print(file=sys.stderr)


def ask(prompt):
    """A line of input without the white space around it, None at the end of the input."""
    print(prompt, end="", file=sys.stderr, flush=True)
    line = sys.stdin.readline()
    return line.strip() if line else None


if __name__ == "__main__":
    sys.exit(run_script(main))
