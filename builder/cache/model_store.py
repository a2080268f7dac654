"""The one reader of a Hugging Face store (HF_HOME): where models are in it, and whether a task can use its model.

A model on the hub is ``hub/models--org--name/{refs/<revision>,snapshots/<commit>/…}``; snapshots are links into
``blobs/``. A link that leaves the store leads nowhere in a container.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from builder import files, sglang_args
from builder.task import Task
from builder.text import printable

#: Where containers have the model store.
STORE_MOUNT = "/models"

WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".gguf")

_CONFIG_LIMIT = 16 << 20

#: What transformers and the hub write next to the models; set elsewhere where the store is read-only.
WRITES = ("HF_ASSETS_CACHE", "HF_DATASETS_CACHE", "HF_XET_CACHE")


class Skipped(Exception):
    """The task cannot be tried here. The message is the reason."""


# The layout


def home(environ: Mapping[str, str]) -> Path:
    """Return the store that Hugging Face's libraries use in this environment."""
    return Path(environ.get("HF_HOME") or Path(environ.get("HOME") or "/root", ".cache", "huggingface"))


def is_directory(model: str) -> bool:
    """Return whether a task names its model by a path, not by its name on the hub."""
    return model.startswith(("/", "."))


def repository(model: str) -> str:
    """Return the directory of a model of the hub, below the store."""
    return f"hub/models--{model.replace('/', '--')}"


def snapshot(model: str, commit: str) -> str:
    """Return the directory of one commit of a model, below the store."""
    return f"{repository(model)}/snapshots/{commit}"


def is_commit(name: str) -> bool:
    """Return whether the content of a reference is the name of a snapshot, and no path."""
    return re.fullmatch(r"[0-9A-Za-z._-]+", name) is not None and name not in (".", "..")


# config.json


def config_digest(store: Path, model: str, revision: str | None) -> tuple[str | None, str | None]:
    """Return (sha256 of the model's config.json, None), or (None, what is wrong). Never raises.

    model: a name on the hub, or a directory as containers see it, below the store's mount. A directory elsewhere
    belongs to the image, which the builder cannot look into and which `coverage` names instead: (None, None).
    """
    try:
        if not is_directory(model):
            return _hub_digest(store, model, revision)
        if not Path(model).is_relative_to(STORE_MOUNT):
            return None, None
        return _digest(store, store / Path(model).relative_to(STORE_MOUNT) / "config.json")
    except (OSError, ValueError, RuntimeError) as error:
        return None, f"{printable(model)}: {files.why(error)}"


def _hub_digest(store: Path, model: str, revision: str | None) -> tuple[str | None, str | None]:
    wanted = revision or "main"
    if not _is_name(model, wanted):
        return None, f"{printable(model)}: not a model and revision of the hub"
    place = store / repository(model)
    if not place.is_dir():
        return None, f"{model} is not in the store: there is no {place} (HF_HOME={store} hf download {model})"
    folder = _snapshot(store, model, revision)
    if folder is None:
        return None, f"{model} has no revision {wanted} in the store: {place / 'refs' / wanted} names no snapshot"
    return _digest(store, folder / "config.json")


def _digest(store: Path, config: Path) -> tuple[str | None, str | None]:
    if not _is_within(store, config):
        return None, f"{config} is a link that leaves the store, to {config.resolve()}"
    try:
        return hashlib.sha256(files.read_bytes(str(config.resolve()), _CONFIG_LIMIT)).hexdigest(), None
    except files.UnreadableError as error:
        return None, f"{config} {error}"


def _is_name(model: str, revision: str) -> bool:
    return bool(model) and ".." not in (*model.split("/"), *revision.split("/")) and "\0" not in model + revision


def _is_within(store: Path, path: Path) -> bool:
    return path.resolve().is_relative_to(store.resolve())


def _snapshot(store: Path, model: str, revision: str | None) -> Path | None:
    """Return the directory of this revision's files; None where the store has none."""
    commit = revision or "main"
    if not _is_name(model, commit):
        return None
    try:
        reference = files.read_bytes(str(store / repository(model) / "refs" / commit), 4096)
        commit = reference.decode("ascii", "replace").strip()
    except files.UnreadableError:
        pass  # a commit is its own name
    folder = store / snapshot(model, commit)
    return folder if is_commit(commit) and folder.is_dir() else None


# What a task needs


def require(task: Task, environ: Mapping[str, str]) -> str | None:
    """Return the digest of the model's config.json; None for a model in the image.

    Raises Skipped where a part of the model is missing and may not be fetched.
    """
    store = home(environ)
    digest, problem = config_digest(store, task.model, task.revision)
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


def has(store: Path, task: Task) -> bool:
    """Return whether the store has what the task reads, in every revision inside of what is mounted."""
    try:
        require(task, {"HF_HOME": str(store)})
    except Skipped:
        return False
    found = (store / repository(task.model) / "snapshots").glob("*/config.json")
    return all(_is_within(store, path) for path in found)


def config(task: Task, environ: Mapping[str, str]) -> dict[str, Any] | None:
    """Return the model's config.json; None where it cannot be read (yet: the server may fetch it)."""
    folder = _folder(home(environ), task)
    try:
        found = None if folder is None else files.read_json(str((folder / "config.json").resolve()), _CONFIG_LIMIT)
    except (files.UnreadableError, OSError):
        return None
    return found if isinstance(found, dict) else None


def _folder(store: Path, task: Task) -> Path | None:
    """Return the directory of the model's files; None where it cannot be found."""
    return Path(task.model) if is_directory(task.model) else _snapshot(store, task.model, task.revision)


def _weights(folder: Path) -> Iterator[Path]:
    """Yield weight files that can be read: a link that leads out of the mount is none."""
    return (path for path in folder.rglob("*") if path.suffix in WEIGHT_SUFFIXES and path.exists())


def defaults(environ: Mapping[str, str], private: str) -> dict[str, str]:
    """Return the variables of children unless the task sets them. private: a writable directory of this run."""
    made = {
        "HF_HUB_OFFLINE": "1",
        # Lines in a buffer would come after the teardown's.
        "PYTHONUNBUFFERED": "1",
        # --trust-remote-code writes modules here
        "HF_MODULES_CACHE": f"{private}/modules",
    }
    if not os.access(home(environ), os.W_OK):
        made.update({name: f"{private}/{name.lower()}" for name in WRITES})
    return made
