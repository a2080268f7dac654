"""The audit without an engine: before and after, on the cache that a job works on, with the standard library."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from builder.cache import layout
from builder.cli import main
from tests.unit.cache.test_inventory import NAME, deep_gemm_entry, elf, triton_entry

KEY = "0123456789abcdef"
ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def root(tmp_path: Path) -> Path:
    root = tmp_path / "jit"
    layout.prepare(root)
    deep_gemm_entry(root / "deep_gemm" / KEY)
    triton_entry(root / "triton" / KEY)
    (root / "flashinfer" / KEY).mkdir(parents=True)
    (root / "flashinfer" / KEY / "op.so").write_bytes(elf())
    return root


@pytest.fixture
def environ(root: Path) -> dict[str, str]:
    return {
        "SGLANG_DG_CACHE_DIR": str(root / "deep_gemm" / KEY),
        "TRITON_CACHE_DIR": str(root / "triton" / KEY),
        "FLASHINFER_WORKSPACE_BASE": str(root / "flashinfer" / KEY),
    }


@pytest.fixture
def before(tmp_path: Path, environ: dict[str, str]) -> Path:
    path = tmp_path / "before.json"
    assert main.main(["audit", "--here", "--before", str(path)], environ=environ) == 0
    return path


def job(root: Path) -> None:
    """Hits one kernel, compiles two (one in place), damages and deletes."""
    gemm = root / "deep_gemm" / KEY
    os.utime(gemm / NAME / ".committed", (1.0, 1.0))
    (gemm / "locks").mkdir()
    (gemm / "locks" / "GEMM_NT_F8F8BF16_n4096_k7168_g1.lock").touch()
    os.utime(gemm / "locks" / "GEMM_NT_F8F8BF16_n4096_k7168_g1.lock", (1.0, 1.0))
    deep_gemm_entry(gemm, "cache/new.1")
    (root / "flashinfer" / KEY / "op.so").write_bytes(elf(8192))
    for path in (root / "triton" / KEY).glob("*/__grp__*"):
        path.write_text("{")


def test_audit_here_names_changes(
    root: Path, environ: dict[str, str], before: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    after = ["audit", "--here", "--after", str(before)]
    assert main.main([*after, "--fail-on-jit"], environ=environ) == 0
    assert "the job compiled nothing" in capsys.readouterr().out
    job(root)
    for words in (after, [*after, "--cache", str(root)]):
        assert main.main([*words, "--json", "--fail-on-jit"], environ=environ) == 10
        document: dict[str, Any] = json.loads(capsys.readouterr().out)
        assert document["error"]["message"] == "the job compiled 2 entries in spite of the cache"
        audit = document["audit"]
        assert {(row["kind"], row["family"], row["path"]) for row in audit["findings"]} == {
            ("compiled", "deep_gemm", "cache/new.1"),
            ("rewritten", "flashinfer", "op.so"),
            ("damaged", "triton", next((root / "triton" / KEY).iterdir()).name),
        }
        assert (audit["jit"], audit["used"]) == (2, 1)
        assert audit["asked"] == ["GEMM_NT_F8F8BF16 N=4096, K=7168, num_groups=1"]
        assert audit["findings"][0]["shape"] == audit["asked"][0]
    assert main.main(after, environ=environ) == 0
    assert f"compiled in spite of the cache: deep_gemm/{KEY}/cache/new.1 (GEMM_NT_F8" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--here"], "needs --before FILE, ahead of the job, or --after FILE"),
        (["--here", "--before", "a", "--after", "b"], "needs --before FILE"),
        (["--before", "a"], "pass --here"),
        (["--here", "--before", "/no/such/folder\0/x"], "--before: "),
        (["--here", "--after", "/no/such/file"], "--after: /no/such/file is missing"),
        (["--here", "--cache", "volume:xyz", "--before", "a"], "audit --here needs a directory"),
    ],
)
def test_audit_here_with_wrong_options_is_refused(
    words: list[str], said: str, environ: dict[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main.main(["audit", *words], environ=environ) == 2
    assert said in capsys.readouterr().err


def test_audit_here_without_cache_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = ["audit", "--here", "--before", str(tmp_path / "b.json")]
    assert main.main(before, environ={}) == 2
    assert "which cache?" in capsys.readouterr().err
    assert main.main([*before, "--cache", str(tmp_path / "none")], environ={}) == 12


_PLACES = '{"schema": 1, "taken": 1, "places": [%s]}'


@pytest.mark.parametrize(
    "text",
    [
        *("", "{", "[]", '{"schema": 2}', '{"schema": 1}', '{"schema": 1, "taken": "x", "places": []}'),
        _PLACES % "1",
        _PLACES % '{"family": "none", "key": "", "path": "", "locks": {}, "entries": []}',
        _PLACES % '{"family": "triton", "key": "", "path": "", "locks": [], "entries": []}',
        _PLACES % '{"family": "triton", "key": "", "path": "", "locks": {}, "entries": [[1]]}',
        _PLACES % '{"family": "triton", "key": "", "path": "", "locks": {}, "entries": [["a", 1e999, 1, 1, null]]}',
        _PLACES % '{"family": "triton", "key": "", "path": "", "locks": {"a": Infinity}, "entries": []}',
        *(f'{{"schema": 1, "taken": {taken}, "places": []}}' for taken in ("NaN", "1e999", "null")),
    ],
)
def test_audit_here_with_bad_snapshot_is_refused(
    text: str, tmp_path: Path, environ: dict[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "x.json").write_text(text)
    assert main.main(["audit", "--here", "--after", str(tmp_path / "x.json")], environ=environ) == 2
    assert "--after: " in capsys.readouterr().err


def test_audit_here_snapshot_names_are_escaped(
    tmp_path: Path, environ: dict[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    """A job may have written to it: neither a terminal nor GitHub's runner takes orders from there."""
    place: dict[str, Any] = {"family": "triton", "key": "\x1b[31m\n::error::k ##[error]", "path": "/no\0where"}
    place |= {"locks": {}, "entries": [["##[error]\n::error::e\ud800", 1, 1, 1, None]]}
    (tmp_path / "x.json").write_text(json.dumps({"schema": 1, "taken": 1, "places": [place]}))
    words = ["audit", "--here", "--after", str(tmp_path / "x.json")]
    assert main.main(words, environ={**environ, "GITHUB_ACTIONS": "true"}) == 0
    said = capsys.readouterr()
    assert "deleted: triton/" in said.out
    assert "\x1b" not in said.out and "##[" not in said.out
    assert not [line for line in said.out.splitlines() if line.lstrip().startswith("::")]


def test_audit_here_snapshot_replaces_regular_files_only(
    tmp_path: Path, environ: dict[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link").symlink_to("file.json")
    for name in ("pipe", "typo/b.json", "."):
        assert main.main(["audit", "--here", "--before", str(tmp_path / name)], environ=environ) == 2
        assert "--before: cannot write" in capsys.readouterr().err
    assert main.main(["audit", "--here", "--before", str(tmp_path / "link")], environ=environ) == 0
    assert (tmp_path / "pipe").is_fifo() and not (tmp_path / "typo").exists()
    assert (tmp_path / "link").is_symlink() and (tmp_path / "file.json").is_file()


def test_audit_here_needs_standard_library_alone(before: Path, environ: dict[str, str]) -> None:
    """No package beside the copied folder, and no engine."""
    code = (
        "import sys; sys.path = [p for p in sys.path if 'site-packages' not in p]\n"
        f"sys.path.insert(0, {str(ROOT)!r})\n"
        "from builder.cli.main import main\n"
        f"sys.exit(main(['audit', '--here', '--after', {str(before)!r}]))\n"
    )
    done = subprocess.run(
        [sys.executable, "-S", "-E", "-c", code],
        env={**environ, "PATH": os.environ["PATH"]},
        capture_output=True,
        text=True,
        timeout=60,
        cwd=before.parent,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == "the job compiled nothing\n"
