"""What a user loses, or gets wrong in silence, if a script is careless: files, signals, readers."""
from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import infer
import train
from qa.data.demo import write_demo
from runtime.errors import run_script
from tests.end_to_end.test_train import SMALL, flat, run
from tests.reference.small_demo import write_small_demo

pytestmark = pytest.mark.slow
ROOT = Path(__file__).resolve().parents[2]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    """The demo's model and a hundred of its questions."""
    folder = tmp_path_factory.mktemp("demo")
    write_small_demo(folder, train=20, validation=5)
    return folder


@pytest.fixture(scope="module")
def trained(demo, tmp_path_factory):
    """A folder with a finished model."""
    folder = tmp_path_factory.mktemp("trained") / "out"
    assert fit(demo, folder) == 0
    return folder


def flags(demo, out, *more):
    return [*SMALL, "--model_name_or_path", str(demo / "model"), "--train_file",
            str(demo / "train.json"), "--validation_file", str(demo / "validation.json"),
            "--output_dir", str(out), "--max_steps", "2", *map(str, more)]


def fit(demo, out, *more):
    return run(train, *flags(demo, out, *more))


def start(script, *arguments, **options):
    """A script in a process group of its own."""
    return subprocess.Popen([sys.executable, str(ROOT / script), *map(str, arguments)],
                            env={**ENVIRONMENT, **options.pop("env", {})}, stdout=subprocess.PIPE,
                            stderr=subprocess.STDOUT, text=True, start_new_session=True, **options)


def living(group):
    """The processes of a group that have not ended 20 s after its first one has."""
    until = time.monotonic() + 20
    while (found := _alive(group)) and time.monotonic() < until:
        pass
    return found


def _alive(group):
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = path.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[2]) == group and fields[0] not in "ZX":
            found.append(int(path.parent.name))
    return found


# ---- Files


def test_a_finished_model_is_replaced_only_when_told(demo, trained, capsys):
    before = (trained / "model.safetensors").read_bytes()
    for more in ((), ("--seed", "7"), ("--resume_from_checkpoint", "auto")):
        assert fit(demo, trained, *more) == 2
        assert "holds a finished model; replace it with --overwrite_output_dir" in (
            capsys.readouterr().err)
    assert (trained / "model.safetensors").read_bytes() == before
    assert fit(demo, trained, "--overwrite_output_dir", "--seed", "7") == 0
    assert (trained / "model.safetensors").read_bytes() != before


@pytest.mark.parametrize("name", ["q.jsonl", "model.safetensors", "config.json"])
def test_no_output_goes_over_an_input_or_a_checkpoint(demo, trained, tmp_path, capsys, name):
    questions = tmp_path / "q.jsonl"
    questions.write_text("".join(json.dumps(row) + "\n" for row in flat(demo / "validation.json")))
    file = questions if name == questions.name else trained / name
    before = file.read_bytes()
    for flag in ("--output_file", "--trace"):
        assert run(infer, "--checkpoint", trained, "--input_file", questions, flag, file) == 2
        assert f"{flag} {file}" in (said := capsys.readouterr().err) and "name another" in said
    assert fit(demo, tmp_path / "out", "--trace", demo / "train.json") == 2
    assert file.read_bytes() == before


def test_devices_pipes_and_links_are_written_to_and_stay(demo, trained, tmp_path):
    questions = demo / "validation.json"
    fifo, link, goal = tmp_path / "fifo", tmp_path / "link", tmp_path / "goal"
    os.mkfifo(fifo)
    link.symlink_to(goal)
    reader = subprocess.Popen(["cat", str(fifo)], stdout=subprocess.PIPE, text=True)
    ask = ("--checkpoint", trained, "--input_file", questions, "--output_file")
    assert run(infer, *ask, fifo) == 0 and run(infer, *ask, link) == 0
    assert reader.communicate()[0] == goal.read_text() and goal.read_text().count("\n") == 20
    assert fifo.is_fifo() and link.is_symlink()
    with open(tmp_path / "out", "w") as out:
        subprocess.run([sys.executable, "infer.py", *map(str, ask), "/dev/stdout"], cwd=ROOT,
                       stdout=out, env=ENVIRONMENT, check=True)
    assert (tmp_path / "out").read_text() == goal.read_text()
    assert run(infer, *ask, "/dev/null") == 0 and Path("/dev/null").is_char_device()


def test_figures_are_printed_before_they_are_written(demo, tmp_path, capsys):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "metrics.json").mkdir()  # nothing can be renamed over a folder
    assert fit(demo, tmp_path / "out") == 1
    said = capsys.readouterr()
    assert "evaluation at step 2: exact_match" in said.out
    assert "error: --output_dir" in said.err and (tmp_path / "out" / "model.safetensors").exists()


# ---- Signals and readers


@pytest.fixture(scope="module")
def many(tmp_path_factory):
    """Questions enough for windows to take seconds, and a model."""
    folder = tmp_path_factory.mktemp("many")
    write_demo(folder, seed=6)
    paragraphs = json.loads((folder / "train.json").read_text())["data"][0]["paragraphs"]
    with open(folder / "train.jsonl", "w") as file:
        for copy in range(20):  # every context is another one: none is found in a cache
            for paragraph in paragraphs:
                for qa in paragraph["qas"][:1]:
                    file.write(json.dumps({**qa, "id": f"{copy} {qa['id']}", "context":
                                           f"{paragraph['context']} {copy}"}) + "\n")
    return folder


@pytest.mark.parametrize("numbers, status", [
    ((signal.SIGTERM,), 143), ((signal.SIGINT,), 130), ((signal.SIGHUP,), 129),
    ((signal.SIGTERM, signal.SIGTERM), None), ((signal.SIGKILL,), -signal.SIGKILL)])
def test_a_signal_while_windows_are_made_leaves_no_process_and_no_litter(many, tmp_path, numbers,
                                                                         status):
    given = ["--model_name_or_path", many / "model", "--train_file", many / "train.jsonl",
             "--validation_file", many / "validation.json", "--output_dir", tmp_path / "out",
             "--preprocessing_num_workers", "2", "--max_steps", "1", *SMALL]
    env = {"HF_DATASETS_CACHE": str(tmp_path / "cache")}
    process = start("train.py", *given, env=env)
    while not any(tmp_path.glob("cache/*/.windows-*.tmp/*")):
        assert process.poll() is None, process.stdout.read()
    for number in numbers:
        process.send_signal(number)
    said, found = process.communicate()[0], process.returncode
    assert found == status or status is None and found in (143, -signal.SIGTERM), said
    killed = status is None or status < 0
    assert (killed or "Traceback" not in said) and not living(process.pid)
    assert not (tmp_path / "out" / "checkpoint-0").exists()
    if not killed:
        assert not any(tmp_path.glob("cache/*/.*"))
    else:  # what could not be cleared away then is cleared away by the next run
        done = start("train.py", *given, env=env)
        said = done.communicate()[0]
        assert done.returncode == 0, said
        assert not any(tmp_path.glob("cache/*/.*"))


def test_a_signal_in_the_final_evaluation_ends_it_with_its_status(demo, tmp_path):
    process = start("train.py", *flags(demo, tmp_path / "out"), "--eval_micro_batch_size", "1",
                    "--num_train_epochs", "1")
    while not (line := process.stdout.readline()).startswith("training: steps"):
        assert line, "the run ended before its evaluation"
    process.send_signal(signal.SIGTERM)
    said = process.communicate()[0]
    assert process.returncode == 143 and "SIGTERM: stopping" in said and not living(process.pid)
    assert (tmp_path / "out" / "model.safetensors").exists()
    assert not any((tmp_path / "out").glob(".*.tmp"))


def test_a_closed_terminal_saves_the_run(demo, tmp_path):
    more = ("--max_steps", "100000", "--num_train_epochs", "9999")
    process = start("train.py", *flags(demo, tmp_path / "out"), *more)
    while not process.stdout.readline().startswith("step 2/"):
        assert process.poll() is None
    os.killpg(process.pid, signal.SIGHUP)
    assert "stopped by SIGHUP after step" in (said := process.communicate()[0]), said
    assert process.returncode == 129 and any((tmp_path / "out").glob("checkpoint-*"))


def test_a_run_whose_folder_was_moved_away_says_that_its_state_is_not_saved(demo, tmp_path):
    more = ("--max_steps", "100000", "--num_train_epochs", "9999")
    process = start("train.py", *flags(demo, tmp_path / "out"), *more)
    while not process.stdout.readline().startswith("step 2/"):
        assert process.poll() is None
    (tmp_path / "out").rename(tmp_path / "elsewhere")
    process.send_signal(signal.SIGTERM)
    *_, said = process.communicate()[0].splitlines()
    assert process.returncode == 1 and re.match(
        "error: stopped by SIGTERM after step [0-9]+, whose state is not saved: could not save .*"
        "No such file or directory; there is no checkpoint in ", said), said


def test_infer_leaves_no_temporary_file_behind(demo, trained, tmp_path):
    rows = flat(demo / "validation.json") * 200
    (tmp_path / "q.jsonl").write_text("".join(
        json.dumps({**row, "id": str(number)}) + "\n" for number, row in enumerate(rows)))
    process = start("infer.py", "--checkpoint", trained, "--input_file", tmp_path / "q.jsonl",
                    "--output_file", tmp_path / "answers.jsonl")
    while not any(tmp_path.glob(".answers*")):
        assert process.poll() is None
    process.send_signal(signal.SIGTERM)
    said = process.communicate()[0]
    assert process.returncode == 143, said
    assert [path.name for path in tmp_path.iterdir()] == ["q.jsonl"]


def test_a_reader_that_goes_away_ends_no_training(demo, tmp_path):
    command = [sys.executable, "train.py", *flags(demo, tmp_path / "out")]
    process = subprocess.Popen(command, cwd=ROOT, env=ENVIRONMENT, stdout=subprocess.PIPE,
                               stderr=subprocess.PIPE, text=True)
    assert process.stdout.readline().startswith("PopTorch: ")
    process.stdout.close()
    said = process.stderr.read()
    assert process.wait() == 0 and "error" not in said, said
    assert (tmp_path / "out" / "metrics.json").exists()


# ---- Wrong in silence


def test_a_checkpoint_that_is_damaged_or_has_no_head_is_named(demo, trained, tmp_path, capsys):
    weights = load_file(trained / "model.safetensors")
    for path in trained.iterdir():
        if path.is_file() and path.name not in ("model.safetensors", ".lock"):
            (tmp_path / path.name).write_bytes(path.read_bytes())
    ask = ("--checkpoint", tmp_path, "--question", "Who?", "--context", "Ada was a baker.")
    headless = {name: tensor for name, tensor in weights.items() if "qa_outputs" not in name}
    save_file(headless, tmp_path / "model.safetensors", {"format": "pt"})
    assert run(infer, *ask) == 0
    assert "has no trained head for question answering" in capsys.readouterr().err
    name = "roberta.encoder.layer.1.output.dense.weight"
    weights[name][0, 0] = torch.nan
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    for script in (lambda: run(infer, *ask),
                   lambda: fit(demo, tmp_path / "out", "--model_name_or_path", tmp_path)):
        assert script() == 1
        (error,) = [line for line in capsys.readouterr().err.splitlines() if "error: " in line]
        assert f"{name} is not finite; the checkpoint is damaged" in error


@pytest.mark.parametrize("factor", ["1", "3"])
def test_a_tokenizer_that_is_larger_than_the_model_is_refused(demo, tmp_path, capsys, factor):
    from transformers import AutoTokenizer
    tokenizer = AutoTokenizer.from_pretrained(demo / "model")
    tokenizer.add_tokens([f"token{number}" for number in range(2000 - len(tokenizer) + 1)])
    tokenizer.save_pretrained(tmp_path / "larger")
    assert fit(demo, tmp_path / "out", "--tokenizer_name", tmp_path / "larger",
               "--embedding_serialization_factor", factor) == 2
    assert "has ids up to 2000, and the model embeddings for 2000" in capsys.readouterr().err


def test_what_a_larger_pod_trained_answers_on_a_smaller_one(demo, tmp_path, monkeypatch):
    out = tmp_path / "out"
    assert fit(demo, out, "--pod_type", "pod16") == 0
    monkeypatch.setenv("NUM_AVAILABLE_IPU", "4")
    assert json.loads((out / "ipu_config.json").read_text())["replication_factor"]["pod4"] == 1
    assert run(infer, "--checkpoint", out, "--question", "Who?", "--context", "Ada.") == 0
    assert run(infer, "--checkpoint", out, "--input_file", demo / "validation.json") == 0


@pytest.mark.parametrize("env", [{"LC_ALL": "POSIX", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},
                                 {"PYTHONIOENCODING": "ascii"}])
def test_a_terminal_without_unicode_ends_no_run(trained, env):
    command = [sys.executable, "infer.py", "--checkpoint", str(trained), "--question",
               "Wo wohnt Jürgen?", "--context", "Юрген живёт в Осло."]
    done = subprocess.run(command, cwd=ROOT, env={**ENVIRONMENT, **env}, stdout=subprocess.PIPE,
                          stderr=subprocess.PIPE)
    assert done.returncode == 0, done.stderr
    assert done.stdout.isascii()


def test_python_without_docstrings_is_named():
    done = subprocess.run([sys.executable, "-OO", "train.py", "--config", "demo"], cwd=ROOT,
                          stderr=subprocess.PIPE, text=True)
    assert done.returncode == 2 and "python -OO removes docstrings" in done.stderr
    assert done.stderr.count("\n") == 1


# ---- Evaluations


def test_an_existing_model_is_evaluated_and_a_test_file_answered(demo, trained, tmp_path, capsys):
    out = tmp_path / "out"
    assert run(train, "--do_eval", "--model_name_or_path", trained, "--validation_file",
               demo / "validation.json", "--output_dir", out, "--test_file",
               demo / "train.json") == 0
    metrics = json.loads((out / "metrics.json").read_text())
    assert not (out / "model.safetensors").exists() and "step" not in metrics
    assert len(json.loads((out / "test_predictions.json").read_text())) == 80
    assert "exact_match" in json.loads((out / "test_metrics.json").read_text())

    # An evaluation does not replace what a training has written, unless it is told to.
    before = {path: path.read_bytes() for path in trained.iterdir() if path.is_file()}
    again = ("--do_eval", "--model_name_or_path", trained, "--validation_file",
             demo / "train.json", "--output_dir", trained)
    assert run(train, *again) == 2
    assert "holds a model, whose metrics and predictions this evaluation would replace" in (
        capsys.readouterr().err)
    assert {path: path.read_bytes() for path in trained.iterdir() if path.is_file()} == before

    # infer.py prints the same figures for the same questions, since both take the checkpoint's
    # settings, and none where no answer is known.
    ask = ("--checkpoint", trained, "--input_file")
    capsys.readouterr()
    assert run(infer, *ask, demo / "validation.json") == 0
    assert f"exact_match {metrics['exact_match']:.2f}, f1 {metrics['f1']:.2f}" in (
        capsys.readouterr().err)
    rows = [{key: row[key] for key in ("id", "context", "question")}
            for row in flat(demo / "validation.json")]
    (tmp_path / "open.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert run(infer, *ask, tmp_path / "open.jsonl") == 0
    assert "exact_match" not in capsys.readouterr().err


def test_the_best_model_becomes_the_final_one(demo, tmp_path, capsys):
    """Updates that change the weights, but no answer, make the first evaluation the best."""
    out = tmp_path / "out"
    more = ("--max_steps", "6", "--eval_steps", "2", "--learning_rate", "1e-7", "--warmup_steps",
            "0", "--precision", "float32", "--load_best_model_at_end")
    assert fit(demo, out, *more) == 0
    said = capsys.readouterr().out
    lines = [line for line in said.splitlines() if line.startswith("evaluation at step ")]
    found = {int(line.split()[3].rstrip(":")): float(line.split("f1 ")[1].split(",")[0])
             for line in lines[:3]}
    best = max(found, key=lambda step: (found[step], -step))
    assert set(found) == {2, 4, 6} and best == 2
    kept = load_file(out / f"checkpoint-{best}" / "model.safetensors")
    final = load_file(out / "model.safetensors")
    assert all(torch.equal(kept[name], final[name]) for name in final)
    assert json.loads((out / "metrics.json").read_text())["step"] == best
    summary = json.loads((out / "train_results.json").read_text())
    assert summary["steps"] == 6 and summary["windows_per_second"] > 0

    # Resumed in another folder, the best one is still that of the first.
    resumed = ("--resume_from_checkpoint", out / f"checkpoint-{best}", *more)
    assert fit(demo, tmp_path / "other", *resumed) == 0
    assert f"the best model is that of step {best}" in capsys.readouterr().out
    other = load_file(tmp_path / "other" / "model.safetensors")
    assert all(torch.equal(kept[name], other[name]) for name in final)
    # A run that does not ask for the best one ends with its last.
    assert fit(demo, tmp_path / "last", *resumed[:-1]) == 0
    assert "the best model" not in capsys.readouterr().out
    last = load_file(tmp_path / "last" / "model.safetensors")
    assert not all(torch.equal(kept[name], last[name]) for name in final)


def test_a_run_that_was_stopped_in_its_last_evaluation_makes_up_for_it(demo, tmp_path, capsys):
    out = tmp_path / "out"
    best = ("--eval_steps", "1", "--save_steps", "2", "--load_best_model_at_end")
    assert fit(demo, out, *best) == 0
    capsys.readouterr()
    assert fit(demo, out, *best, "--resume_from_checkpoint", out / "checkpoint-2") == 0
    said = capsys.readouterr().out
    assert "after step 2" in said and "evaluation at step 2" in said.split("training: ")[0]


def test_a_resumed_run_says_where_it_goes_on(demo, tmp_path, capsys):
    out = tmp_path / "out"
    assert fit(demo, out, "--save_steps", "1", "--resume_from_checkpoint", "auto") == 0
    assert f"no checkpoint in {out}: the run starts from the beginning" in capsys.readouterr().out
    assert fit(demo, out, "--save_steps", "1", "--resume_from_checkpoint", "auto") == 0
    assert f"resuming from {out}/checkpoint-2, after step 2" in capsys.readouterr().out


def test_a_name_on_the_hub_is_refused_in_seconds_where_there_is_no_hub(tmp_path):
    env = {"HF_HUB_OFFLINE": "", "HF_DATASETS_OFFLINE": "", "HF_ENDPOINT": "http://127.0.0.1:1",
           "HF_HOME": str(tmp_path)}
    process = start("train.py", "--output_dir", tmp_path / "out", env=env)
    said = process.communicate(timeout=60)[0].strip().splitlines()
    assert process.returncode == 1
    assert said[-1].startswith("error: ")
    assert ("model_name_or_path roberta-base: no such folder, and the hub did not give it ("
            in said[-1])
    assert "note: http://127.0.0.1:1 does not answer" in said[0] and len(said) <= 4


def pipe(path, data):
    """A named pipe at `path`, which gives `data` to its first reader."""
    os.mkfifo(path)
    threading.Thread(target=path.write_bytes, args=[data], daemon=True).start()
    return path


@pytest.mark.parametrize("encoding, as_pipe", [("utf-8", False), ("utf-8-sig", True),
                                               ("utf-16", False)])
def test_an_answers_place_counts_the_texts_own_characters(trained, tmp_path, capsys, encoding,
                                                          as_pipe):
    """Line ends count as they are, and a byte order mark is no part of the text."""
    text = "Zoë was born in Oslo in 1888.\r\nShe was afraid of geese.\r\n"
    data = text.encode(encoding)
    path = pipe(tmp_path / "text", data) if as_pipe else tmp_path / "text"
    if not as_pipe:
        path.write_bytes(data)
    assert run(infer, "--checkpoint", trained, "--context_file", path, "--question", "What?",
               "--n_best", "20", "--json") == 0
    answer = json.loads(capsys.readouterr().out)
    assert all(text[entry["start"]:entry["end"]] == entry["text"] for entry in answer["nbest"])
    assert any(entry["start"] > text.index("\n") for entry in answer["nbest"])


def test_questions_may_come_through_a_pipe(demo, trained, tmp_path, capsys):
    file = demo / "validation.json"
    for path in (file, pipe(tmp_path / "questions", file.read_bytes())):
        assert run(infer, "--checkpoint", trained, "--input_file", path, "--json") == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines and lines[:len(lines) // 2] == lines[len(lines) // 2:]


def test_standard_input_is_utf_8_in_the_c_locale_too(trained):
    text = "\ufeffZoë was born in Malmö.\n\nWho was Zoë?\n"
    done = subprocess.run(
        [sys.executable, "infer.py", "--checkpoint", str(trained), "--json"], cwd=ROOT,
        env={**ENVIRONMENT, "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},
        input=text.encode(), stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    answer = json.loads(done.stdout)
    assert answer["question"] == "Who was Zoë?"
    assert answer["answer"] == text[1:][answer["start"]:answer["end"]]


def test_what_is_typed_is_taken_whole(trained):
    """A text of several lines and more characters than a terminal's line may have; bad bytes."""
    text = "Ada was a baker. " * 400 + "\nShe was afraid of geese.\n\nWhat did she fear?\n\xff\n"
    done = subprocess.run([sys.executable, "infer.py", "--checkpoint", str(trained), "--json"],
                          cwd=ROOT, env=ENVIRONMENT, input=text.encode("latin-1"),
                          stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert done.returncode == 0, done.stderr
    first, second = map(json.loads, done.stdout.splitlines())
    assert first["question"] == "What did she fear?" and second["question"] == "\ufffd"
    closed = subprocess.run(["sh", "-c", f"{sys.executable} infer.py --checkpoint {trained} <&-"],
                            cwd=ROOT, env=ENVIRONMENT, stderr=subprocess.PIPE, text=True)
    assert closed.returncode == 2 and "standard input is closed" in closed.stderr


def test_run_script_shows_a_traceback_only_when_told(monkeypatch, capsys):
    def fails():
        raise ZeroDivisionError("in a test")

    for arguments, shown in ((["--debug"], True), (["--debug=true"], True), ([], False),
                             (["--debug", "false"], False), (["--debug=false"], False)):
        monkeypatch.setattr(sys, "argv", ["train.py", *arguments])
        assert run_script(fails) == 1
        said = capsys.readouterr().err
        assert ("Traceback" in said) == shown and "error: ZeroDivisionError: in a test" in said
