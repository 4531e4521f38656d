"""Share a fine-tuned model on the Hugging Face hub, with a model card about its training."""
from __future__ import annotations

import fnmatch
import json
import shlex
from pathlib import Path

import huggingface_hub
from huggingface_hub import CommitOperationAdd, EvalResult, HfApi, ModelCard, ModelCardData
from huggingface_hub.utils import HFValidationError

from qa.settings import TrainSettings
from runtime import processes
from runtime.errors import RunError, UsageError, one_line
from runtime.hub import http_status

# Only the model and what is needed to use it are uploaded: no checkpoints, no logs, and no
# predictions, because those quote the data.
_SHARED = ("config.json", "*.safetensors", "*.safetensors.index.json", "tokenizer*.json",
           "special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt", "*.model",
           "ipu_config.json", "qa_settings.json")
# Of the run that shares it, which may only evaluate.
_RESULTS = ("README.md", "metrics.json", "confidence.json")
# What huggingface_hub's command line is called from version 1 on, and before.
_CLI = (("huggingface-cli login", "huggingface-cli upload")
        if huggingface_hub.__version__.startswith("0.") else ("hf auth login", "hf upload"))


def check_push(settings: TrainSettings) -> None:
    """Find out at the start of a run with --push_to_hub whether its end can upload the model.

    Raises UsageError without a valid token or a model of train.py, RunError without the hub.
    """
    if not settings.push_to_hub or not processes.is_first():
        return
    if not settings.trains and not (Path(settings.model_name_or_path) / "run.json").is_file():
        raise UsageError(
            f"--push_to_hub: {settings.model_name_or_path} is no folder that train.py has trained "
            "a model in (it has no run.json): name one with --model_name_or_path, or train")
    try:
        HfApi(token=settings.hub_token).whoami()
    except Exception as error:
        if http_status(error) == 401 or type(error).__name__ == "LocalTokenNotFoundError":
            raise UsageError(
                "--push_to_hub: no valid access token; give --hub_token, or log in with "
                f"`{_CLI[0]}`") from error
        raise RunError(f"--push_to_hub: the hub cannot be reached ({one_line(error)})") from error


def push(settings: TrainSettings) -> None:
    """With --push_to_hub, upload the model with its card and metrics; print the commit's URL.

    The card is also written to the output folder, as README.md. Raises UsageError if the
    repository's name is not valid, RunError if the upload fails.
    """
    if not settings.push_to_hub or not processes.is_first():
        return
    results, api = Path(settings.output_dir), HfApi(token=settings.hub_token)
    model = results if settings.trains else Path(settings.model_name_or_path)
    repo_id = settings.hub_model_id or model.resolve().name
    try:
        repo_id = api.create_repo(repo_id, private=settings.hub_private_repo, exist_ok=True).repo_id
        (results / "README.md").write_text(model_card(model, repo_id, settings), "utf-8")
        files = [path for path in model.iterdir() if path.is_file()
                 and any(fnmatch.fnmatch(path.name, pattern) for pattern in _SHARED)]
        files += filter(Path.exists, map(results.joinpath, _RESULTS))
        commit = api.create_commit(repo_id, [CommitOperationAdd(path.name, str(path))
                                             for path in files],
                                   commit_message="Add the fine-tuned model")
    except HFValidationError as error:
        raise UsageError(f"--hub_model_id {repo_id}: {error}") from error
    # requests, httpx, hf_xet and huggingface_hub raise unrelated exceptions.
    except Exception as error:
        raise RunError(
            f"could not push {model} to the hub: {one_line(error)}; the model is whole in {model}, "
            f"and `{_CLI[1]} {shlex.join((repo_id, str(model)))}` tries again") from error
    print(f"shared: {commit.commit_url}")


def model_card(folder: Path, repo_id: str, settings: TrainSettings) -> str:
    """Return the text of the model card, by the template model_card.md. Raises OSError.

    folder: the model's, with run.json and config.json. settings: of this run, which evaluated it.
    """
    run, config = (json.loads((folder / name).read_text("utf-8"))
                   for name in ("run.json", "config.json"))
    metrics, confidence = (json.loads(path.read_text("utf-8")) if path.exists() else {}
                           for path in map(Path(settings.output_dir).joinpath, _RESULTS[1:]))
    trained, name = run["settings"], repo_id.split("/")[-1]
    base = trained["model_name_or_path"]
    train_file, validation_file = (file and Path(file).name for file in (
        trained["train_file"], settings.validation_file))
    evaluated = validation_file or settings.dataset_name
    # The card's header, which the search and the leaderboards of the hub read.
    header = ModelCardData(
        model_name=name, base_model=None if Path(base).exists() else base,
        datasets=None if train_file else trained["dataset_name"], metrics=["exact_match", "f1"],
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
        repo_id=repo_id, run=run, confidence=confidence,
        training_data=train_file or f"the data set `{trained['dataset_name']}`",
        evaluation_data=validation_file or f"the data set `{evaluated}`",
        base="A local model" if Path(base).exists() else f"[{base}](https://huggingface.co/{base})",
        figures={key: f"{value:.2f}" if isinstance(value, float) else value
                 for key, value in metrics.items() if key not in ("step", "epoch")}).content
