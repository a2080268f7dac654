"""The release workflow's scripts, run with a stand-in for the command gh: what they refuse, and what they request."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from builder import __version__
from tests.actions import WORKFLOWS, load

TAG = f"v{__version__}"
COMMIT, OTHER = "1" * 40, "2" * 40
NOTES = f"""# Changelog

## [Unreleased]

- later

## [{__version__}]

### Added

- what there is to say

## [0.0.1]

- before
"""

#: Answers as `gh` does; `gh api` prints what --jq would select.
GH = """#!/bin/bash
printf '%s\\n' "$*" >> "$GH_LOG"
case "$2" in
  *git/matching-refs/tags/*) [ -z "$GH_TAGGED" ] || printf 'refs/tags/%s\\n' "$GH_NAME" ;;
  *commits/tags/*) printf '%s\\n' "$GH_TAGGED" ;;
esac
"""


def script(job: str, step: str) -> str:
    (found,) = [item["run"] for item in load(WORKFLOWS / "release.yml")["jobs"][job]["steps"] if item.get("id") == step]
    return str(found)


def run(text: str, place: Path, **environ: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["bash", "--noprofile", "--norc", "-eo", "pipefail", "-c", text],
        cwd=place,
        env={**os.environ, **environ},
        capture_output=True,
        text=True,
        timeout=60,
    )


class TestNotes:
    @pytest.fixture
    def place(self, tmp_path: Path) -> Path:
        (tmp_path / "builder").mkdir()
        (tmp_path / "dist").mkdir()
        (tmp_path / "builder" / "__init__.py").write_text(f'"""A package."""\n\n__version__ = "{__version__}"\n')
        (tmp_path / "CHANGELOG.md").write_text(NOTES)
        return tmp_path

    @pytest.mark.parametrize(("kind", "name"), [("tag", TAG), ("branch", "main")])
    def test_release_notes_are_section_of_version(self, place: Path, kind: str, name: str) -> None:
        done = run(script("build", "notes"), place, REF_TYPE=kind, REF_NAME=name)
        assert done.returncode == 0, done.stdout + done.stderr
        assert (place / "dist" / "notes.md").read_text().strip() == "### Added\n\n- what there is to say"
        assert (place / "dist" / "tag").read_text() == f"{TAG}\n"

    def test_release_refused_when_tag_is_not_version(self, place: Path) -> None:
        done = run(script("build", "notes"), place, REF_TYPE="tag", REF_NAME="v9.9.9")
        assert done.returncode == 1
        assert "the tag is v9.9.9" in done.stdout

    def test_release_refused_when_changelog_lacks_version(self, place: Path) -> None:
        (place / "CHANGELOG.md").write_text(NOTES.replace(f"## [{__version__}]", "## [9.9.9]"))
        done = run(script("build", "notes"), place, REF_TYPE="branch", REF_NAME="main")
        assert done.returncode == 1
        assert "CHANGELOG.md says nothing" in done.stdout


class TestPublish:
    def publish(self, place: Path, tagged: str, name: str = TAG) -> tuple[subprocess.CompletedProcess[str], list[str]]:
        """tagged: the commit of the tag called name; empty where there is none."""
        (place / "dist").mkdir()
        for file, text in (("tag", f"{TAG}\n"), ("notes.md", "notes"), ("w.whl", ""), ("s.tar.gz", "")):
            (place / "dist" / file).write_text(text)
        (place / "gh").write_text(GH)
        (place / "gh").chmod(0o755)
        log = place / "log"
        done = run(
            script("release", "publish"),
            place,
            PATH=f"{place}{os.pathsep}{os.environ['PATH']}",
            GH_LOG=str(log),
            GH_REPO="owner/name",
            GH_NAME=name,
            GH_TAGGED=tagged,
            COMMIT=COMMIT,
        )
        return done, [line for line in log.read_text().splitlines() if line.startswith("release")]

    @pytest.mark.parametrize("tagged", ["", COMMIT])
    def test_release_attaches_wheel_and_sdist(self, tmp_path: Path, tagged: str) -> None:
        done, releases = self.publish(tmp_path, tagged)
        assert done.returncode == 0, done.stdout + done.stderr
        (words,) = (line.split() for line in releases)
        assert words[:5] == ["release", "create", TAG, "--target", COMMIT]
        assert words[-2:] == ["dist/w.whl", "dist/s.tar.gz"]

    def test_release_refused_when_tag_is_on_other_commit(self, tmp_path: Path) -> None:
        done, releases = self.publish(tmp_path, OTHER)
        assert done.returncode == 1
        assert OTHER in done.stdout
        assert releases == []

    def test_release_longer_tag_is_ignored(self, tmp_path: Path) -> None:
        done, releases = self.publish(tmp_path, OTHER, f"{TAG}-rc1")
        assert done.returncode == 0, done.stdout + done.stderr
        assert len(releases) == 1
