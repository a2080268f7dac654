"""The job document: a job round-trips, and any other text is refused with one sentence."""

from __future__ import annotations

import dataclasses
import json
import threading

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from builder import events
from builder.errors import UsageError
from builder.job import Job, RunOrigin
from builder.task import ServingImage, Shape, Task
from tests.strategies import (
    EXAMPLES,
    FUZZ,
    NONCE,
    attempt,
    damaged,
    documents,
    harmless,
    mutated,
    written,
)

pytestmark = pytest.mark.timeout(120 + EXAMPLES * 0.2)


TASK = Task(
    label="DeepSeek-V3 tp8",
    model="deepseek-ai/DeepSeek-V3",
    recipe="serve",
    argv=("--tp", "8", "--trust-remote-code"),
    env={"SGLANG_A": "1", "PATH": "/bin"},
    gpus=8,
)
JOB = Job(
    mode="run",
    nonce=NONCE,
    mount="/jit",
    image=ServingImage("sha256:1", {"a": "b"}),
    task=dataclasses.replace(TASK, shapes=(Shape("GEMM_A", 1, 2, 3),), m_values=(1, 2), families=("triton",)),
    lease="/lease",
    secrets=("HF_TOKEN",),
    observed=RunOrigin("h", "0", "i", "r"),
)


def assert_job(text: str) -> None:
    job, refused = attempt(lambda: Job.from_json(text), ValueError)
    if job is None:
        assert harmless(str(refused)), str(refused)
        assert len(str(refused)) < 300
        return
    assert isinstance(job.mode, str)
    assert isinstance(job.nonce, str)
    events.prefix(job.nonce)
    assert job.task is None or isinstance(job.task, Task)
    assert threading.TIMEOUT_MAX > job.lifetime >= 0
    assert Job.from_json(job.to_json()) == job


@FUZZ
@given(st.one_of(st.text(max_size=60), documents.flatmap(written).map(bytes.decode)))
@example("")
@example("[" * 100_000)
def test_job_garbage_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="WARM_CACHE_JOB does not hold a job") as caught:
        Job.from_json(text)
    assert harmless(str(caught.value))


@FUZZ
@given(
    mutated(json.loads(JOB.to_json()), [(), ("task",), ("task", "requests"), ("task", "shapes"), ("secrets",)])
    .flatmap(written)
    .map(bytes.decode)
)
@example(JOB.to_json().replace("[4,8]", "[Infinity,8]"))
@example(JOB.to_json().replace('"mode":"run"', '"mode":[]'))
@example(JOB.to_json().replace('"mode":"run"', '"m\\u001b[31m":"run"'))
def test_job_mutated_is_refused_or_a_job(text: str) -> None:
    assert_job(text)


@FUZZ
@given(damaged(JOB.to_json().encode()))
def test_job_damaged_bytes_are_refused_or_a_job(data: bytes) -> None:
    assert_job(data.decode("utf-8", "surrogateescape"))


def test_job_cut_anywhere_is_refused() -> None:
    text = JOB.to_json()
    assert Job.from_json(text) == JOB
    for size in range(len(text)):
        with pytest.raises(ValueError, match="does not hold a job"):
            Job.from_json(text[:size])


def test_variable_too_long_for_linux_is_refused_with_the_tasks_name() -> None:
    task = Task(label="large-tp8", model="m", recipe="command", env={"X": "x" * 140_000})
    with pytest.raises(UsageError, match="large-tp8: its argv, env and shapes make a job of"):
        Job(mode="run", nonce="n", mount="/jit", task=task).variable()
