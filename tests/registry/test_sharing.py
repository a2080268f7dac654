"""push and pull between machines, by a real registry: what travels, what is refused, and what a fault leaves."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.program import assemble
from tests.registries import StandIn
from tests.registry.sharing import Machine

#: Makes a machine of this name.
Machines = Callable[[str], Machine]


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return assemble(tmp_path_factory.mktemp("site"))


@pytest.fixture(scope="module")
def warm(tmp_path_factory: pytest.TempPathFactory, site: Path) -> Machine:
    """A warm machine; nobody changes it."""
    machine = Machine(tmp_path_factory.mktemp("warm"), site)
    machine.warm()
    return machine


@pytest.fixture
def machines(tmp_path: Path, site: Path) -> Machines:
    def made(name: str) -> Machine:
        (tmp_path / name).mkdir()
        machine = Machine(tmp_path / name, site)
        machine.root.mkdir()
        return machine

    return made


def test_pulled_cache_is_warm_on_another_machine(registry: StandIn, warm: Machine, machines: Machines) -> None:
    pushed = warm.push(registry, "two/cache")
    assert pushed["sent"] > 0 and pushed["tasks"] == ["dense"] and not pushed["unchanged"]
    again = warm.push(registry, "two/cache")
    assert (again["sent"], again["digest"], again["tag"]) == (0, pushed["digest"], pushed["tag"]) and again["unchanged"]
    other = machines("other")
    pulled = other.pull(registry, "two/cache")
    assert pulled["digest"] == pushed["digest"] and pulled["fetched"] > 0
    assert other.is_warm() and other.entries() == warm.entries()
    once_more = other.pull(registry, "two/cache")
    assert once_more["unchanged"] and once_more["fetched"] == 0
