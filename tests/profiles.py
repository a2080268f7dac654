"""Makes the packaged profiles again, from what sglang's tests launch: ``make profiles UPSTREAM=DIR``.

Beside each profile the launches are kept as a fixture of the tests: argv and environment, and none of upstream's code.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from builder.cli.main import main
from builder.manifest.recorded_tasks import Source
from builder.recording import Launch

#: Profile → the suite that it is for.
SUITES: Mapping[str, str] = {
    "h200": "base-c-test-8-gpu-h200",
    "h100-4": "base-c-test-4-gpu-h100,extra-b-test-4-gpu-h100",
    "b200-8": "nightly-test-8-gpu-b200",
}
ROOT = Path(__file__).resolve().parents[1]
FIXTURES = ROOT / "tests" / "unit" / "fixtures"


def profile_path(name: str) -> Path:
    return ROOT / "builder" / "profiles" / f"{name}.toml"


def fixture_path(name: str) -> Path:
    return FIXTURES / f"launches-of-{name}.json"


def recorded(name: str) -> tuple[list[Launch], Source]:
    """Return the launches that a packaged profile was made of, and where they come from."""
    document = json.loads(fixture_path(name).read_text())
    return [_launch(each) for each in document["launches"]], Source(**document["source"])


def _launch(document: Mapping[str, Any]) -> Launch:
    env = tuple(sorted(document["env"].items()))
    fields = {name: document[name] for name in ("test", "kind", "model")}
    return Launch(location=document["place"], argv=tuple(document["argv"]), env=env, **fields)


def make(name: str, upstream: Path) -> None:
    """Write a profile and its fixture again. Everything above the profile's tasks stays."""
    out = io.StringIO()
    argv = ["import-tests", str(upstream / "test" / "registered"), "--suite", SUITES[name], "--here", "--json"]
    with contextlib.redirect_stdout(out):
        status = main([*argv, "--update", str(profile_path(name)), "--anew"], environ=dict(os.environ))
    if status not in (0, 10):
        sys.exit(f"{name}: import-tests ended with {status}")
    document = json.loads(out.getvalue())
    words = ("kind", "model", "argv", "env", "test", "place")
    launches = [{word: each[word] for word in words} for each in (*document["launches"], *document["not_warmable"])]
    lines = ",\n".join(f"  {json.dumps(each)}" for each in launches)
    source = json.dumps(document["source"])
    fixture_path(name).write_text(f'{{"source": {source}, "launches": [\n{lines}\n]}}\n')


if __name__ == "__main__":
    for each in SUITES:
        make(each, Path(sys.argv[1]).resolve())
