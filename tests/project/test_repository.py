"""The files around the program say what is so: hooks, dependencies, what contributors read."""

from __future__ import annotations

import importlib
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def test_private_methods_of_docker_py() -> None:
    """pyproject.toml excludes docker-py 8, and README.md gives the number of private methods as the reason."""
    api_client = importlib.import_module("docker").APIClient
    source = (ROOT / "builder" / "engine" / "client.py").read_text(encoding="utf-8")
    used = set(re.findall(r"\b(?:api|_api|client)\.(_[a-z][a-z_]*)\(", source))
    assert used == {"_url", "_set_auth_headers", "_get_raw_response_socket", "_raise_for_status"}
    assert all(callable(getattr(api_client, name)) for name in used)
