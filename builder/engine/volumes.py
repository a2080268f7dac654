"""Named volumes of an engine: look up, list, create and remove them, and find the containers that use them."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Collection, Mapping
from typing import Any

from builder.engine.api import ListedContainer, Volume
from builder.engine.connection import EngineConnection
from builder.engine.errors import NotFoundError


class Volumes(EngineConnection):
    """The part of `Engine` that concerns volumes. Everything raises EngineLostError or EngineRefusedError."""

    def has_volume(self, name: str) -> bool:
        return self.volume(name) is not None

    def volume(self, name: str) -> Volume | None:
        """Return the volume of this name, or None."""
        try:
            return _volume(
                self._read(f"cannot look for the volume {name}", lambda: self._get("/volumes/{0}", name).json())
            )
        except NotFoundError:
            return None

    def volumes(self, label: str) -> list[Volume]:
        """Return the volumes with this label (``name`` or ``name=value``)."""
        params = {"filters": json.dumps({"label": [label]})}
        answer = self._read("cannot list volumes", lambda: self._get("/volumes", params=params).json())
        return [_volume(entry) for entry in answer.get("Volumes") or ()]

    def create_volume(self, name: str, *, options: Mapping[str, str], labels: Mapping[str, str]) -> None:
        """Create a volume of the local driver. Its options take effect, and fail, only when a container mounts it."""
        body = {"Name": name, "Driver": "local", "DriverOpts": dict(options), "Labels": dict(labels)}
        with self._translated(f"cannot create the volume {name}"):
            self._request("POST", "/volumes/create", json=body)

    def remove_volume(self, name: str) -> None:
        """Remove a volume. A missing one counts as removed; one in use raises EngineRefusedError (status 409)."""
        with contextlib.suppress(NotFoundError), self._translated(f"cannot remove the volume {name}"):
            self._request("DELETE", "/volumes/{0}", name)

    def users(self, volume: str) -> list[ListedContainer]:
        """Return the containers, in every state, that mount this volume."""
        params = {"all": 1, "filters": json.dumps({"volume": [volume]})}
        listing = self._read("cannot list containers", lambda: self._get("/containers/json", params=params).json())
        return [listed_container(entry) for entry in listing]

    def mounting(self, sources: Collection[str]) -> list[tuple[str, ListedContainer]]:
        """Return (source, container) for every running container that mounts one of these sources.

        sources: paths on the engine's host, and names of volumes.
        """
        listing = self._read("cannot list containers", lambda: self._get("/containers/json").json())
        found = []
        for entry in listing:
            mounts = [mount for mount in entry.get("Mounts") or () if isinstance(mount, dict)]
            named = {str(mount.get(name)) for mount in mounts for name in ("Source", "Name")}
            found += [(source, listed_container(entry)) for source in sources if source in named]
        return found


def listed_container(entry: Mapping[str, Any]) -> ListedContainer:
    """Return a container from an entry of the engine's listing."""
    name = (entry.get("Names") or ["/"])[0].lstrip("/")
    return ListedContainer(entry["Id"], name, entry.get("State") or "", entry.get("Labels") or {})


def _volume(data: Mapping[str, Any]) -> Volume:
    return Volume(
        name=data["Name"],
        driver=data.get("Driver") or "",
        mountpoint=data.get("Mountpoint") or "",
        options=data.get("Options") or {},
        labels=data.get("Labels") or {},
    )
