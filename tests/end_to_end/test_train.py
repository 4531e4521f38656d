"""train.py and infer.py from end to end, on a small part of the demo's data."""
import csv
import json
import operator
import re
import shutil
import signal
import sys

import datasets
import pytest
import torch
from safetensors.torch import load_file
from safetensors.torch import save as serialize
from transformers import AutoModelForQuestionAnswering, AutoTokenizer

import infer
import train
from ipu_options import poptorch
from qa.run.log import read_log
from runtime.errors import run_script
from tests.reference.small_demo import write_small_demo
from tests.run.test_checkpoint import forge
from tests.tools.families import FAMILIES, losses_of, texts_of, write_model
from tests.tools.kill_and_resume import differences

SMALL = [
    "--layers_per_ipu", "1", "1", "1", "1", "--max_seq_length", "128", "--doc_stride", "32",
    "--micro_batch_size", "4", "--eval_micro_batch_size", "4", "--gradient_accumulation_steps", "7",
    "--learning_rate", "1e-3", "--precision", "float32", "--loss_scaling", "1", "--logging_steps",
    "2", "--show_predictions", "2"]


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    folder = tmp_path_factory.mktemp("demo")
    for kind in ("v1", "v2"):
        write_small_demo(folder / kind, train=40, validation=12,
                         version_2_with_negative=kind == "v2")
    return folder


def run(script, *arguments):
    """Run a script in this process; returns the exit status of `python SCRIPT ARGUMENTS`."""
    before, sys.argv = sys.argv, ["script", *map(str, arguments)]
    try:
        return run_script(script.main)
    finally:
        sys.argv = before


def fit(folder, out, *more, train_file="train.json"):
    return run(train, *SMALL, "--model_name_or_path", folder / "model", "--train_file",
               folder / train_file, "--validation_file", folder / "validation.json", "--output_dir",
               out, *more)


def flat(path):
    return [
        {"id": qa["id"], "context": paragraph["context"], "question": qa["question"],
         "answers": {"text": [answer["text"] for answer in qa["answers"]],
                     "answer_start": [answer["answer_start"] for answer in qa["answers"]]}}
        for article in json.loads(path.read_text(encoding="utf-8"))["data"]
        for paragraph in article["paragraphs"] for qa in paragraph["qas"]]


@pytest.mark.slow
def test_every_format_trains_the_same_model_and_the_files_are_run_qas(demo, tmp_path, capsys):
    rows = flat(demo / "v1" / "train.json")
    (demo / "v1" / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows),
                                             encoding="utf-8")
    with open(demo / "v1" / "train.csv", "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows({**row, "answers": json.dumps(row["answers"])} for row in rows)
    datasets.Dataset.from_list(rows).to_parquet(str(demo / "v1" / "train.parquet"))
    weights = []
    for name in ("train.json", "train.jsonl", "train.csv", "train.parquet"):
        out = tmp_path / name
        assert fit(demo / "v1", out, "--max_steps", "2", "--show_examples", "1",
                   train_file=name) == 0, capsys.readouterr().err
        weights.append((out / "model.safetensors").read_bytes())
    assert all(one == weights[0] for one in weights)

    printed = capsys.readouterr().out
    assert ("Encoder 3   -> IPU 3" in printed and "predicted:" in printed
            and "step 2/2" in printed and "context:" in printed)
    questions = flat(demo / "v1" / "validation.json")
    predictions = json.loads((out / "predictions.json").read_text())
    nbest = json.loads((out / "nbest_predictions.json").read_text())
    metrics = json.loads((out / "metrics.json").read_text())
    assert list(predictions) == list(nbest) == [question["id"] for question in questions]
    for name, entries in nbest.items():
        assert set(entries[0]) == {"text", "probability", "start_logit", "end_logit"
                                   } and len(entries) <= 20
        assert entries[0]["text"] == predictions[name]
    assert 0 <= metrics["exact_match"] <= metrics["f1"] <= 100
    assert json.loads((out / "ipu_config.json").read_text())["layers_per_ipu"] == [1, 1, 1, 1]
    record = json.loads((out / "run.json").read_text())
    assert record["settings"]["seed"] == 42 and torch.__version__.startswith(
        record["versions"]["torch"]) and record["data_fingerprint"]


def best_span(folder, question):
    """The best answer by transformers' own model and tokenizer: (first character, end)."""
    model, tokenizer = (AutoModelForQuestionAnswering.from_pretrained(folder).float().eval(),
                        AutoTokenizer.from_pretrained(folder))
    encoded = tokenizer(question["question"], question["context"], return_tensors="pt",
                        return_offsets_mapping=True)
    offsets, sequence = encoded.pop("offset_mapping")[0], encoded.sequence_ids(0)
    with torch.no_grad():
        logits = model(**encoded)
    context = [i for i, which in enumerate(sequence) if which == 1]
    scores = {(s, e): float(logits.start_logits[0, s] + logits.end_logits[0, e])
              for s in context for e in context if s <= e < s + 30}
    first, last = max(scores, key=scores.get)
    return int(offsets[first][0]), int(offsets[last][1])


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_each_family_learns_packed_and_answers_as_transformers_does(demo, tmp_path, capsys, family):
    data, out = demo / "v1", tmp_path / "out"
    write_model(tmp_path / "model", family, texts_of(data / "train.json"))
    assert run(train, *SMALL, "--model_name_or_path", tmp_path / "model", "--train_file",
               data / "train.json", "--validation_file", data / "validation.json", "--output_dir",
               out, "--pack", "--num_train_epochs", "6", "--learning_rate", "3e-3") == 0
    losses = losses_of(capsys.readouterr().out)
    assert losses[-1] < 0.7 * losses[0]
    for question in flat(data / "validation.json")[:2]:
        assert run(infer, "--checkpoint", out, "--question", question["question"], "--context",
                   question["context"], "--json") == 0
        answer = json.loads(capsys.readouterr().out)
        assert (answer["start"], answer["end"]) == best_span(out, question)


@pytest.mark.slow
def test_a_float16_model_loads_with_transformers_and_answers_as_infer_does(demo, tmp_path, capsys):
    out = tmp_path / "out"
    assert fit(demo / "v1", out, "--num_train_epochs", "2", "--precision", "float16",
               "--loss_scaling", "64", "--pack") == 0
    capsys.readouterr()
    question = flat(demo / "v1" / "validation.json")[0]
    assert run(infer, "--checkpoint", out, "--question", question["question"], "--context",
               question["context"], "--json", "--n_best", "3", "--precision", "float32") == 0
    answer = json.loads(capsys.readouterr().out)
    assert (answer["start"], answer["end"]) == best_span(out, question)
    assert answer["answer"] == question["context"][answer["start"]:answer["end"]] and len(
        answer["nbest"]) == 3
    assert set(answer) == {"id", "question", "answer", "confidence", "score",
                           "start", "end", "nbest", "null_odds"}

    # For a file of these questions without answers, infer.py gives what the evaluation predicted.
    predictions = json.loads((out / "predictions.json").read_text())
    (tmp_path / "questions.jsonl").write_text("".join(
        json.dumps({key: row[key] for key in ("id", "context", "question")}) + "\n"
        for row in flat(demo / "v1" / "validation.json")))
    assert run(infer, "--checkpoint", out, "--input_file", tmp_path / "questions.jsonl",
               "--output_file", tmp_path / "answers.jsonl", "--eval_micro_batch_size", "4") == 0
    answers = [json.loads(line) for line in (tmp_path / "answers.jsonl").read_text().splitlines()]
    assert {answer["id"]: answer["answer"] for answer in answers} == predictions

    # Trained on, no update is rounded away: neither in the file that it starts from nor in its own.
    assert fit(demo / "v1", tmp_path / "more", "--max_steps", "2", "--precision", "float16",
               "--learning_rate", "1e-6", "--warmup_steps", "0", "--model_name_or_path", out) == 0
    before, after = (load_file(folder / "model.safetensors") for folder in (
        out, tmp_path / "more"))
    assert {weight.dtype for weight in [*before.values(), *after.values()]} == {torch.float32}
    moved = sum((after[name] != weight).sum() for name, weight in before.items())
    assert moved > 0.99 * sum(weight.numel() for weight in before.values())


@pytest.mark.slow
def test_version_2_has_no_answer_figures(demo, tmp_path, capsys):
    out = tmp_path / "out"
    assert fit(demo / "v2", out, "--max_steps", "2", "--version_2_with_negative",
               "--null_score_diff_threshold", "-1000") == 0
    questions = flat(demo / "v2" / "validation.json")
    unanswerable = sum(not question["answers"]["text"] for question in questions)
    metrics = json.loads((out / "metrics.json").read_text())
    assert 0 < unanswerable < len(questions)
    # With this threshold every prediction is "no answer", which only unanswerable questions want.
    assert set(json.loads((out / "predictions.json").read_text()).values()) == {""}
    assert metrics["NoAns_exact"] == 100 and metrics["HasAns_exact"] == 0 and metrics[
        "NoAns_total"] == unanswerable
    assert metrics["exact_match"] == pytest.approx(100 * unanswerable / len(questions))
    assert set(json.loads((out / "null_odds.json").read_text())) == {
        question["id"] for question in questions}


@pytest.mark.slow
def test_a_resumed_run_ends_as_one_never_stopped(demo, tmp_path, capsys):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    # 4 steps reach into the second epoch.
    more = ("--max_steps", "4", "--save_steps", "2", "--pack", "--precision", "float16")
    assert fit(demo / "v1", whole, *more) == 0
    assert fit(demo / "v1", parts, *more) == 0
    (parts / "model.safetensors").unlink()
    # Existing checkpoints are neither resumed from nor overwritten unless a flag says so.
    assert fit(demo / "v1", parts, *more) == 2
    assert "--resume_from_checkpoint auto" in capsys.readouterr().err
    # "auto" is checkpoint-4, after which only the evaluation is left.
    for where in (parts / "checkpoint-2", "auto"):
        assert fit(demo / "v1", parts, *more, "--resume_from_checkpoint", where) == 0
        for name in ("model.safetensors", "nbest_predictions.json", "metrics.json"):
            assert (parts / name).read_bytes() == (whole / name).read_bytes(), name
            (parts / name).unlink()
    assert fit(demo / "v1", parts, *more, "--seed", "7", "--resume_from_checkpoint", "auto") == 2
    assert "seed was 42, is 7" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("pack", [["--pack"], []], ids=["packed", "unpacked"])
def test_the_same_seed_gives_the_same_bits_with_any_number_of_workers(demo, tmp_path, pack):
    """Compared are weights, optimizer, random states, losses and predictions.

    The runs share a process, so that state which one run leaves behind would change the next.
    """
    more = ("--max_steps", "3", "--save_steps", "3", "--precision", "float16", *pack)
    for workers in ("0", "2"):
        assert fit(demo / "v1", tmp_path / workers, *more, "--dataloader_num_workers", workers) == 0
    assert differences(tmp_path / "0", tmp_path / "2") == []
    assert fit(demo / "v1", tmp_path / "other", *more, "--seed", "43") == 0
    assert "model.safetensors" in differences(tmp_path / "0", tmp_path / "other")


@pytest.mark.slow
def test_device_iterations_change_the_speed_and_not_the_result(demo, tmp_path):
    """Four epochs of two updates, the second of fewer windows; a call of 4 updates is 2 epochs."""
    losses = {}
    for updates in (1, 2, 4):
        out = tmp_path / str(updates)
        assert fit(demo / "v1", out, "--max_steps", str(8 // updates), "--device_iterations",
                   str(updates), "--lr_scheduler_type", "constant", "--logging_steps", "1",
                   "--max_train_samples", "40") == 0
        losses[updates] = [line["loss"] for line in read_log(out / "log.jsonl")
                           if line["event"] == "log"]
        assert (out / "model.safetensors").read_bytes() == (
            tmp_path / "1" / "model.safetensors").read_bytes()
        windows = [28, 12] * (updates // 2) if updates > 1 else [1]
        assert losses[updates] == pytest.approx([
            sum(map(operator.mul, windows, losses[1][first:first + updates])) / sum(windows)
            for first in range(0, 8, updates)])


def spoil_backward(folder):
    """Change a checkpoint's weights so that only the backward pass overflows.

    Between the two matrices of the first layer's feed-forward part the hidden values become tiny.
    Their gradients become huge, since the loss is made steep as well.
    """
    weights = load_file(folder / "model.safetensors")
    for kind in ("weight", "bias"):
        weights[f"roberta.encoder.layer.0.intermediate.dense.{kind}"] *= 1e-34
    weights["roberta.encoder.layer.0.output.dense.weight"] *= 1e36
    weights["qa_outputs.weight"] *= 1e8
    forge(folder, "model.safetensors", serialize(weights, {"format": "pt"}))


@pytest.mark.slow
def test_a_gradient_that_is_not_finite_is_seen_in_its_own_step(demo, tmp_path, capsys):
    healthy, more = tmp_path / "out", ("--max_steps", "3", "--save_steps", "1")
    assert fit(demo / "v1", healthy, *more) == 0
    spoilt = shutil.copytree(healthy / "checkpoint-2", tmp_path / "checkpoint-2")
    spoil_backward(spoilt)
    assert fit(demo / "v1", healthy, *more, "--resume_from_checkpoint", spoilt) == 1
    (error,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert re.match(
        r"error: step 3: the gradient of roberta\.embeddings\.LayerNorm\.bias is not finite "
        r"\(the loss was \d", error), error
    assert ("learning rate 0.0" in error and "loss scaling 1," in error
            and "try --learning_rate" in error)

    # With --on_nonfinite skip the run goes on from where it started, and not from the later
    # checkpoint-3 of the healthy run, which is in its folder. If gradients are not watched, the
    # updated weights are found not to be finite.
    assert fit(demo / "v1", healthy, *more, "--resume_from_checkpoint", spoilt, "--on_nonfinite",
               "skip") == 0
    assert "not finite" in (
        said := capsys.readouterr().out) and "going on from the weights of step 2" in said
    ended, started = (load_file(folder / "model.safetensors") for folder in (healthy, spoilt))
    assert all(torch.equal(ended[name], started[name]) for name in started)
    assert fit(demo / "v1", healthy, *more, "--resume_from_checkpoint", spoilt, "--watch_gradients",
               "false") == 1
    assert re.search(r"error: step 3: roberta\.\S+ is not finite after the update",
                     capsys.readouterr().err)


@pytest.mark.slow
def test_models_are_compiled_before_the_training_and_signals_end_that(demo, tmp_path, monkeypatch):
    compiled, compile_ = [], poptorch.PoplarExecutor.compile

    def compile_noting(self, *args, **kwargs):
        assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL  # PopTorch runs no handler then
        compiled.append("training" if self._training else "inference")
        compile_(self, *args, **kwargs)

    monkeypatch.setattr(poptorch.PoplarExecutor, "compile", compile_noting)
    out = tmp_path / "out"
    assert fit(demo / "v1", out, "--max_steps", "2") == 0
    assert compiled == ["inference", "training"]  # what does not fit is found before the training
    del compiled[:]
    assert run(infer, "--checkpoint", out, "--question", "Who?", "--context", "Ada.") == 0
    assert fit(demo / "v1", tmp_path / "scores", "--do_eval", "--model_name_or_path", out) == 0
    assert compiled == ["inference", "inference"]


@pytest.mark.slow
def test_an_ipus_run_saves_before_it_gives_the_ipus_up(demo, tmp_path, monkeypatch):
    """For an evaluation; others may take the IPUs meanwhile."""
    monkeypatch.setattr("ipu_options.device", "IPU")
    flags = ("--max_steps", "3", "--eval_steps", "2")
    assert fit(demo / "v1", tmp_path / "out", *flags) == 0
    events = [(line["event"], line["step"]) for line in read_log(tmp_path / "out" / "log.jsonl")]
    assert [event for event in events if event[0] in ("saved", "evaluation")] == [
        ("saved", 2), ("evaluation", 2), ("evaluation", 3)]


@pytest.mark.slow
def test_a_run_on_synthetic_data_is_timed_and_reads_and_saves_nothing(demo, tmp_path, capsys):
    assert fit(demo / "v1", tmp_path / "out", "--synthetic_data", "--max_steps", "4",
               "--save_steps", "1", "--evaluate_every_epoch", "--logging_steps", "2") == 0
    said = capsys.readouterr().out
    assert "timed on synthetic data: 4 steps; nothing was saved" in said
    assert len(re.findall(r"windows/s [\d.]+", said)) == 2 and "loss" not in said
    assert "saved to" not in said and "evaluation" not in said
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        ".lock", "synthetic_log.jsonl"]
    started, *points = read_log(tmp_path / "out" / "synthetic_log.jsonl")
    assert started["device"] == "host" and [point["step"] for point in points] == [2, 4]
    assert all("loss" not in point and point["windows_per_second"] > 0 for point in points)


@pytest.mark.slow
def test_a_log_continues_over_a_resume_and_tensorboard_reads_the_same(demo, tmp_path, capsys):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    out = tmp_path / "out"
    flags = ["--max_steps", "6", "--save_steps", "2", "--save_total_limit", "9",
             "--report_to", "tensorboard"]
    assert fit(demo / "v1", out, *flags) == 0
    first = read_log(out / "log.jsonl")
    assert fit(demo / "v1", out, *flags, "--resume_from_checkpoint", out / "checkpoint-2") == 0
    lines = read_log(out / "log.jsonl")
    assert [(line["event"], line["step"]) for line in lines] == [
        ("started", 0), ("log", 2), ("saved", 2), ("resumed", 2), ("log", 4), ("saved", 4),
        ("log", 6), ("saved", 6), ("trained", 6), ("evaluation", 6)]
    points, again = ([line for line in log if line["event"] == "log"] for log in (first, lines))
    for point, other in zip(points, again):
        assert {key: point[key] for key in ("loss", "learning_rate", "epoch")} == {
            key: other[key] for key in ("loss", "learning_rate", "epoch")}
        assert sum(other[f"{part}_share"] for part in ("data", "step", "rest")) == pytest.approx(1)
    metrics = json.loads((out / "metrics.json").read_text())
    assert lines[-1]["f1"] == metrics["f1"] and lines[-1]["questions"] == "validation"
    assert (out / "training.png").read_bytes().startswith(b"\x89PNG")

    board = EventAccumulator(str(out / "runs"))
    board.Reload()
    for name in ("loss", "learning_rate", "windows_per_second"):
        read = {event.step: event.value for event in board.Scalars(f"train/{name}")}
        assert read == pytest.approx({point["step"]: point[name] for point in again})
    assert [event.value for event in board.Scalars("eval/f1")] == pytest.approx([metrics["f1"]])


@pytest.mark.slow
def test_compile_only_runs_nothing(demo, tmp_path, capsys):
    assert fit(demo / "v1", tmp_path / "out", "--compile_only") == 0
    assert re.search(r"compiled in .* s, executable cache: \S+; nothing was run",
                     capsys.readouterr().out)
    assert not (tmp_path / "out").exists()


def test_out_of_reach_the_hub_ends_in_one_line_that_names_the_ways_out(
        tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    assert run(train, "--output_dir", tmp_path / "out") == 1
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith(
        "error: ") and "roberta-base" in error and "--config demo" in error and "local" in error
