"""Half the cores, and free memory, as /proc and /sys report them."""

from __future__ import annotations

from pathlib import Path

import pytest

from builder.host import machine


def topology(place: Path, siblings: dict[int, str]) -> Path:
    for cpu, text in siblings.items():
        folder = place / f"cpu{cpu}" / "topology"
        folder.mkdir(parents=True)
        (folder / "thread_siblings_list").write_text(f"{text}\n")
    return place


@pytest.mark.parametrize(
    ("siblings", "among", "wanted"),
    [
        pytest.param({cpu: str(cpu) for cpu in range(4)}, range(4), (2, 3), id="one thread a core"),
        pytest.param({c: f"{c % 2},{c % 2 + 2}" for c in range(4)}, range(4), (1, 3), id="a core with all its threads"),
        pytest.param({c: f"{c - c % 2}-{c - c % 2 + 1}" for c in range(6)}, range(6), (4, 5), id="an odd number"),
        pytest.param({c: f"{c % 2},{c % 2 + 2}" for c in range(4)}, (0, 1, 2), (1,), id="threads that are not ours"),
        pytest.param({0: "0"}, (0,), (0,), id="one core"),
        pytest.param({}, (0, 1), (1,), id="nothing is reported"),
    ],
)
def test_half_of_cores_shares_no_core(
    tmp_path: Path, siblings: dict[int, str], among: tuple[int, ...], wanted: tuple[int, ...]
) -> None:
    assert machine.half_of_cores(topology(tmp_path, siblings), among) == wanted


def test_memory_is_read_in_bytes(tmp_path: Path) -> None:
    path = tmp_path / "meminfo"
    path.write_text("MemTotal: 24 kB\nMemFree:  8 kB\nMemAvailable:  16 kB\n")
    assert machine.memory(path) == machine.Memory(8192, 16384)
    path.write_text("MemTotal: 24 kB\n")
    assert machine.memory(path) is None
    assert machine.memory(tmp_path / "none") is None
