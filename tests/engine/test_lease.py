"""Leases on a real engine: orphans of every kind are swept, and nobody else's container."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from builder.engine.lease import LABEL_LEASE, Lease
from builder.engine.sweep import sweep
from builder.host.deadlines import Deadline, poll
from tests.engine.workshop import Workshop
from tests.host.test_lease import killed_owners_labels
from tests.scripts import HANG, leave, on_term

pytestmark = pytest.mark.engine


@pytest.mark.parametrize("kind", ["created", "running", "stubborn", "exited"])
def test_sweep_container_of_dead_builder_is_removed(workshop: Workshop, kind: str) -> None:
    labels = killed_owners_labels(workshop.directory, engine=workshop.engine.identity)
    steps = {"created": [HANG], "running": [HANG], "stubborn": [on_term(None), HANG], "exited": [leave(0)]}[kind]
    spec = workshop.spec(*steps)
    spec = workshop.spec(*steps, labels={**spec.labels, **labels})
    container = workshop.engine.create(spec)
    if kind != "created":
        workshop.engine.start(container)
    if kind == "exited":
        assert poll(lambda: workshop.engine.state(container).finished, Deadline(10), every=0.02)
    swept = [found for found in sweep(workshop.engine, workshop.directory, grace=1) if found.name == spec.name]
    assert [(found.removed, found.why) for found in swept] == [(True, "its builder is gone")]
    assert workshop.left() == []
    assert not Path(json.loads(labels[LABEL_LEASE])["path"]).exists()


def test_sweep_container_of_living_builder_stays(workshop: Workshop) -> None:
    with Lease(workshop.directory, run_id="other") as other:
        spec = workshop.spec(HANG)
        spec = workshop.spec(HANG, labels={**spec.labels, **other.labels("t", -1)})
        container = workshop.engine.create(spec)
        assert [found.name for found in sweep(workshop.engine, workshop.directory) if found.name == spec.name] == []
        assert workshop.engine.state(container).status == "created"
        workshop.engine.remove(container, force=True)
