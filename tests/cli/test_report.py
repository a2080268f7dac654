"""`warm-cache report`: on a directory, without engine, GPU and store; and its page in a real browser."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from builder.cache import history, layout
from builder.cache.history import HistoryLine
from builder.cli import main

ROOT = Path(__file__).resolve().parents[2]
BROWSER = next(filter(None, map(shutil.which, ("chromium", "google-chrome", "chromium-browser"))), None)
#: Names that would be markup, and change the title, if one place forgot to escape them.
NASTY = "<script>document.title='owned'</script>\"'><img src=x onerror=document.title='owned'>&amp;"

Report = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A root with two runs, the newer one on two GPUs after a prebuild, and names that are markup."""
    root = tmp_path / "cache"
    layout.prepare(root)
    kernel = root / "triton" / "0123456789abcdef" / "x"
    kernel.mkdir(parents=True)
    (kernel / "k.json").write_text("{}")
    place = root / "markers" / "t-0123456789ab"
    place.mkdir()
    (place / "0.json").write_text("no marker")
    lines = [
        HistoryLine("old", "task", "DeepSeek-V3.2 tp8", "failed", 1.7e9, 60.0, reason=NASTY),
        HistoryLine("new", "prebuild", "prebuild", "warmed", 1.8e9, 100.0, added={"deep_gemm": 300}),
        HistoryLine("new", "task", NASTY, "warmed", 1.8e9 + 100, 200.0, gpus=(0, 1), added={"deep_gemm": 12}),
        HistoryLine("new", "task", "GLM-5 tp1 " + "long-name-" * 12, "warmed", 1.8e9 + 100, 90.0, gpus=(2,), host="h1"),
    ]
    for line in lines:
        history.add(root, line)
    return root


@pytest.fixture
def report(tmp_path: Path) -> Report:
    """Run the verb where nothing is there to ask: no engine, no PATH, another working directory."""

    def run(*options: str) -> subprocess.CompletedProcess[str]:
        environ = {"PYTHONPATH": str(ROOT), "HOME": str(tmp_path), "DOCKER_HOST": "unix:///nowhere.sock"}
        command = [sys.executable, "-m", "builder", "report", *options]
        return subprocess.run(command, env=environ, cwd=tmp_path, capture_output=True, text=True, timeout=60)

    return run


def test_report_of_directory_as_text_json_and_page(root: Path, report: Report, tmp_path: Path) -> None:
    before = sorted(root.rglob("*"))
    shown = report("--cache", str(root), "--html", "page.html")
    assert shown.returncode == 0, shown.stderr
    assert re.search(r"2027-01-15 08:00 +new +2 warmed +300 +12 ", shown.stdout)
    assert "warning: markers/t-0123456789ab/0.json: " in shown.stdout
    page = (tmp_path / "page.html").read_text()
    assert NASTY not in page
    assert not re.search(r"<script|<img|<link|url\(|https?:", page)
    document = json.loads(report("--cache", str(root), "--json").stdout)
    assert [each["label"] for each in document["report"]["runs"]][1] == "prebuild"
    assert document["report"]["families"][0]["family"] == "triton"
    assert sorted(root.rglob("*")) == before


def test_report_adds_up_audits_of_many_runners(report: Report, tmp_path: Path) -> None:
    def finding(family: str, name: str, began: float, ended: float, kind: str = "compiled") -> dict[str, Any]:
        return {"family": family, "key": "k", "kind": kind, "path": name, "began": began, "ended": ended}

    for runner, build, found in (
        ("a/1", "c0ffee", [finding("deep_gemm", "cache/x/k", 100, 103), finding("deep_gemm", "cache/y/k", 102, 105)]),
        ("b/1", "c0ffee", [finding("deep_gemm", "cache/x/k", 100, 110), finding("triton", "z", 1, 2, "foreign")]),
        ("b/2", "beef", [finding("triton", "z", 1, 1e300), finding(NASTY, "z", 1, 2)]),
    ):
        path = tmp_path / "audits" / f"{runner}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({"verb": "audit", "job": {"build": build}, "audit": {"findings": found}}))
    (tmp_path / "audits" / "other.json").write_text('{"verb": "check"}')
    (tmp_path / "audits" / "link.json").symlink_to("/etc/passwd")
    os.mkfifo(tmp_path / "audits" / "pipe.json")
    shown = report("--audits", "audits", "--metrics", "jobs.prom")
    assert shown.returncode == 0, shown.stderr
    assert "3 audits: jobs compiled 5 kernels" in shown.stdout
    assert "  deep_gemm: 3 kernels in about 15 s, in jobs of build c0ffee" in shown.stdout
    assert "3 files below audits hold no audit" in shown.stdout
    written = text_string_to_metric_families((tmp_path / "jobs.prom").read_text())
    samples = [one for each in written for one in each.samples if one.name == "warm_cache_jobs_compiled_seconds"]
    assert {(one.labels["family"], one.labels["build"], round(one.value)) for one in samples} >= {
        ("deep_gemm", "c0ffee", 15),
        ("triton", "beef", 0),
    }


@pytest.mark.parametrize(
    ("options", "said", "status"),
    [
        ((), "a report of what? Pass --cache DIR", 2),
        (("--cache", "nowhere"), "there is no cache at", 12),
        (("--cache", "."), "is no cache root", 12),
        (("--cache", "volume:jit"), "reads a directory", 2),
        (("--audits", "nowhere"), "--audits: there is no directory nowhere", 2),
        (("--cache", "cache", "--html", "no/such/page.html"), "--html: cannot write", 2),
    ],
)
def test_report_of_nothing_is_one_error(
    root: Path,
    options: tuple[str, ...],
    said: str,
    status: int,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (root.parent / "stranger").touch()
    monkeypatch.chdir(root.parent)
    assert main.main(["report", *options], environ={}) == status
    assert said in capsys.readouterr().err


@pytest.mark.skipif(BROWSER is None, reason="no browser: apt-get install chromium")
@pytest.mark.parametrize(("width", "dark"), [(1280, False), (500, True)])
def test_page_in_a_browser(root: Path, report: Report, tmp_path: Path, width: int, dark: bool) -> None:
    """Names stay text, the page fits its window, bars have their places, and it follows the system's colours."""
    assert report("--cache", str(root), "--html", "page.html").returncode == 0
    # The page forbids scripts: a copy without that measures itself, and shows that names are no markup by themselves.
    probe = (
        "<script>for (const each of document.querySelectorAll('details')) each.open = true;"
        "const bar = [...document.querySelectorAll('.bar')].find(each => each.textContent.startsWith('GLM'));"
        "document.body.innerHTML = JSON.stringify({title: document.title,"
        "room: document.documentElement.scrollWidth - innerWidth, "
        "page: getComputedStyle(document.body).backgroundColor,"
        "share: bar.getBoundingClientRect().width / bar.parentElement.getBoundingClientRect().width,"
        "markup: document.querySelectorAll('img, script').length, lanes: document.querySelectorAll('.lane').length});"
        "</script></body>"
    )
    page = re.sub(r"<meta http-equiv=.*\n", "", (tmp_path / "page.html").read_text()).replace("</body>", probe)
    (tmp_path / "probe.html").write_text(page)
    assert BROWSER is not None
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", f"--window-size={width},900"]
    options += [f"--user-data-dir={tmp_path}/profile", f"--blink-settings=preferredColorScheme={0 if dark else 1}"]
    done = subprocess.run(
        [BROWSER, *options, "--dump-dom", f"file://{tmp_path}/probe.html"],
        env={"PATH": os.environ["PATH"], "HOME": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    found = json.loads(re.search(r"<body>(\{.*\})", done.stdout)[1])  # type: ignore[index]
    assert found["title"] == f"warm-cache: {root}"
    assert found["markup"] == 1, "the probe itself"
    assert found["room"] <= 0
    assert found["lanes"] == 5  # GPUs 0 and 1, GPU 2 of h1, no GPU of the prebuild; no GPU of the older run
    assert 0.28 < found["share"] < 0.32  # 90 of 300 s
    assert found["page"] == ("rgb(13, 17, 23)" if dark else "rgb(255, 255, 255)")
