"""What we store is what oras reads, and what oras stores is what we read."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

from builder.registry.documents import digest_of
from tests.registries import StandIn, tool
from tests.registry.test_client import image


def test_oras_reads_ours_and_we_read_its(registry: StandIn, tmp_path: Path) -> None:
    program = tool("oras")

    def oras(*arguments: str) -> bytes:
        done = subprocess.run([program, *arguments], cwd=tmp_path, capture_output=True, timeout=60)
        assert done.returncode == 0, done.stderr
        return done.stdout

    layer, other = os.urandom(200_000), os.urandom(300_000)
    with registry.client("clients/oras") as client:
        digest = image(client, layer, "ours")
        name = client.reference.name
        assert digest_of(oras("manifest", "fetch", "--plain-http", f"{name}:ours")) == digest
        assert oras("blob", "fetch", "--plain-http", "-o", "-", f"{name}@{digest_of(layer)}") == layer
        (tmp_path / "other").write_bytes(other)
        oras("push", "--plain-http", f"{name}:theirs", "other")
        (row,) = client.get_manifest("theirs").layers
        assert b"".join(client.read_blob(row.digest, row.size)) == other
