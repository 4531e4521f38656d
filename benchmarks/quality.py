"""How well the models that train.py and Trainer make answer."""
from __future__ import annotations

import statistics
from pathlib import Path

from benchmarks.measure import ONE_IPU, python
from qa.run.log import LOG, read_log
from runtime.files import read_json_object

SETTINGS = ("float32, clipped", "float32, not clipped", "half, clipped", "half, not clipped")
PROGRAMS = ("Trainer", "train.py packed", "train.py a window a row")


def quality(train_file, validation_file, model, output_dir, seeds=5, epochs=5.0,
            learning_rate=2e-4, max_seq_length=384, programs=PROGRAMS,
            settings=SETTINGS) -> None:
    """EM, F1 and loss of the same fine-tuning by Trainer and by train.py, over seeds; hours.

    The encoder `model` gets a fresh head, the same for all of a seed. Updates of 8 windows, a
    warm-up of a quarter of the run, clipped to 1 and not. Trainer pads to the longest window in a
    batch; its half is autocast to bfloat16. train.py answers the validation questions for both, in
    the precision of the training. Runs that output_dir has are not repeated.
    """
    folder = Path(output_dir)
    for seed in range(seeds):
        start = folder / f"model-{seed}"
        if not start.exists():
            write_model(model, start, seed)
        for setting in settings:
            half, clipped = setting.startswith("half"), setting.endswith(", clipped")
            for program in programs:
                output = folder / f"{program}, {setting}, {seed}"
                if (output / "metrics.json").is_file():
                    continue
                job = ["--train_file", train_file, "--output_dir", output, "--seed", seed,
                       "--num_train_epochs", epochs, "--learning_rate", learning_rate,
                       "--max_seq_length", max_seq_length, "--logging_steps", 1,
                       *(["--max_grad_norm", 1] if clipped else [])]
                evaluation = [
                    "--validation_file", validation_file, "--eval_micro_batch_size", 4,
                    "--inference_device_iterations", 1, "--inference_layers_per_ipu", -1, *ONE_IPU,
                    "--precision", "float16" if half else "float32"]
                if program == "Trainer":
                    python("-m", "benchmarks", "trainer", "--model", start, *job, "--padding",
                           "longest", "--windows_per_update", 8, "--warmup", 0.25, "--precision",
                           "bfloat16" if half else "float32",
                           *([] if clipped else ["--max_grad_norm", 0]))
                    python("train.py", "--do_eval", "--model_name_or_path", output,
                           "--output_dir", output, "--overwrite_output_dir",
                           "--max_seq_length", max_seq_length, *evaluation)
                else:
                    python("train.py", "--model_name_or_path", start, *job, *evaluation,
                           "--micro_batch_size", 4, "--gradient_accumulation_steps", 2, "--pack",
                           program.endswith("packed"))
                (output / "model.safetensors").unlink()
                show(output.name, *outcome(output))
    for setting in SETTINGS:
        compare(folder, setting, seeds)


def write_model(encoder: str, folder: Path, seed: int) -> None:
    """Write the encoder with a random head for question answering, and its tokenizer."""
    from transformers import AutoModelForQuestionAnswering, AutoTokenizer, set_seed

    set_seed(seed)
    AutoModelForQuestionAnswering.from_pretrained(encoder).save_pretrained(folder)
    AutoTokenizer.from_pretrained(encoder).save_pretrained(folder)


def outcome(folder: Path):
    """Return exact match, F1 and the mean losses of the tenths of a run."""
    state, metrics = (folder / name for name in ("trainer_state.json", "metrics.json"))
    lines = (read_json_object(state, str(state))["log_history"] if state.is_file()
             else read_log(folder / LOG))
    losses = [line["loss"] for line in lines if "loss" in line]
    tenths = [statistics.mean(losses[len(losses) * i // 10:len(losses) * (i + 1) // 10])
              for i in range(10)]
    scores = read_json_object(metrics, str(metrics))
    return scores["exact_match"], scores["f1"], tenths


def show(name: str, exact_match, f1, losses, more: str = "") -> None:
    """Print a line."""
    print(f"  {name:46} EM {exact_match:.2f} F1 {f1:.2f}{more}  loss by tenths of the run "
          f"{' '.join(f'{loss:.2f}' for loss in losses)}", flush=True)


def compare(folder: Path, setting: str, seeds: int) -> None:
    """Print the means of the programs over the seeds, and their difference from Trainer's."""
    runs = {program: {seed: outcome(folder / f"{program}, {setting}, {seed}")
                      for seed in range(seeds)
                      if (folder / f"{program}, {setting}, {seed}" / "metrics.json").is_file()}
            for program in PROGRAMS}
    for program, results in runs.items():
        both = sorted(set(results) & set(runs["Trainer"]))
        if len(both) < 2:
            continue
        exact_match, f1, losses = zip(*results.values())
        gains = [results[seed][1] - runs["Trainer"][seed][1] for seed in both]
        error = statistics.stdev(gains) / len(gains) ** 0.5
        show(f"{program}, {setting}, {len(f1)} seeds", statistics.mean(exact_match),
             statistics.mean(f1), map(statistics.mean, zip(*losses)),
             f" (standard deviations {statistics.stdev(exact_match):.2f}, "
             f"{statistics.stdev(f1):.2f}), F1 {statistics.mean(gains):+.2f} over Trainer's "
             f"(standard error {error:.2f})")
