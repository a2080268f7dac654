"""The JSON Schema and the reference page: current, and in agreement with the parser."""

from __future__ import annotations

import dataclasses
import importlib.resources
import json
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from builder.errors import UsageError
from builder.manifest.document import Document
from builder.manifest.fields import Key, Overrides, keys_of
from builder.manifest.load import load, profiles
from builder.manifest.schema import PAGE_FILE, SCHEMA_FILE, page, schema, sections
from builder.manifest.task_keys import TaskTable
from builder.task import Task

HEAD = 'schema = 1\nimage.ref = "i"\ncache.root = "/c"\n'
TASK = '[[task]]\nmodel = "org/m"\n'
TABLES = {**sections(), "task": TaskTable}
KEYS: list[Any] = [
    pytest.param(key, id=f"{table}.{name}") for table, cls in TABLES.items() for name, key in keys_of(cls).items()
]


def refused_by_schema(document: object) -> list[str]:
    return [error.message for error in jsonschema.Draft202012Validator(schema()).iter_errors(document)]


def test_schema_and_page_are_what_the_fields_generate() -> None:
    remedy = "run: python3 -m builder.manifest.schema"
    assert SCHEMA_FILE.read_text(encoding="utf-8") == json.dumps(schema(), indent=1, ensure_ascii=False) + "\n", remedy
    assert PAGE_FILE.read_text(encoding="utf-8") == page(), remedy


def test_schema_is_a_schema() -> None:
    jsonschema.Draft202012Validator.check_schema(schema())


@pytest.mark.parametrize("key", KEYS)
def test_example_of_a_key_is_accepted(key: Key) -> None:
    value = Document.parse("m", f"value = {key.example}".encode()).data["value"]
    key.kind(value)
    jsonschema.Draft202012Validator(key.kind.schema).validate(value)


@pytest.mark.parametrize("key", KEYS)
def test_text_of_a_key_is_one_sentence_or_more(key: Key) -> None:
    assert key.text.endswith(".") and "\n" not in key.text and key.text[0].isupper()


def test_options_of_keys_are_the_overrides() -> None:
    options = {key.option for table in TABLES.values() for key in keys_of(table).values()} - {""}
    values = {field.name for field in dataclasses.fields(Overrides) if field.default is None}
    assert options == values


def test_keys_of_a_task_are_the_fields_of_a_task() -> None:
    assert set(keys_of(TaskTable)) == {field.name for field in dataclasses.fields(Task)} - {"label"}


@pytest.mark.parametrize("name", profiles())
def test_profile_agrees_with_schema(name: str) -> None:
    raw = (importlib.resources.files("builder") / "profiles" / f"{name}.toml").read_bytes()
    assert refused_by_schema(Document.parse(name, raw).data) == []


@pytest.mark.parametrize(
    "text",
    [
        TASK,
        HEAD.replace("1", '"1"', 1) + TASK,
        HEAD,
        "task = 3\n" + HEAD,
        "image = 3\nschema = 1\ncache.root = '/c'\n" + TASK,
        HEAD + "[imaeg]\n" + TASK,
        HEAD + "cache.mout = '/x'\n" + TASK,
        HEAD.replace('"i"', "3") + TASK,
        HEAD.replace('"i"', '"a b"') + TASK,
        HEAD + "image.setup = 'pip install x'\n" + TASK,
        HEAD.replace('"/c"', '"c"') + TASK,
        HEAD + "cache.mount = []\n" + TASK,
        HEAD + "cache.mount = 'jit'\n" + TASK,
        HEAD + "cache.job_max = true\n" + TASK,
        HEAD + "cache.job_max = 'soon'\n" + TASK,
        HEAD + "cache.job_max = ' '\n" + TASK,
        HEAD + "cache.keep = '2'\n" + TASK,
        HEAD + "cache.keep = 0\n" + TASK,
        HEAD + "cache.older_than = []\n" + TASK,
        HEAD + "cache.max_size = '32 gallons'\n" + TASK,
        HEAD + "cache.max_size = 1.5\n" + TASK,
        HEAD + "models.writable = 'yes'\n" + TASK,
        HEAD + "models.store = 1\n" + TASK,
        HEAD + "container.secrets = 'HF_TOKEN'\n" + TASK,
        HEAD + "container.secrets = ['a b']\n" + TASK,
        HEAD + "container.network = 1\n" + TASK,
        HEAD + "container.shm_size = -1\n" + TASK,
        HEAD + "gpus.count = '8'\n" + TASK,
        HEAD + "gpus.count = true\n" + TASK,
        HEAD + "gpus.count = -1\n" + TASK,
        HEAD + "gpus.devices = true\n" + TASK,
        HEAD + "gpus.devices = 'a-b'\n" + TASK,
        HEAD + "gpus.devices = []\n" + TASK,
        HEAD + "gpus.pretend = 'H900'\n" + TASK,
        HEAD + "gpus.name = ''\n" + TASK,
        HEAD + "gpus.acquire = [1]\n" + TASK,
        HEAD + "run.budget = {}\n" + TASK,
        HEAD + "run.budget = 0\n" + TASK,
        HEAD + "run.parallel = 0\n" + TASK,
        HEAD + "run.lifetime = '2w'\n" + TASK,
        HEAD + "refresh.metrics = 'x'\n" + TASK,
        HEAD + "refresh.when_idle = [1]\n" + TASK,
        HEAD + "args.x = '--tp'\n" + TASK,
        HEAD + "args = 1\n" + TASK,
        HEAD + "defaults.recipe = 'serv'\n" + TASK,
        HEAD + "defaults.model = 'x'\n" + TASK,
        HEAD + "[[task]]\n",
        HEAD + "[[task]]\nmodel = 3\n",
        HEAD + TASK + "modle = 'x'\n",
        HEAD + TASK + "env = 3\n",
        HEAD + TASK + "env.A = 1.5\n",
        HEAD + TASK + "env.'A=' = '1'\n",
        HEAD + TASK + "argv = '--tp 8'\n",
        HEAD + TASK + "argv = ['--tp', 8]\n",
        HEAD + TASK + "gpus = '2'\n",
        HEAD + TASK + "timeout = -1\n",
        HEAD + TASK + "recipe = 'serve'\nrequests = [[1]]\n",
        HEAD + TASK + "recipe = 'serve'\nrequests = [1]\n",
        HEAD + TASK + "recipe = 'shapes'\nshapes_from = 'disk'\n",
        HEAD + TASK + "recipe = 'shapes'\nshapes = 'x'\n",
        HEAD + TASK + "recipe = 'shapes'\nshapes = [1]\n",
        HEAD + TASK + "recipe = 'shapes'\nshapes_from = 'config'\nm_values = [0]\n",
        HEAD + TASK + "workers = -1\n",
        HEAD + TASK + "load = 'none'\n",
        HEAD + TASK + "load = 'dummy'\nlayers = 0\n",
        HEAD + TASK + "verify = 'never'\n",
        HEAD + TASK + "families = ['deepgemm']\n",
        HEAD + TASK + "families = ['cuda']\n",
        HEAD + TASK + "success = 3\n",
    ],
)
def test_value_of_a_wrong_type_is_refused_by_parser_and_schema(tmp_path: Path, text: str) -> None:
    path = tmp_path / "m.toml"
    path.write_text(text)
    with pytest.raises(UsageError):
        load(path)
    assert refused_by_schema(Document.parse("m", text.encode()).data)
