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

from ipu_options.popvision import PhaseTimer, profiling_environment
from qa.settings import parse_infer
from runtime import processes
from runtime.errors import UsageError, counted, run_script
from runtime.files import user_file, writing


def main(argv=None):
    """Run the command line `argv`, by default the process's own; returns the exit status."""
    settings, ipu_config = parse_infer(argv)
    processes.join(settings, ipu_config)
    profiling_environment(settings, ipu_config, "inference")
    from ipu_options.options import describe_poptorch
    from qa.answers.answerer import Answerer
    from runtime.signals import StopSignals
    with StopSignals(), PhaseTimer("infer", settings) as timer:
        print(describe_poptorch(settings), file=sys.stderr)
        answerer = Answerer(settings, ipu_config, timer)
        if settings.input_file:
            answer_file(settings, answerer)
        elif settings.question is not None:
            print_answers(settings, [answerer.ask(settings.question, settings.context)])
        elif settings.web:
            from qa.web.ask import serve_answers
            serve_answers(answerer)
        else:
            converse(settings, answerer)
    return 0


def answer_file(settings, answerer):
    """Answer the questions of --input_file, and evaluate the answers if it has the true ones."""
    from qa.answers.evaluation import as_text, metrics_of
    from qa.data.dataset import load_examples

    version_2, kept = settings.version_2_with_negative, []
    examples = processes.first_of_host_first(lambda: load_examples(
        split="test", file=settings.input_file, need_answers=None,  # the file may have them
        on_bad_row=settings.on_bad_row, version_2_with_negative=version_2))

    def keeping():
        for answer in answerer.answers(examples, progress=True):
            kept.append({"text": answer["answer"],
                         **{key: answer[key] for key in ("id", "null_odds")}})
            yield answer

    print_answers(settings, keeping())
    metrics = processes.on_first(metrics_of, examples, kept, version_2)
    if metrics:
        print(f"{counted(len(examples), 'question')}: {as_text(metrics)}", file=sys.stderr)


def print_answers(settings, answers):
    """Print the answers, or write them to --output_file; only the first process has any."""
    from qa.answers.printing import as_text
    if settings.output_file and processes.is_first():
        with writing(f"--output_file {settings.output_file}"), \
                user_file(settings.output_file) as file:
            count = 0
            for count, answer in enumerate(answers, 1):
                file.write(json.dumps(answer) + "\n")
        print(f"{counted(count, 'answer')} in {settings.output_file}", file=sys.stderr)
        return
    for answer in answers:
        heading = f"{answer['question']}\n  " if settings.input_file else ""
        print(json.dumps(answer) if settings.json else heading + as_text(answer), flush=True)


def converse(settings, answerer):
    """Ask for a text, ended by an empty line, then for questions; none asks for another text."""
    from qa.answers.printing import Console
    if sys.stdin is None:
        raise UsageError("standard input is closed: give --question, or --input_file")
    console, context = Console(), settings.context
    with suppress(EOFError):
        while True:
            while not context:
                context = console.paragraph("text, ended by an empty line> ")
            question = console.line("question> ")
            if question:
                print_answers(settings, [answerer.ask(question, context)])
            else:
                context = None
    print(file=sys.stderr)


if __name__ == "__main__":
    sys.exit(run_script(processes.together(main)))
