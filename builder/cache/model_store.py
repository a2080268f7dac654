"""The model store as a task sees it: is the model there, and where may its libraries write?"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from builder import files, sglang_args
from builder.cache.coverage import config_digest as digest_of_config
from builder.cache.coverage import is_directory
from builder.task import Task

WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".gguf")

_CONFIG_LIMIT = 16 << 20

#: What transformers and the hub write beside the models, when those cannot be written.
WRITES = ("HF_ASSETS_CACHE", "HF_DATASETS_CACHE", "HF_XET_CACHE")


class Skipped(Exception):
    """The task cannot be tried here. The message is the reason."""


def config_digest(task: Task, environ: Mapping[str, str]) -> str | None:
    """Digest of the model's config.json; None for a model in the image. Raises Skipped where a part of the model is
    missing and may not be fetched.
    """
    store = _store(environ)
    digest, problem = digest_of_config(store, task.model, task.revision)
    if environ.get("HF_HUB_OFFLINE", "1").lower() in ("0", "false", "no", "off"):
        return digest
    folder = _folder(store, task)
    if digest is None and (problem or folder is None or not (folder / "config.json").is_file()):
        raise Skipped(problem or f"{task.model} has no config.json")
    if task.recipe == "shapes":
        return digest
    dummy = task.load != "weights" or sglang_args.value(task.argv, sglang_args.LOAD_FORMAT) == "dummy"
    if folder is not None and not dummy and not any(_weights(folder)):
        kinds = ", ".join(WEIGHT_SUFFIXES)
        raise Skipped(f"{task.model}: config.json is there, but no weights ({kinds}) are in {folder}")
    return digest


def config(task: Task, environ: Mapping[str, str]) -> dict[str, Any] | None:
    """The model's config.json; None where it cannot be read (yet: the server may fetch it)."""
    folder = _folder(_store(environ), task)
    try:
        found = None if folder is None else files.read_json(str((folder / "config.json").resolve()), _CONFIG_LIMIT)
    except (files.UnreadableError, OSError):
        return None
    return found if isinstance(found, dict) else None


def defaults(environ: Mapping[str, str], private: str) -> dict[str, str]:
    """What children are told unless the task says otherwise. private: a writable directory of this run."""
    made = {
        "HF_HUB_OFFLINE": "1",
        # A success line that waits in a buffer comes after what the teardown says.
        "PYTHONUNBUFFERED": "1",
        # --trust-remote-code writes modules here
        "HF_MODULES_CACHE": f"{private}/modules",
    }
    if not os.access(_store(environ), os.W_OK):
        made.update({name: f"{private}/{name.lower()}" for name in WRITES})
    return made


def _store(environ: Mapping[str, str]) -> Path:
    home = environ.get("HF_HOME")
    return Path(home) if home else Path(environ.get("HOME") or "/root") / ".cache" / "huggingface"


def _folder(store: Path, task: Task) -> Path | None:
    """The folder of the model's files; None where it cannot be told."""
    if is_directory(task.model):
        return Path(task.model)
    home = store / "hub" / f"models--{task.model.replace('/', '--')}"
    revision = task.revision or "main"
    with contextlib.suppress(OSError, ValueError):  # a commit is its own name
        revision = (home / "refs" / revision).read_text(encoding="ascii").strip()
    folder = home / "snapshots" / revision
    return folder if folder.is_dir() else None


def _weights(folder: Path) -> Iterator[Path]:
    """Weight files that can be read: a link of the store that leads out of the mount is none."""
    return (path for path in folder.rglob("*") if path.suffix in WEIGHT_SUFFIXES and path.exists())
