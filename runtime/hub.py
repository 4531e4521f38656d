"""The Hugging Face hub: whether it can be reached, found out in seconds, and what it holds."""
from __future__ import annotations

import fnmatch
import os
import re
import sys
import threading
from functools import lru_cache
from pathlib import Path
from typing import List, Optional

from runtime.errors import RunError, UsageError, one_line

_SECONDS = 3
_OFF = ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "TRANSFORMERS_OFFLINE")
# A name on the hub (huggingface_hub, utils/_validators.py, validate_repo_id).
_NAME = re.compile(r"\w[\w.-]*(/[\w.-]+)?")
# The files of a checkpoint that are read.
_FILES = ("*.json", "*.txt", "*.model", "README.md")
_WEIGHTS = "model*.safetensors"
# What the status of an answer means; all from 500 on are the hub's own troubles.
_MEANING = {401: ": no valid access token, give --hub_token", 403: ": access is forbidden",
            404: ": it has no such thing", 429: ": too many requests, try again later",
            500: ": try again later"}
_OTHER_WEIGHTS = ("pytorch_model*.bin", "*.h5", "*.msgpack", "*.ckpt*")


def offline_unless_reachable(needed: bool = True) -> None:
    """Have the Hugging Face libraries use only what is cached if the hub does not answer.

    They would try for half a minute. They read their environment once, when they are imported.
    """
    if not needed or any(os.environ.get(name) for name in _OFF):
        return
    answers = []
    # In a thread, since a request's time limit does not hold while a name server is waited for.
    attempt = threading.Thread(target=lambda: answers.append(_answers()), daemon=True)
    attempt.start()
    attempt.join(_SECONDS)
    if not any(answers):
        os.environ.update(dict.fromkeys(_OFF, "1"))
        print(f"note: {_endpoint()} does not answer; only what is cached can be used",
              file=sys.stderr)


def _answers() -> bool:
    """Return whether the hub can be reached, also by way of a proxy that the environment names."""
    import ssl
    from urllib.error import HTTPError
    from urllib.request import Request, urlopen
    try:
        urlopen(Request(_endpoint(), method="HEAD"), timeout=_SECONDS).close()
    except (OSError, ValueError) as error:
        # An error's status is an answer, too, and whom to trust, the libraries decide.
        return isinstance(error, HTTPError) or isinstance(
            getattr(error, "reason", None), ssl.SSLError)
    return True


def _endpoint() -> str:
    return os.environ.get("HF_ENDPOINT") or "https://huggingface.co"


@lru_cache(maxsize=None)
def checkpoint_folder(name: str, source: str, revision: str = "main", token: Optional[str] = None,
                      cache_dir: Optional[str] = None, weights: bool = True) -> Path:
    """Return the folder with the files of a checkpoint: `name` itself, or the hub's in the cache.

    source: what messages call it. weights: whether they are needed, too. Raises UsageError if they
    are not in safetensors, or if `name` can be none of the hub; RunError if the hub refuses it.
    """
    folder = Path(name)
    if folder.is_dir():
        files = os.listdir(folder)
    elif not _NAME.fullmatch(name):
        raise UsageError(f"{source} {name}: no such folder; name one with config.json, "
                         "model.safetensors and tokenizer.json, or a model on the hub")
    else:
        offline_unless_reachable()
        import huggingface_hub
        try:
            folder = Path(huggingface_hub.snapshot_download(
                name, allow_patterns=[*_FILES, *([_WEIGHTS] if weights else [])],
                ignore_patterns="*/*", revision=revision, token=token, cache_dir=cache_dir))
            files = os.listdir(folder)
            if weights and not _matching(files, _WEIGHTS, *_OTHER_WEIGHTS):
                files += huggingface_hub.HfApi(token=token).list_repo_files(name, revision=revision)
        # Offline, no such name or revision, no access, another server: errors of several libraries.
        except Exception as error:
            demo = "" if source == "--checkpoint" else (
                ", or run --config demo, which needs no download")
            raise RunError(f"{source} {name}: no such folder, and the hub did not give it "
                           f"({hub_cause(error, revision, _cached(name, revision, cache_dir))}); "
                           "name a local folder with config.json, model.safetensors and "
                           f"tokenizer.json{demo}") from error
    other = _matching(files, *_OTHER_WEIGHTS)
    if weights and other and not _matching(files, _WEIGHTS):
        converted = name if Path(name).is_dir() else name.split("/")[-1]
        raise UsageError(
            f"{source} {name}: has its weights only in {other[0]}, which is not read here (a "
            "pickle can run code, and safetensors cannot); if you trust it, convert it: python -c "
            "\"from transformers import AutoModelForQuestionAnswering as M, AutoTokenizer as T; "
            f"[k.from_pretrained({name!r}).save_pretrained({converted!r}) for k in (T, M)]\""
            + ("" if converted == name else f", and name {converted}"))
    return folder


def _matching(files: List[str], *patterns: str) -> List[str]:
    return sorted(file for pattern in patterns for file in fnmatch.filter(files, pattern))


def _cached(name: str, revision: str, cache_dir: Optional[str]) -> str:
    from huggingface_hub.constants import HF_HUB_CACHE
    refs = Path(cache_dir or HF_HUB_CACHE, f"models--{name.replace('/', '--')}", "refs")
    revisions = [path.relative_to(refs).as_posix() for path in refs.rglob("*") if path.is_file()]
    if not revisions:
        return "the model is not in the cache"
    if revision in revisions:
        return "the cache has it without weights in safetensors"
    return f"the cache has only its --model_revision {' and '.join(sorted(revisions))}"


def hub_cause(error: BaseException, revision: str = "main",
              cached: str = "the model is not in the cache") -> str:
    """Return in a few words why the hub did not give a thing. cached: what the cache has of it."""
    kinds = {kind.__name__ for kind in type(error).__mro__}
    if "RevisionNotFoundError" in kinds:
        return f"it has no revision {revision}"
    if "GatedRepoError" in kinds:
        return "access to it has to be asked for on its page, and given with --hub_token"
    if "RepositoryNotFoundError" in kinds:
        return "it has no model of that name, or it is private and needs --hub_token"
    status = http_status(error)  # without one the hub was not asked, or did not answer
    if status is not None:
        return f"it answers with status {status}{_MEANING.get(min(status, 500), '')}"
    if "LocalEntryNotFoundError" in kinds or "OfflineModeIsEnabled" in kinds:
        return f"it does not answer, and {cached}"
    return f"its answer cannot be read: {one_line(error)[:80]}"


def http_status(error: Optional[BaseException]) -> Optional[int]:
    """Return the status of the hub's answer in the error's chain of causes, if there is one."""
    while error is not None:
        status = getattr(getattr(error, "response", None), "status_code", None)
        if status is not None:
            return status
        error = error.__cause__ or error.__context__
    return None
