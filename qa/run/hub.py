"""Share a fine-tuned model on the Hugging Face hub, with a model card about its training."""
from __future__ import annotations

import fnmatch
import json
from pathlib import Path
from typing import Any, Dict, List, Optional, Union

import huggingface_hub
from huggingface_hub import EvalResult, HfApi, ModelCardData
from huggingface_hub.utils import HFValidationError

from qa.settings import TrainSettings
from runtime import processes
from runtime.errors import RunError, UsageError, first_line
from runtime.hub import http_status

# Only the model and what is needed to use it are uploaded: no checkpoints, no logs, and no
# predictions, because those quote the data.
_SHARED = ("README.md", "config.json", "*.safetensors", "*.safetensors.index.json",
           "tokenizer*.json", "special_tokens_map.json", "added_tokens.json", "vocab.json",
           "merges.txt", "*.model", "ipu_config.json", "qa_settings.json", "metrics.json")
_SHOWN_SETTINGS = ("max_seq_length", "doc_stride", "pack", "num_train_epochs", "max_steps",
                   "learning_rate", "lr_scheduler_type", "warmup_ratio", "weight_decay",
                   "optimizer", "loss_scaling", "precision", "micro_batch_size", "seed")
_SHOWN_LAYOUT = ("layers_per_ipu", "ipus_per_replica", "replication_factor",
                 "gradient_accumulation_steps", "device_iterations", "matmul_proportion",
                 "recompute_checkpoint_every_layer", "optimizer_state_offchip")

# What huggingface_hub's command line is called from version 1 on, and before.
_CLI = (("huggingface-cli login", "huggingface-cli upload")
        if huggingface_hub.__version__.startswith("0.") else ("hf auth login", "hf upload"))

_CARD = """---
{metadata}
---
# {name}

{base} fine-tuned for {task} with PopTorch, as a pipeline over Graphcore IPUs.
The files are Hugging Face's own; no IPU and no code of the training program is needed to use them:

```python
from transformers import pipeline

answer = pipeline("question-answering", model="{repo_id}")
answer(question="Where do I live?", context="My name is Wolfgang and I live in Berlin.")
```

## Results

{metrics}
## Data

Fine-tuned on {training_data}, evaluated on {evaluation_data}.
Content hash of the training windows: `{fingerprint}`.

## Settings

{settings}
## Layout on the IPUs

{layout}
## Versions

{versions}"""


def check_login(settings: TrainSettings) -> None:
    """Find out at the start of a run whether its end will be able to upload the model.

    The token is settings.hub_token, or else that of the login that huggingface_hub has stored. Does
    nothing without --push_to_hub. Raises UsageError if the token is missing or refused, RunError if
    the hub cannot be reached.
    """
    if not settings.push_to_hub or not processes.is_first():
        return
    try:
        HfApi(token=settings.hub_token).whoami()
    except Exception as error:
        if http_status(error) == 401 or type(error).__name__ == "LocalTokenNotFoundError":
            raise UsageError(
                "--push_to_hub: no valid access token; give --hub_token, or log in with "
                f"`{_CLI[0]}`") from error
        raise RunError(f"--push_to_hub: the hub cannot be reached ({first_line(error)})") from error


def push(settings: TrainSettings) -> None:
    """Upload the model in the output folder and its model card, in one commit, and print its URL.

    Does nothing without --push_to_hub.

    The card is made from run.json and metrics.json in the folder, and is also written there as
    README.md. settings.hub_model_id is "name" or "account/name", by default the name of the folder;
    the repository is created if it does not exist.

    Raises UsageError if the repository name is not valid, RunError if the upload fails. The output
    folder keeps all files in any case.
    """
    if not settings.push_to_hub or not processes.is_first():
        return
    folder, repo_id, private = (
        Path(settings.output_dir), settings.hub_model_id, settings.hub_private_repo)
    api = HfApi(token=settings.hub_token)
    try:
        repo_id = api.create_repo(repo_id or folder.resolve().name, private=private,
                                  exist_ok=True).repo_id
        (folder / "README.md").write_text(model_card(folder, repo_id), "utf-8")
        files = [path.name for path in folder.iterdir() if path.is_file()]
        shared = [
            name for name in files if any(fnmatch.fnmatch(name, pattern) for pattern in _SHARED)]
        commit = api.upload_folder(repo_id=repo_id, folder_path=folder, allow_patterns=shared,
                                   commit_message="Add the fine-tuned model")
    except HFValidationError as error:
        raise UsageError(f"--hub_model_id {repo_id}: {first_line(error)}") from error
    # requests, httpx, hf_xet and huggingface_hub raise unrelated exceptions.
    except Exception as error:
        raise RunError(
            f"could not push {folder} to the hub: {first_line(error)}; "
            f"the model is whole in {folder}, "
            f"and `{_CLI[1]} {repo_id or folder.resolve().name} {folder}` tries again"
        ) from error
    print(f"shared: {commit.commit_url}")


def model_card(folder: Union[str, Path], repo_id: str) -> str:
    """Return the model card for the hub, the text of README.md.

    It has metadata with the results (YAML), and says how to use the model, which data, settings and
    layout it was trained with, and with which versions of the packages. The sources are run.json,
    config.json and, if the model was evaluated, metrics.json in `folder`. Local files are named
    without their folders. Raises OSError if one of them cannot be read.
    """
    run = json.loads((Path(folder) / "run.json").read_text("utf-8"))
    file = Path(folder) / "metrics.json"
    metrics = json.loads(file.read_text("utf-8")) if file.exists() else {}
    metrics = {name: value for name, value in metrics.items() if name not in ("step", "epoch")}
    model_type = json.loads((Path(folder) / "config.json").read_text("utf-8"))["model_type"]
    settings, layout = run["settings"], run["ipu_config"]
    name = repo_id.split("/")[-1]
    base = settings["model_name_or_path"]
    base_is_local = Path(base).exists()
    data = {
        kind: Path(file).name if file else f"the data set `{settings['dataset_name']}`"
        for kind, file in (("training", settings["train_file"]),
                           ("evaluation", settings["validation_file"]))}
    return _CARD.format(
        metadata=_metadata(name, model_type, settings, metrics, None if base_is_local else base),
        name=name, repo_id=repo_id,
        base="A local model" if base_is_local else f"[{base}](https://huggingface.co/{base})",
        task="extractive question answering" +
        " with unanswerable questions (SQuAD v2)" * settings["version_2_with_negative"],
        training_data=data["training"], evaluation_data=data["evaluation"],
        fingerprint=run["data_fingerprint"],
        metrics=_table("metric", {
            key: f"{value:.2f}" if isinstance(value, float) else value
            for key, value in metrics.items()}) if metrics else "Not evaluated.\n",
        settings=_table("setting", {
            key: settings[key] for key in _SHOWN_SETTINGS if settings.get(key) is not None}),
        layout=_table("ipu_config.json", {
            key: layout[key] for key in _SHOWN_LAYOUT if layout.get(key) is not None}),
        versions=_table("package", run["versions"]),
    )


def _metadata(name: str, model_type: str, settings: Dict[str, Any], metrics: Dict[str, Any],
              base_model: Optional[str]) -> str:
    """Return the card's YAML header, which the search and the leaderboards of the hub read."""
    data_set = settings["dataset_name"] if not settings["train_file"] else None
    evaluated = (settings["dataset_name"] if not settings["validation_file"]
                 else Path(settings["validation_file"]).name)
    results: List[EvalResult] = [
        EvalResult(task_type="question-answering", dataset_type=evaluated, dataset_name=evaluated,
                   dataset_split="validation", metric_type=kind, metric_name=label,
                   metric_value=round(metrics[kind], 4))
        for kind, label in (("exact_match", "Exact Match"), ("f1", "F1")) if kind in metrics]
    card = ModelCardData(model_name=name, base_model=base_model, datasets=data_set,
                         metrics=["exact_match", "f1"], library_name="transformers",
                         pipeline_tag="question-answering", tags=[model_type, "ipu", "poptorch"],
                         eval_results=results or None)
    return card.to_yaml()


def _table(head: str, rows: Dict[str, Any]) -> str:
    """Return a Markdown table with the heading `head` and a line for each key and value."""
    lines = [
        f"| {head} | |", "| --- | --- |", *(f"| {key} | {value} |" for key, value in rows.items())]
    return "\n".join(lines) + "\n"
