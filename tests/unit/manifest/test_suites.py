"""Which test files belong to a suite: registrations in the forms that upstream's parser takes."""

from __future__ import annotations

from pathlib import Path

import pytest

from builder.errors import UsageError
from builder.manifest import suites
from builder.recording import TestFile
from tests.checkout import Checkout


@pytest.fixture
def checkout(tmp_path: Path) -> Checkout:
    return Checkout(tmp_path)


def test_read_joins_stage_and_runner() -> None:
    source = b'register_cuda_ci(est_time=9, stage="base-c", runner_config="8-gpu-h200")\n'
    assert suites.read(source) == ([suites.Registration("base-c-test-8-gpu-h200", "", 1)], False)


@pytest.mark.parametrize(
    ("call", "suite", "disabled"),
    [
        ('register_cuda_ci(9, "legacy-8-gpu-h200")', "legacy-8-gpu-h200", ""),
        ('register_cuda_ci(9, "legacy", False, "broken")', "legacy", "broken"),
        ('register_cuda_ci(9, "legacy", disabled="later")', "legacy", "later"),
        ('register_cuda_ci(9, suite="legacy", nightly=True, disabled=None)', "legacy", ""),
        ('ci_register.register_cuda_ci(9, stage="a", runner_config="b")', "a-test-b", ""),
    ],
)
def test_read_takes_positional_arguments_and_disabled(call: str, suite: str, disabled: str) -> None:
    assert suites.read(call.encode())[0] == [suites.Registration(suite, disabled, 1)]


def test_read_refuses_argument_that_is_no_literal() -> None:
    with pytest.raises(ValueError, match="suite of register_cuda_ci is no literal"):
        suites.read(b"register_cuda_ci(9, SUITE)")


def registered(suite: str, more: str = "") -> str:
    stage, _, runner = suite.partition("-test-")
    return f'register_cuda_ci(est_time=9, stage="{stage}", runner_config="{runner}"{more})\n'


@pytest.fixture
def four(checkout: Checkout) -> Checkout:
    checkout.test("test_a.py", registered("base-c-test-8-gpu-h200"), head="")
    checkout.test("test_b.py", registered("nightly-test-8-gpu-h200"), head="")
    checkout.test("test_c.py", registered("base-c-test-8-gpu-h20"), head="")
    checkout.test("test_d.py", registered("base-c-test-8-gpu-h200", ', disabled="flaky"'), head="")
    checkout.test("test_e.py", "register_amd_ci(est_time=9, suite='x')\n", head="")
    return checkout


@pytest.mark.parametrize(
    ("suite", "names"),
    [
        ("base-c-test-8-gpu-h200", ["test_a.py"]),
        ("*-test-8-gpu-h200", ["test_a.py", "test_b.py"]),
        ("base-c-test-8-gpu-h20", ["test_c.py"]),
        (None, ["test_a.py", "test_b.py", "test_c.py"]),
    ],
)
def test_select_takes_exact_name_or_glob(four: Checkout, suite: str | None, names: list[str]) -> None:
    found = suites.select([str(four.root / "test")], suite)
    assert found.files == tuple(TestFile(f"test/registered/{name}", 8) for name in names)
    assert found.checkout == four.root.resolve()


def test_select_names_disabled_file(four: Checkout) -> None:
    (problem,) = suites.select([str(four.root / "test")], "base-c-test-8-gpu-h200").problems
    assert (problem.state, problem.location, problem.why) == ("disabled", "test/registered/test_d.py:1", "flaky")


def test_select_suggests_suite_when_none_matches(four: Checkout) -> None:
    with pytest.raises(UsageError, match="did you mean 'base-c-test-8-gpu-h200'"):
        suites.select([str(four.root / "test")], "base-c-test-8-gpu-h2000")


def test_select_refuses_path_outside_checkout(tmp_path: Path) -> None:
    lone = tmp_path / "test_lone.py"
    lone.write_text("x = 1\n")
    with pytest.raises(UsageError, match="is not in a checkout of sglang"):
        suites.select([str(lone)], None)


def test_select_suggests_path_when_missing(four: Checkout) -> None:
    with pytest.raises(UsageError) as raised:
        suites.select([str(four.root / "test" / "registred")], None)
    assert "did you mean 'registered'?" in str(raised.value.problems[0])


def test_select_names_file_that_is_no_python(four: Checkout) -> None:
    four.test("test_f.py", registered("base-c-test-8-gpu-h200") + "def (\n", head="")
    problems = suites.select([str(four.root / "test")], "base-c-test-8-gpu-h200").problems
    assert ("not-understood", "test/registered/test_f.py:2") in [(each.state, each.location) for each in problems]


def test_select_follows_no_link_below_a_folder(four: Checkout, tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere.py"
    elsewhere.write_text(registered("base-c-test-8-gpu-h200"))
    (four.root / "test" / "registered" / "test_link.py").symlink_to(elsewhere)
    assert len(suites.select([str(four.root / "test")], "base-c-test-8-gpu-h200").files) == 1
