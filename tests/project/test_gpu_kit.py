"""The proof kit for machines with GPUs: what it carries is pinned, and its checks are those of a record."""

from __future__ import annotations

import re
from pathlib import Path

from builder.run import proofs

ROOT = Path(__file__).resolve().parents[2]


def test_carried_packages_are_pinned() -> None:
    text = (ROOT / "tests" / "gpu" / "carry.sh").read_text(encoding="utf-8")
    found = re.search(r'^PACKAGES="([^"]+)"', text, re.MULTILINE)
    assert found is not None
    pins = (ROOT / "docker" / "stand-in" / "real" / "requirements.txt").read_text(encoding="utf-8").lower()
    for name in found[1].split():
        assert re.search(rf"^{re.escape(name.lower())}==", pins, re.MULTILINE), name


def test_proof_makes_every_check_of_a_record() -> None:
    text = (ROOT / "tests" / "gpu" / "prove.py").read_text(encoding="utf-8")
    made = set(re.findall(r'proof\.add\("(\w+)"', text))
    assert made == set(proofs.CHECKS)
