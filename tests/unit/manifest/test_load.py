"""The manifest: what is accepted, and what is refused, with which location and remedy."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from pathlib import Path
from textwrap import dedent

import pytest
from hypothesis import given
from hypothesis import strategies as st

from builder.errors import Problem, UsageError
from builder.manifest.document import Document
from builder.manifest.fields import Overrides
from builder.manifest.load import Manifest, load, profiles, select
from builder.task import Shape
from tests.strategies import FUZZ

Write = Callable[[str], Path]

HEAD = """\
schema = 1
[image]
ref = "lmsysorg/sglang:v0.5.23"
[cache]
root = "/data/jit"
"""
TASK = '[[task]]\nmodel = "org/model"\n'


@pytest.fixture
def write(tmp_path: Path) -> Write:
    def write(text: str) -> Path:
        path = tmp_path / "m.toml"
        path.write_text(dedent(text), encoding="utf-8")
        return path

    return write


def problems(path: Path, overrides: Overrides = Overrides()) -> list[Problem]:
    with pytest.raises(UsageError) as caught:
        load(path, overrides=overrides)
    return list(caught.value.problems)


def only_problem(path: Path, overrides: Overrides = Overrides()) -> str:
    found = problems(path, overrides)
    assert len(found) == 1, [str(problem) for problem in found]
    return str(found[0]).replace(str(path), "m.toml")


class TestGood:
    def test_load_minimal_manifest_has_defaults(self, write: Write) -> None:
        manifest = load(write(HEAD + TASK))
        assert manifest.cache.root == Path("/data/jit")
        assert (manifest.cache.volume, manifest.cache.mount, manifest.cache.job_max) == (None, "/jit", 21600)
        assert manifest.container.shm_size == 32 << 30
        assert manifest.container.secrets == ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN")
        assert (manifest.gpus.count, manifest.models.store, manifest.run.budget) == (8, None, None)
        (task,) = manifest.tasks
        assert (task.label, task.recipe, task.gpus, task.timeout, task.silence) == (
            "model",
            "compile-deep-gemm",
            8,
            1200,
            600,
        )

    def test_load_manifest_with_every_section(self, write: Write) -> None:
        manifest = load(
            write("""\
                schema = 1
                [image]
                ref = "r:1"
                setup = ["pip install x"]
                [cache]
                volume = "sglang-jit"
                mount = "/root/.cache/jit"
                job_max = "3h"
                [models]
                store = "/data/hf"
                writable = true
                [container]
                network = "host"
                shm_size = "2GiB"
                secrets = ["MY_TOKEN"]
                log_limit = "1m"
                [gpus]
                devices = "4-7"
                name = "H200"
                acquire = ["drain"]
                release = ["undrain"]
                [run]
                budget = "1h30m"
                lock_timeout = 0
                start = "45s"
                grace = 3
                lifetime = "4h"
                [defaults]
                recipe = "serve"
                timeout = 90
                env = { A = "1", B = "1" }
                [[task]]
                model = "org/m"
                revision = "abc"
                argv = ["--tp", "2"]
                gpus = 2
                requests = [[1, 2]]
                load = "dummy"
                layers = 4
                verify = "steady"
                families = ["triton", "deep_gemm"]
                success = "ready"
                env = { B = 2 }
                [[task]]
                model = "org/s"
                recipe = "shapes"
                shapes = ["<GEMM_NT_F8F8BF16>, N=4096, K=7168, num_groups=1"]
                m_values = [64, 128]
                """)
        )
        assert (manifest.cache.volume, manifest.cache.root, manifest.cache.mount) == (
            "sglang-jit",
            None,
            "/root/.cache/jit",
        )
        assert (manifest.container.shm_size, manifest.container.log_limit) == (2 << 30, 1 << 20)
        assert (manifest.gpus.devices, manifest.gpus.count) == ((4, 5, 6, 7), 4)
        run = manifest.run
        assert (run.budget, run.lock_timeout, run.start, run.grace, run.lifetime) == (5400, 0, 45, 3, 14400)
        first, second = manifest.tasks
        assert dict(first.env) == {"A": "1", "B": "2"}
        assert (first.requests, first.families, first.timeout) == (((1, 2),), ("triton", "deep_gemm"), 90)
        assert (second.shapes, second.m_values, second.gpus) == ((Shape("GEMM_NT_F8F8BF16", 4096, 7168),), (64, 128), 4)

    def test_load_with_overrides_prefers_them(
        self, write: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.chdir(tmp_path)
        path = write(HEAD + TASK + 'timeout = "5m"\n')
        manifest = load(
            path, overrides=Overrides(image="other:1", cache="here", models="hf", budget="9m", timeout="7", silence=5)
        )
        assert manifest.image.ref == "other:1"
        assert (manifest.cache.root, manifest.models.store) == (tmp_path / "here", tmp_path / "hf")
        assert manifest.run.budget == 540
        assert (manifest.tasks[0].timeout, manifest.tasks[0].silence) == (7, 5)
        volume = load(path, overrides=Overrides(cache="volume:jit"))
        assert (volume.cache.root, volume.cache.volume) == (None, "jit")

    def test_load_accepts_empty_families(self, write: Write) -> None:
        (task,) = load(write(HEAD + TASK + 'recipe = "command"\nargv = ["true"]\nsuccess = "x"\nfamilies = []\n')).tasks
        assert task.families == ()

    def test_lifetime_default_is_longer_than_the_run(self, write: Write) -> None:
        tasks_ = "".join(f'[[task]]\nmodel = "org/m{n}"\ntimeout = "1h"\n' for n in range(5))
        assert load(write(HEAD + tasks_)).run.lifetime > 5 * 3600
        assert load(write(HEAD + '[run]\nbudget = "30m"\n' + tasks_)).run.lifetime == 7200

    @pytest.mark.parametrize("name", profiles())
    def test_load_profile_has_tasks(self, name: str) -> None:
        manifest = load(profile=name, overrides=Overrides(cache="/c"))
        assert len(manifest.tasks) >= 2

    def test_h200_profile_has_the_models_of_the_tests(self) -> None:
        manifest = load(profile="h200")
        assert (manifest.gpus.count, manifest.gpus.name) == (8, "H200")
        labels = {task.label for task in manifest.tasks}
        assert {"GLM-5.2-FP8-tp8", "GLM-5.2-FP8-tp8-dp8", "MiniMax-M2.5-tp8-ep8"} <= labels
        assert {"DeepSeek-V3-0324-tp8", "MiMo-V2-Flash-tp4-dp2", "MiMo-V2.5-tp8-dp2"} <= labels


class TestBad:
    """One problem each: the text of the file, and the message about it."""

    @pytest.mark.parametrize(
        ("text", "expected"),
        [
            (HEAD.replace("schema = 1\n", "") + TASK, "m.toml:1: the file needs 'schema'."),
            (HEAD.replace("= 1", "= 2", 1) + TASK, "m.toml:1: schema 2 is not known to this builder; it reads schema 1."),
            (HEAD + "[imaeg]\n" + TASK, "m.toml:6: the file has no key 'imaeg'; did you mean 'image'?"),
            (HEAD + "mout = '/x'\n" + TASK, "m.toml:6: [cache] has no key 'mout'; did you mean 'mount'?"),
            (HEAD + "volume = 'jit'\n" + TASK, "m.toml:6: [cache] has both root and volume: keep one of them."),
            (HEAD.replace("/data/jit", "jit") + TASK, "m.toml:5: root: expected an absolute path, found 'jit'."),
            (HEAD + "mount = 'jit'\n" + TASK, "m.toml:6: mount: expected an absolute path of letters"),
            (HEAD + "mount = '/jit/../root'\n" + TASK, "m.toml:6: mount: expected an absolute path of letters"),
            (HEAD + "mount = '/a:b'\n" + TASK, "m.toml:6: mount: expected an absolute path of letters"),
            (HEAD + "mount = '/root/.cache/'\n" + TASK, "m.toml:6: mount: the mount would hide what image and program have in /root/.cache"),
            (HEAD + "[gpus]\ncount = '8'\n" + TASK, "m.toml:7: count: expected an integer, found a string: '8'."),
            (HEAD + "[gpus]\ncount = true\n" + TASK, "m.toml:7: count: expected an integer, found a boolean: True."),
            (HEAD + "[gpus]\ncount = -1\n" + TASK, "m.toml:7: count: expected a number of at least 0, found -1."),
            (HEAD + "[gpus]\ncount = 8\ndevices = '4-7'\n" + TASK, "m.toml:8: devices names 4 GPUs, and count is 8."),
            (HEAD + "[gpus]\ndevices = '7-4'\n" + TASK, "m.toml:7: devices: expected GPU indices such as"),
            (HEAD + "[gpus]\ndevices = [1, 1]\n" + TASK, "m.toml:7: devices: expected at least one GPU, and every GPU once"),
            (HEAD + "[gpus]\ndevices = '0-3,2'\n" + TASK, "m.toml:7: devices: expected at least one GPU, and every GPU once"),
            (HEAD + "[run]\nbudget = 'soon'\n" + TASK, "m.toml:7: budget: expected a duration such as"),
            (HEAD + "[run]\nbudget = 0\n" + TASK, "m.toml:7: budget: expected more than 0 seconds, found 0."),
            (HEAD + "[run]\nlifetime = '20m'\n" + TASK, "m.toml:7: lifetime is not longer than the longest task timeout (1200 s)."),
            (HEAD + "[container]\nshm_size = '32 gallons'\n" + TASK, "m.toml:7: shm_size: expected a size such as"),
            (HEAD + "[container]\nsecrets = ['a b']\n" + TASK, "m.toml:7: secrets: item 1: expected the NAME of an environment variable"),
            (HEAD + "image = 3\n" + TASK, "m.toml:6: [cache] has no key 'image'; known: "),
            (HEAD + "[models]\nwritable = 'yes'\n" + TASK, "m.toml:7: writable: expected true or false, found a string: 'yes'."),
            (HEAD, "m.toml:1: there is no [[task]]: a manifest names at least one model."),
            (HEAD + "[[task]]\nrecipe = 'serve'\n", "m.toml:6: [[task]] needs 'model'."),
            (HEAD + TASK + "recipe = 'serv'\n", "m.toml:8: recipe: there is no recipe 'serv' (did you mean 'serve'?)."),
            (HEAD + TASK + "recipe = []\n", "m.toml:8: recipe: expected"),
            (HEAD + TASK + "families = ['deepgemm']\n", "m.toml:8: families: item 1: there is no family 'deepgemm' (did you mean 'deep_gemm'?)."),
            (HEAD + TASK + "families = ['cuda']\n", "m.toml:8: families: item 1: the family 'cuda' cannot be claimed"),
            (HEAD + TASK + "argv = '--tp 8'\n", "m.toml:8: argv: expected a list of arguments, found a string: '--tp 8'; write"),
            (HEAD + TASK + "argv = ['--tp', 8]\n", "m.toml:8: argv: item 2: expected a string, found an integer: 8."),
            (HEAD + TASK + "argv = ['--model-path=x']\n", "m.toml:8: argv holds --model-path: set the model with 'model'."),
            (HEAD + TASK + "argv = ['--api-key', 'x']\n", "m.toml:8: argv holds --api-key"),
            (HEAD + TASK + "argv = ['--tp', '16']\n", "m.toml:8: tp × pp is 16, and the task has 8 GPUs."),
            (HEAD + TASK + "gpus = 9\n", "m.toml:8: the task needs 9 GPUs, and [gpus] count is 8."),
            (HEAD + TASK + "success = '('\n", "m.toml:8: success: '(' is no regular expression"),
            (HEAD + TASK + "recipe = 'shapes'\n", "m.toml:6: a task with the recipe 'shapes' needs 'shapes'"),
            (HEAD + TASK + "recipe = 'shapes'\nshapes = []\n", "m.toml:9: shapes is empty"),
            (HEAD + TASK + "recipe = 'shapes'\nshapes = ['N=1']\n", "m.toml:9: shapes: item 1: 'N=1' is not of the form"),
            (HEAD + TASK + "m_values = [64]\n", "m.toml:8: m_values has no meaning for the recipe 'compile-deep-gemm'; it is for shapes."),
            (HEAD + TASK + "recipe = 'command'\nsuccess = 'x'\n", "m.toml:6: a task with the recipe 'command' needs 'argv'."),
            (HEAD + TASK + "recipe = 'command'\nargv = ['x']\n", "m.toml:6: a task with the recipe 'command' needs evidence"),
            (HEAD + TASK + "verify = 'steady'\n", "m.toml:8: verify = 'steady' repeats requests; it is for serve."),
            (HEAD + TASK + "layers = 2\n", "m.toml:8: layers keeps a few layers"),
            (HEAD + TASK + "requests = [[1]]\nrecipe = 'serve'\n", "m.toml:8: requests: item 1: expected [prompt tokens, new tokens]"),
            (HEAD + TASK + TASK, "m.toml:8: this task is the same as the one at m.toml:6."),
            (HEAD + TASK + "[task.env]\nA = 1.5\n", "m.toml:9: env: A: expected a string, found a number: 1.5."),
            (HEAD + TASK + "[task.env]\n'A=' = '1'\n", "m.toml:9: env: 'A=' is no name of an environment variable."),
            (HEAD + TASK + "env.SGLANG_DG_CACHE_DIR = '/x'\n", "m.toml:8: env: SGLANG_DG_CACHE_DIR is set by the builder"),
            (HEAD + "[defaults]\ntimout = 3\n" + TASK, "m.toml:7: [defaults] has no key 'timout'; did you mean 'timeout'?"),
        ],
    )  # fmt: skip
    def test_load_bad_value_reports_line_and_remedy(self, write: Write, text: str, expected: str) -> None:
        assert only_problem(write(text)).startswith(expected)

    def test_devices_with_millions_of_gpus_are_refused_quickly(self, write: Write) -> None:
        path = write(HEAD + f"[gpus]\ndevices = '{','.join(['0-999'] * 170_000)}'\n" + TASK)
        began = time.monotonic()
        message = only_problem(path)
        assert time.monotonic() - began < 5, "170 million GPUs take a minute and the machine's memory"
        assert (
            message.startswith("m.toml:7: devices: expected at least one GPU, and every GPU once")
            and len(message) < 300
        )

    @pytest.mark.parametrize("name", ["HF_TOKEN", "MY_PASSWORD", "aws_secret", "OPENAI_API_KEY", "X_CREDENTIALS"])
    def test_env_with_secret_name_is_refused_without_its_value(self, write: Write, name: str) -> None:
        message = only_problem(write(HEAD + TASK + f"env = {{ {name} = 'pssst' }}\n"))
        assert message.startswith(f"m.toml:8: env: {name} is a secret")
        assert "pssst" not in message

    def test_secret_in_another_key_is_not_repeated(self, write: Write) -> None:
        value = "hf_" + "a" * 30
        for line in (f"argv = ['{value}']", f"env = {{ A = '{value}' }}"):
            assert value not in only_problem(write(HEAD + TASK + line))
        assert value not in only_problem(write(HEAD + f"[container]\nsecrets = ['{value}']\n" + TASK))

    def test_env_with_harmless_token_switch_is_accepted(self, write: Write) -> None:
        load(write(HEAD + TASK + "env = { SGLANG_MAX_TOKENS = '1', DG_TOKENIZER = 'x' }\n"))

    def test_load_reports_all_problems_by_line(self, write: Write) -> None:
        path = write(
            "schema = 1\nnope = 1\n[image]\nref = 1\n[cache]\nmount = 'x'\n[[task]]\nmodel = 2\ntimeout = 'x'\n"
        )
        lines = [int(problem.location.rpartition(":")[2]) for problem in problems(path)]
        assert lines == sorted(lines)
        assert set(lines) == {2, 4, 5, 6, 8, 9}

    def test_load_without_image_and_cache_needs_options(self, write: Write) -> None:
        texts = [problem.text for problem in problems(write("schema = 1\n" + TASK))]
        assert texts == ["there is no image:", "there is no cache:"]
        load(write("schema = 1\n" + TASK), overrides=Overrides(image="x", cache="/c"))

    def test_bad_override_is_reported_at_its_option(self, write: Write) -> None:
        path = write(HEAD + TASK)
        overrides = Overrides(budget="never", cache="volume:!", lock_timeout="x")
        places = {problem.location for problem in problems(path, overrides)}
        assert places == {"--budget", "--cache", "--lock-timeout"}

    def test_task_that_is_no_table_is_refused(self, write: Write) -> None:
        assert only_problem(write("task = 3\n" + HEAD)).startswith("m.toml:1: task: expected a list of [[task]]")


class TestUnreadable:
    def test_load_missing_file_is_refused(self, tmp_path: Path) -> None:
        assert "No such file" in str(problems(tmp_path / "none.toml")[0])

    def test_load_directory_is_refused(self, tmp_path: Path) -> None:
        assert "directory" in str(problems(tmp_path)[0])

    @pytest.mark.parametrize(
        ("raw", "line", "text"),
        [
            (b"schema = 1\nx = \n", 2, "Invalid value"),
            (b"schema = 1\n\n[image\n", 3, "Expected"),
            (b"schema = 1\nref = '", 2, "Expected"),
            (b"schema = 1\n# caf\xe9\n", 2, "byte 0xe9 is not UTF-8."),
            (b"a = 1\na = 2\n", 2, "Cannot overwrite a value"),
            (b"a = " + b"[" * 5000, 1, ""),
        ],
    )
    def test_parse_invalid_text_reports_its_line(self, tmp_path: Path, raw: bytes, line: int, text: str) -> None:
        path = tmp_path / "m.toml"
        path.write_bytes(raw)
        (problem,) = problems(path)
        assert text in problem.text
        assert problem.location == f"{path}:{line}"

    def test_parse_accepts_byte_order_mark_and_carriage_returns(self, tmp_path: Path) -> None:
        path = tmp_path / "m.toml"
        path.write_bytes(b"\xef\xbb\xbf" + (HEAD + TASK).replace("\n", "\r\n").encode())
        assert len(load(path).tasks) == 1

    def test_load_unknown_profile_suggests_a_known_one(self) -> None:
        with pytest.raises(UsageError) as caught:
            load(profile="h20")
        assert "did you mean 'h200'?" in str(caught.value.problems[0])

    @FUZZ
    @given(st.binary(max_size=200))
    def test_parse_any_bytes_raises_nothing_but_usage_error(self, raw: bytes) -> None:
        with contextlib.suppress(UsageError):
            Document.parse("m", raw)


class TestSelect:
    @pytest.fixture
    def h200(self) -> Manifest:
        return load(profile="h200")

    @pytest.mark.parametrize(
        ("only", "labels"),
        [
            (["deepseek-ai/DeepSeek-V3-0324"], ["DeepSeek-V3-0324-tp8"]),
            (["GLM-5.2-FP8"], ["GLM-5.2-FP8-tp8-dp8", "GLM-5.2-FP8-tp8"]),
            (["glm-5.2-fp8-tp8", "mimo*"], ["GLM-5.2-FP8-tp8", "MiMo-V2.5-tp8-dp2", "MiMo-V2-Flash-tp4-dp2"]),
        ],
    )
    def test_select_by_model_last_part_label_or_glob(self, h200: Manifest, only: list[str], labels: list[str]) -> None:
        assert [task.label for task in select(h200, only).tasks] == labels

    def test_select_without_patterns_returns_everything(self, h200: Manifest) -> None:
        assert select(h200, []) is h200

    def test_select_pattern_without_match_suggests_names(self, h200: Manifest) -> None:
        with pytest.raises(UsageError) as caught:
            select(h200, ["GLM-5.2-FP8", "DeepSeek-V3.1", "nothing-like-it-at-all"])
        first, second = caught.value.problems
        assert "did you mean 'DeepSeek-V" in str(first)
        assert "known: " in str(second)


def test_setup_holding_token_is_refused_by_name(write: Write) -> None:
    """Image history keeps the command lines."""
    token = "hf_" + "A" * 24
    said = only_problem(write(HEAD.replace("[cache]", f'setup = ["true", "echo {token}"]\n[cache]') + TASK))
    assert "item 2: it holds what looks like an access token" in said and token not in said


def test_load_manifest_without_end_is_refused(tmp_path: Path) -> None:
    large = tmp_path / "large.toml"
    large.write_bytes(b"#" * ((1 << 20) + 1))
    for path in (large, Path("/dev/zero")):
        with pytest.raises(UsageError) as refused:
            load(path)
        assert "it has more than 1 MiB" in str(refused.value.problems[0])
