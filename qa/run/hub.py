"""Share a fine-tuned model on the Hugging Face hub, with a model card about its training."""
from __future__ import annotations

import fnmatch
import json
import shlex
from pathlib import Path
from typing import Union

import huggingface_hub
from huggingface_hub import EvalResult, HfApi, ModelCard, ModelCardData
from huggingface_hub.utils import HFValidationError

from qa.settings import TrainSettings
from runtime import processes
from runtime.errors import RunError, UsageError, one_line
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

def check_login(settings: TrainSettings) -> None:
    """Find out at the start of a run with --push_to_hub whether its end can upload the model.

    The token is settings.hub_token, else the one that huggingface_hub has stored. Raises UsageError
    if the token is missing or refused, RunError if the hub cannot be reached.
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
        raise RunError(f"--push_to_hub: the hub cannot be reached ({one_line(error)})") from error


def push(settings: TrainSettings) -> None:
    """With --push_to_hub, upload the output folder's model and its card; print the commit's URL.

    The card is also written to the folder, as README.md. settings.hub_model_id is "name" or
    "account/name", by default the name of the folder; the repository is created if it does not
    exist.

    Raises UsageError if the repository name is not valid, RunError if the upload fails. The output
    folder keeps all files in any case.
    """
    if not settings.push_to_hub or not processes.is_first():
        return
    folder, api = Path(settings.output_dir), HfApi(token=settings.hub_token)
    repo_id = settings.hub_model_id or folder.resolve().name
    try:
        repo_id = api.create_repo(repo_id, private=settings.hub_private_repo, exist_ok=True).repo_id
        (folder / "README.md").write_text(model_card(folder, repo_id), "utf-8")
        # upload_folder's own patterns would also match files in folders.
        shared = [path.name for path in folder.iterdir() if path.is_file()
                  and any(fnmatch.fnmatch(path.name, pattern) for pattern in _SHARED)]
        commit = api.upload_folder(repo_id=repo_id, folder_path=folder, allow_patterns=shared,
                                   commit_message="Add the fine-tuned model")
    except HFValidationError as error:
        raise UsageError(f"--hub_model_id {repo_id}: {one_line(error)}") from error
    # requests, httpx, hf_xet and huggingface_hub raise unrelated exceptions.
    except Exception as error:
        raise RunError(
            f"could not push {folder} to the hub: {one_line(error)}; "
            f"the model is whole in {folder}, "
            f"and `{_CLI[1]} {shlex.join((repo_id, str(folder)))}` tries again"
        ) from error
    print(f"shared: {commit.commit_url}")


def model_card(folder: Union[str, Path], repo_id: str) -> str:
    """Return the model card for the hub, the text of README.md, by the template model_card.md.

    The sources are run.json, config.json and, if the model was evaluated, metrics.json in `folder`.
    Local files are named without their folders. Raises OSError if one of them cannot be read.
    """
    folder = Path(folder)
    run, config = (json.loads((folder / name).read_text("utf-8"))
                   for name in ("run.json", "config.json"))
    metrics = folder / "metrics.json"
    metrics = json.loads(metrics.read_text("utf-8")) if metrics.exists() else {}
    settings, layout, name = run["settings"], run["ipu_config"], repo_id.split("/")[-1]
    base, dataset = settings["model_name_or_path"], settings["dataset_name"]
    files = {kind: settings[f"{kind}_file"] and Path(settings[f"{kind}_file"]).name
             for kind in ("train", "validation")}
    data = {kind: file or f"the data set `{dataset}`" for kind, file in files.items()}
    evaluated = files["validation"] or dataset
    # The card's header, which the search and the leaderboards of the hub read.
    header = ModelCardData(
        model_name=name, base_model=None if Path(base).exists() else base,
        datasets=None if files["train"] else dataset, metrics=["exact_match", "f1"],
        library_name="transformers", pipeline_tag="question-answering",
        tags=[config["model_type"], "ipu", "poptorch"],
        eval_results=[
            EvalResult(task_type="question-answering", dataset_type=evaluated,
                       dataset_name=evaluated, dataset_split="validation", metric_type=metric,
                       metric_name=label, metric_value=round(metrics[metric], 4))
            for metric, label in (("exact_match", "Exact Match"), ("f1", "F1"))
            if metric in metrics] or None)
    return ModelCard.from_template(
        header, template_path=str(Path(__file__).with_name("model_card.md")), name=name,
        repo_id=repo_id, run=run, settings=settings, training_data=data["train"],
        evaluation_data=data["validation"],
        base="A local model" if Path(base).exists() else f"[{base}](https://huggingface.co/{base})",
        figures={key: f"{value:.2f}" if isinstance(value, float) else value
                 for key, value in metrics.items() if key not in ("step", "epoch")},
        shown_settings={key: settings.get(key) for key in _SHOWN_SETTINGS},
        shown_layout={key: layout.get(key) for key in _SHOWN_LAYOUT}).content
