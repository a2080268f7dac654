"""Results of a run, and their JSON document."""

from __future__ import annotations

import json
from typing import Any

from builder.errors import PreflightError, Problem
from builder.report.results import Report, TaskResult
from tests.results import RESULTS


def test_document_in_github_is_never_a_command() -> None:
    report = Report("warm", tasks=[TaskResult("x", "org/x", "0d", "failed", "##[error]no")])
    text = report.document(11, None)
    assert "##[" not in text
    assert json.loads(text)["tasks"][0]["reason"] == "##[error]no"


def test_document_has_every_task() -> None:
    report = Report("warm", "image:1", "sha256:1", "4be1", "/data", tasks=list(RESULTS), seconds=1214.5)
    document = json.loads(report.document(11, None))
    assert document["schema"] == 1 and document["verb"] == "warm" and document["exit"] == 11
    assert document["image"] == {"ref": "image:1", "id": "sha256:1"}
    assert [task["state"] for task in document["tasks"]] == ["warm", "warmed", "failed"]
    assert document["tasks"][1]["entries_added"] == 518
    assert document["tasks"][1]["verified"] is True
    assert [task["proof"] for task in document["tasks"]] == ["verified", "verified", None]
    assert document["tasks"][2]["verified"] is False
    assert {"model", "key", "state", "reason", "seconds", "entries_added", "verified"} <= set(document["tasks"][0])


def test_document_of_an_error_lists_every_problem() -> None:
    error = PreflightError("no", [Problem("GPUs", "none", "Buy some."), Problem("disk", "full")])
    document = json.loads(Report("doctor").document(12, error))
    assert [problem["place"] for problem in document["error"]["problems"]] == ["GPUs", "disk"]


def test_note_of_a_task_with_dummy_weights_names_them() -> None:
    made: dict[str, Any] = {"label": "l", "model": "m", "key": "k", "loaded": "dummy weights, 4 layers"}
    assert TaskResult(**made, state="warmed").note == "with dummy weights, 4 layers"
    assert TaskResult(**made, state="warm", since="2026-11-23").note == "since 2026-11-23, with dummy weights, 4 layers"
    assert TaskResult(**made, state="failed", reason="crash").note == "crash"
    assert TaskResult("l", "m", "k", "warmed", loaded="weights").note == ""
