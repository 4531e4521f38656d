#!/usr/bin/env python3
"""Answer questions with a fine-tuned checkpoint, on Graphcore IPUs or on this host.

    python infer.py --checkpoint output/demo --question "What did Ada fear?" --context "Ada ..."
    python infer.py --checkpoint output/demo --input_file questions.json --output_file answers.jsonl
    python infer.py --checkpoint output/demo      asks for a text and for questions about it
    python infer.py --checkpoint output/demo --web      does so on a page, and answers programs
"""
import json
import sys
from contextlib import suppress

from ipu_options.config import inference_pipeline
from ipu_options.popvision import PhaseTimer, profiling_environment
from qa.settings import parse_infer
from runtime import processes
from runtime.errors import UsageError, run_script
from runtime.files import user_file, writing


def main(argv=None):
    """Run the command line `argv`, by default the process's own; returns the exit status."""
    settings, ipu_config = parse_infer(argv)
    processes.join(settings, ipu_config)
    profiling_environment(settings, ipu_config, "inference")
    from qa.data.windows import one_question
    from runtime.signals import StopSignals
    with StopSignals(), PhaseTimer("infer", settings) as timer:
        answer = load_answerer(settings, ipu_config, timer)
        if settings.input_file:
            answer_file(settings, answer)
        elif settings.question is not None:
            print_answers(settings, answer(one_question(settings.question, settings.context)))
        elif settings.web:
            from qa.web.ask import serve_answers
            serve_answers(settings, answer)
        else:
            converse(settings, answer)
    return 0


def load_answerer(settings, ipu_config, timer):
    """The checkpoint on the IPUs, as a function: a data set of questions -> their answers."""
    from ipu_options.options import describe_poptorch
    from qa.answers.inference import InferencePipeline
    from qa.answers.printing import printed_answer
    from qa.data.windows import windows_for_answers
    from qa.model.pretrained import load_config, load_model, load_tokenizer

    print(describe_poptorch(settings), file=sys.stderr)
    model_config = load_config(settings)
    pipeline = inference_pipeline(ipu_config, model_config.num_hidden_layers, settings.pod_type,
                                  single_rows=not settings.input_file)
    tokenizer = load_tokenizer(settings, model_config)
    answering = InferencePipeline(load_model(settings, model_config), pipeline, settings)

    def answer(examples):
        """Give an answer as it is printed for each example, in order."""
        with timer("windows"):
            windows = windows_for_answers(settings, tokenizer, examples)
        with timer("answer"):  # and what the caller does between two answers
            found = answering.answers(windows, examples, progress=settings.input_file is not None)
            for question, each in zip(examples["question"], found):
                yield printed_answer(question, each, settings.n_best)

    return answer


def answer_file(settings, answer):
    """Answer the questions of --input_file, and evaluate the answers if it has the true ones."""
    from qa.answers.evaluation import as_text, metrics_of, prediction_of
    from qa.data.dataset import load_examples

    version_2, predictions = settings.version_2_with_negative, []
    examples = processes.first_of_host_first(lambda: load_examples(
        split="test", file=settings.input_file, need_answers=None,  # the file may have them
        on_bad_row=settings.on_bad_row, version_2_with_negative=version_2))

    def noting_predictions():
        for printed in answer(examples):
            predictions.append(prediction_of({**printed, "text": printed["answer"]}))
            yield printed

    print_answers(settings, noting_predictions())
    metrics = processes.on_first(metrics_of, examples, predictions, version_2)
    if metrics:
        print(f"{len(examples)} questions: {as_text(metrics)}", file=sys.stderr)


def print_answers(settings, answers):
    """Print the answers, or write them to --output_file; only the first process has any."""
    from qa.answers.printing import as_text
    if settings.output_file and processes.is_first():
        with writing(f"--output_file {settings.output_file}"), \
                user_file(settings.output_file) as file:
            count = 0
            for count, answer in enumerate(answers, 1):
                file.write(json.dumps(answer) + "\n")
        print(f"{count} answers in {settings.output_file}", file=sys.stderr)
        return
    for answer in answers:
        heading = f"{answer['question']}\n  " if settings.input_file else ""
        print(json.dumps(answer) if settings.json else heading + as_text(answer), flush=True)


def converse(settings, answer):
    """Ask for a text, ended by an empty line, then for questions; none asks for another text."""
    from qa.answers.printing import Console
    from qa.data.windows import one_question
    if sys.stdin is None:
        raise UsageError("standard input is closed: give --question, or --input_file")
    console, context = Console(), settings.context
    with suppress(EOFError):
        while True:
            while not context:
                context = console.paragraph("text, ended by an empty line> ")
            question = console.line("question> ")
            if question:
                print_answers(settings, answer(one_question(question, context)))
            else:
                context = None
    print(file=sys.stderr)


if __name__ == "__main__":
    sys.exit(run_script(processes.together(main)))
