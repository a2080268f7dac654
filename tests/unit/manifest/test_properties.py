"""What the manifest promises about anything at all: garbage, truncations, and manifests with a few mistakes.

It is refused by UsageError, with text that every terminal can show, or it is usable by everything that reads it.
``WARM_CACHE_EXAMPLES`` is the number of examples for each property.
"""

from __future__ import annotations

import dataclasses
import json
import math
import re
import threading
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from builder.cache import coverage
from builder.cache.families import FAMILIES
from builder.cache.toolchain import Record
from builder.engine.api import ContainerSpec
from builder.errors import UsageError
from builder.job import Job
from builder.manifest import values
from builder.manifest.document import Document, find_lines
from builder.manifest.fields import Overrides
from builder.manifest.labels import digest, labels
from builder.manifest.load import Manifest, load, select
from builder.manifest.schema import schema
from builder.manifest.task_keys import LOADS, SHAPES_FROM, VERIFY
from builder.task import RECIPES, Shape, Task
from tests.strategies import EXAMPLES, FUZZ, attempt, damaged, harmless, numbers, texts

pytestmark = pytest.mark.timeout(120 + EXAMPLES * 0.2)

RECORD: Record = {
    "schema": 2,
    "factors": {},
    "gpus": [],
    "sglang": {"version": "0.5.23", "commit": "abc", "sources": None},
    "variables": {},
    "observed": {},
}
SCHEMA = jsonschema.Draft202012Validator(schema())


MANIFEST = '''\
schema = 1
[image]
ref = "lmsysorg/sglang:v0.5.23"
setup = ["pip install x", 'echo "a b"']
[cache]
root = "/data/jit"
mount = "/jit"
job_max = "6h"
[models]
store = "/data/huggingface"
writable = false
[container]
network = "bridge"
shm_size = "32g"
secrets = ["HF_TOKEN"]
[gpus]
count = 4
devices = "4-7"
name = "H200"
[run]
budget = "55m"
grace = 8
parallel = 3
[args]
tp = ["--tp", "4"]
both = ["@tp", "--dp", "4"]
[defaults]
timeout = "1h30m"
env = { SGLANG_A = "1", B = 2 }
[[task]]
model = "deepseek-ai/DeepSeek-V3"
argv = [
    "@both", # all of them
    "--json", '{"a": [1]}',
]
layers = 4
load = "dummy"
[[task]]
model = "example/é"
recipe = "command"
argv = ["python3", "-c", """print('KERNELS
READY')"""]
success = 'KERNELS\\s+READY'
families = ["triton"]
[task.env]
X = ""
[[task]]
model = "a/b"
recipe = "shapes"
shapes = ["GEMM_NT_F8F8BF16 N=4096, K=7168, num_groups=1"]
shapes_from = ["markers"]
workers = 2
gpus = 1
m_values = [1, 64]
'''

_ASSIGNMENT = re.compile(r"^([A-Za-z_.]+ = )[^\n]+$", re.MULTILINE)

toml_values = st.one_of(
    st.sampled_from([
        "0", "-1", "true", "0x" + "f" * 5000, "9" * 400, "9" * 5000, "1e400", "nan", "-inf", "1.5", "07:32:00",
        "1979-05-27T07:32:00Z", "[]", "[[]]", "{}", "{a = 1}", "[" * 200 + "]" * 200, "[" * 5000 + "]" * 5000,
        "{a=" * 200 + "1" + "}" * 200, '""', '" "', '"1e"', '"' + "9" * 400 + 'g"', '"' + "9" * 400 + 'm"',
        '"' + "9" * 5000 + 's"', '"99999999999999999d"', "1e300", "9223372036854775807", "9223372036854775808",
        '"\\u0000"', '"\\u001B[31m"', '"\\u202E"', '"\\u0085\\n"', "'*'", "'(?i)a'", "'a(?i)'", "'[[a]'", "'(?<\\x1b'",
        "'\\'", "'" + "(" * 3000 + "'", "'a{99999999999}'", "'\\N{DIGIT ONE}'", "'\\u0041'", "'(?u)a'", "'(?P<é>a)'",
        "'[é-z]'", '"(?\\u001B)"', '"\\u001B\\\\q"', '"GEMM_A N=' + "1" * 5000 + ', K=1, num_groups=1"',
        '["GEMM_A N=٣, K=1, num_groups=1"]', '["a", 1]', '[["--tp"]]', '"--tp"', '"0-999,0"', '"volume:x"', "[1, 1]",
        '["HF_TOKEN", "hf_aaaaaaaaaaaaaaaaaaaaaaaa"]',
        '["@tp"]', '["@both", "@"]', '["@@x"]', '"H200"', "\"\"\"a\\\n  b\"\"\"", "'''\n'''", '"""""a"""""',
    ]),
    texts.map(lambda text: json.dumps(text, ensure_ascii=False)),
)  # fmt: skip


NAMES = ["tsk", "model", "tp", "pretend", "gpus", '"\\u001b[31m"', '"a\\nb"', "'\u202e'", "env.A", "a.b.c", '"."']


@st.composite
def toml_mutations(draw: st.DrawFn) -> bytes:
    """The manifest with a few lines replaced, removed, doubled or moved, or with bytes damaged."""
    text = MANIFEST
    for _ in range(draw(st.integers(1, 4))):
        lines = text.split("\n")
        at = draw(st.integers(0, len(lines) - 1))
        how = draw(st.sampled_from(["value", "value", "value", "value", "remove", "double", "move", "insert"]))
        if how == "value":
            found = list(_ASSIGNMENT.finditer(text))
            chosen = draw(st.sampled_from(found)) if found else None
            if chosen is not None:
                text = text[: chosen.end(1)] + draw(toml_values) + text[chosen.end() :]
            continue
        line = lines[at]
        if how in ("remove", "move"):
            del lines[at]
        if how in ("double", "move"):
            lines.insert(draw(st.integers(0, len(lines))), line)
        if how == "insert":
            name = draw(st.sampled_from(NAMES))
            lines.insert(at, draw(st.sampled_from([f"{name} = {draw(toml_values)}", f"[{name}]", f"[[{name}]]"])))
        text = "\n".join(lines)
    raw = text.encode("utf-8", "surrogatepass")
    return draw(st.sampled_from([raw, raw, b"\xef\xbb\xbf" + raw])) if draw(st.booleans()) else draw(damaged(raw))


def read_manifest(place: Path, raw: bytes, overrides: Overrides = Overrides()) -> Manifest | None:
    """Return the manifest; None where it was refused as documented, which is checked."""
    path = place / "m.toml"
    path.write_bytes(raw)
    manifest, refused = attempt(lambda: load(path, overrides=overrides), UsageError)
    if refused is not None:
        assert refused.problems
        assert harmless(refused.message), refused.message
        for problem in refused.problems:
            assert harmless(str(problem)), str(problem)
            assert problem.text
            found = re.fullmatch(re.escape(str(path)) + r":([1-9]\d*)|--[a-z-]+", problem.location)
            assert found, problem.location
            assert int(found[1] or 1) <= raw.count(b"\n") + 1
    if manifest is not None:
        assert_usable(manifest)
        problems = [error.message for error in SCHEMA.iter_errors(Document.parse("m", raw).data)]
        assert not problems, "the schema refuses what the parser accepts"
    return manifest


def assert_usable(manifest: Manifest) -> None:
    """Check what the rest of the program relies on."""
    run = manifest.run
    longest = max((max(task.timeout, task.silence) for task in manifest.tasks), default=0)
    durations = [run.budget or 1, run.lock_timeout, run.start, run.grace, run.lifetime, manifest.cache.job_max, longest]
    assert all(0 <= seconds < threading.TIMEOUT_MAX for seconds in durations)
    assert len({task.label.lower() for task in manifest.tasks}) == len(manifest.tasks)
    for task in manifest.tasks:
        job = Job(mode="run", nonce="cafe", mount=manifest.cache.mount, task=task, lifetime=run.lifetime)
        assert Job.from_json(job.to_json()) == job
        coverage.coverage_digest(coverage.coverage(task, record=RECORD, config_digest=None))
        re.compile((task.success or "").encode(), re.MULTILINE)  # as the container does
        json.dumps(ContainerSpec(image=manifest.image.ref, name=task.label, env=task.env).body()).encode("ascii")


@FUZZ
@given(st.one_of(st.binary(max_size=200), st.text(max_size=80).map(lambda text: text.encode("utf-8", "surrogatepass"))))
@example(b"\xef\xbb\xbf\n\n\xff")
@example(b"a = " + b"9" * 5000)
@example(b"a = 0x" + b"f" * 5000)
@example(b"schema = 0x" + b"f" * 5000)
def test_manifest_of_garbage_is_refused(place: Path, raw: bytes) -> None:
    assert read_manifest(place, raw) is None


def test_manifest_cut_short_is_refused_or_whole(place: Path) -> None:
    raw = MANIFEST.encode()
    whole = read_manifest(place, raw)
    assert whole is not None
    for size in range(0, len(raw), 1 if EXAMPLES > 100 else 3):
        cut = read_manifest(place, raw[:size])
        assert cut is None or len(cut.tasks) <= len(whole.tasks), size


@FUZZ
@given(toml_mutations())
@example(MANIFEST.replace('"32g"', '"' + "9" * 400 + 'g"').encode())
@example(MANIFEST.replace("B = 2", "B = [0x" + "f" * 5000 + "]").encode())
@example(MANIFEST.replace('"1h30m"', "1e300").encode())
@example(MANIFEST.replace("[args]", '[args]\n"\\u001b[31m" = 0').encode())
@example(MANIFEST.replace("KERNELS\\s+READY", "a{99999999999}").encode())
@example(MANIFEST.replace("KERNELS\\s+READY", "[[a]").encode())
@example(MANIFEST.replace("KERNELS\\s+READY", "\\u0041").encode())
@example(MANIFEST.replace("'KERNELS\\s+READY'", '"(?\\u001b)"').encode())
@example(MANIFEST.replace("N=4096", "N=" + "1" * 5000).encode())
def test_manifest_with_mistakes_is_refused_or_usable(place: Path, raw: bytes) -> None:
    read_manifest(place, raw)


@FUZZ
@given(
    st.fixed_dictionaries(
        {},
        optional={
            field.name: st.one_of(texts, numbers if field.name in ("budget", "timeout", "silence", "grace") else texts)
            for field in dataclasses.fields(Overrides)
        },
    )
)
def test_overrides_are_refused_or_usable(place: Path, given: dict[str, Any]) -> None:
    read_manifest(place, MANIFEST.encode(), Overrides(**given))


@FUZZ
@given(st.lists(st.one_of(texts, st.sampled_from(["*", "DeepSeek-V3", "[a", "[z-a]", "?" * 40, "*" * 40]))))
def test_select_any_pattern_selects_or_is_refused(place: Path, only: list[str]) -> None:
    (place / "m.toml").write_text(MANIFEST)
    manifest = load(place / "m.toml")
    selected, refused = attempt(lambda: select(manifest, only), UsageError)
    if refused is not None:
        assert refused.problems
        assert all(problem.location == "--only" and harmless(str(problem)) for problem in refused.problems)
    if selected is not None:
        assert {task.label for task in selected.tasks} <= {task.label for task in manifest.tasks}


def toml_string(text: str) -> str:
    return '"' + "".join(c if c.isprintable() and c not in '"\\' else f"\\U{ord(c):08x}" for c in text) + '"'


def toml(value: Any) -> str:
    if isinstance(value, (tuple, list)):
        return "[" + ", ".join(map(toml, value)) + "]"
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{toml_string(name)} = {toml(inner)}" for name, inner in value.items()) + "}"
    return toml_string(str(value)) if isinstance(value, (str, Shape)) else repr(value)


def toml_task(task: Task) -> str:
    """The task as a manifest has it: what differs from a task's defaults."""
    plain = Task(label=task.label, model="", recipe="")
    given = {field.name: getattr(task, field.name) for field in dataclasses.fields(Task)}
    # In argv "@x" is the name of a group.
    given["argv"] = tuple(f"@{word}" if word.startswith("@") and word != "@" else word for word in task.argv)
    return "[[task]]\n" + "".join(
        f"{name} = {toml(value)}\n" for name, value in given.items() if value != getattr(plain, name)
    )


arguments = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=8)
#: Without options that a manifest refuses, such as --model; Hypothesis finds those in the sources.
accepted = arguments.filter(lambda argument: not argument.startswith("--"))
shapes = st.builds(Shape, st.sampled_from(["GEMM_A", "B9"]), *3 * [st.integers(0, 10**12 - 1)])
durations = st.one_of(st.integers(1, 1 << 24).map(float), st.floats(1e-6, values.LONGEST))


@st.composite
def tasks(draw: st.DrawFn) -> Task:
    """A task that a manifest may ask for; not yet labelled."""
    recipe = draw(st.sampled_from(sorted(RECIPES)))
    server = recipe in ("compile-deep-gemm", "serve")
    load = draw(st.sampled_from(LOADS)) if server else "weights"
    variables = st.dictionaries(st.from_regex(r"[A-Za-z_]{1,3}_[0-9]", fullmatch=True), arguments, max_size=3)
    optional: dict[str, Any] = {
        "shapes": {
            "shapes": st.lists(shapes, min_size=1, max_size=3).map(tuple),
            "shapes_from": st.lists(st.sampled_from(SHAPES_FROM), unique=True).map(tuple),
            "workers": st.integers(0, 99),
        }
    }.get(recipe, {})
    return Task(
        label="",
        model=draw(arguments.filter(str.strip)),
        recipe=recipe,
        argv=draw(st.lists(accepted, min_size=recipe == "command", max_size=4).map(tuple)),
        env=draw(variables),
        revision=draw(st.none() | arguments.filter(str.strip)),
        timeout=draw(durations),
        silence=draw(durations),
        success="READY" if recipe == "command" else draw(st.sampled_from([None, "a+", "(?i)x\\d"])),
        families=draw(st.none() | st.lists(st.sampled_from(CLAIMABLE), unique=True).map(tuple)),
        m_values=draw(st.lists(st.integers(1, 1 << 20), max_size=3).map(tuple)) if recipe == "shapes" else (),
        load=load,
        layers=draw(st.none() | st.integers(1, 99)) if load != "weights" else None,
        verify=draw(st.sampled_from([way for way in VERIFY if way != "steady" or recipe == "serve"])),
        **{name: draw(strategy) for name, strategy in optional.items()},
    )


CLAIMABLE = [family.name for family in FAMILIES if family.claimable]


@settings(FUZZ, max_examples=max(1, EXAMPLES // 3))
@given(st.lists(tasks(), max_size=3, unique_by=digest))
def test_tasks_written_to_a_manifest_and_a_job_are_read_back(place: Path, wanted: list[Task]) -> None:
    head = "schema = 1\nimage.ref = 'x'\ncache.volume = 'xy'\ngpus.count = 0\n"
    raw = (head + ("".join(map(toml_task, wanted)) or "task = []\n")).encode()
    manifest = read_manifest(place, raw)
    assert manifest is not None
    named = tuple(dataclasses.replace(task, label=label) for task, label in zip(wanted, labels(wanted), strict=True))
    assert manifest.tasks == named
    lines = find_lines(raw.decode())
    text = raw.decode().split("\n")
    for number in range(len(wanted)):
        assert text[lines["task", number] - 1] == "[[task]]"
        assert text[lines["task", number, "model"] - 1].startswith("model = ")
    for task in named:
        job = Job(mode="run", nonce="n", mount="/jit", task=task)
        assert Job.from_json(job.to_json()).task == task


@FUZZ
@given(
    st.one_of(texts, numbers, st.from_regex(r"([0-9]{1,400}(\.[0-9]{1,9})? ?[dhmskgtDHMSKGTi]*b?)+", fullmatch=True))
)
def test_duration_or_size_of_any_text_is_a_number_or_refused(value: Any) -> None:
    converters: list[Callable[[Any], float]] = [values.seconds, values.positive_seconds, values.size]
    for convert in converters:
        number, refused = attempt(partial(convert, value), ValueError)
        assert refused is None or harmless(str(refused))
        if number is not None:
            assert math.isfinite(number)
            assert number >= 0
            if convert is not values.size:
                assert number < threading.TIMEOUT_MAX
