"""Named volumes of an engine: what it knows of them, who has them, and the ones that this program makes and removes."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Mapping
from contextlib import AbstractContextManager
from typing import Any

from builder.engine.api import Found, Volume
from builder.engine.errors import NotFoundError


class Volumes:
    """The part of `Engine` that is about volumes. Everything raises EngineLostError or EngineRefusedError."""

    _get: Callable[..., Any]
    _request: Callable[..., Any]
    _read: Callable[[str, Callable[[], Any]], Any]
    _translated: Callable[[str], AbstractContextManager[None]]

    def has_volume(self, name: str) -> bool:
        """Whether the engine has this named volume."""
        return self.volume(name) is not None

    def volume(self, name: str) -> Volume | None:
        """The volume of this name, or None."""
        try:
            return _volume(
                self._read(f"cannot look for the volume {name}", lambda: self._get("/volumes/{0}", name).json())
            )
        except NotFoundError:
            return None

    def volumes(self, label: str) -> list[Volume]:
        """Those that have this label (``name`` or ``name=value``)."""
        params = {"filters": json.dumps({"label": [label]})}
        answer = self._read("cannot list volumes", lambda: self._get("/volumes", params=params).json())
        return [_volume(entry) for entry in answer.get("Volumes") or ()]

    def create_volume(self, name: str, *, options: Mapping[str, str], labels: Mapping[str, str]) -> None:
        """Of the local driver. Nothing is mounted yet: that its options are wrong shows with its first use."""
        body = {"Name": name, "Driver": "local", "DriverOpts": dict(options), "Labels": dict(labels)}
        with self._translated(f"cannot create the volume {name}"):
            self._request("POST", "/volumes/create", json=body)

    def remove_volume(self, name: str) -> None:
        """One that is not there is removed already. Raises EngineRefusedError (409) while a container has it."""
        try:
            with self._translated(f"cannot remove the volume {name}"):
                self._request("DELETE", "/volumes/{0}", name)
        except NotFoundError:
            return

    def users(self, volume: str) -> list[Found]:
        """Containers in every state that have this volume among their mounts."""
        params = {"all": 1, "filters": json.dumps({"volume": [volume]})}
        listing = self._read("cannot list containers", lambda: self._get("/containers/json", params=params).json())
        return [found_in(entry) for entry in listing]

    def mounting(self, sources: Collection[str]) -> list[tuple[str, Found]]:
        """Running containers that have one of these (paths on the engine's host, names of volumes) mounted, each with
        the one that it has.
        """
        listing = self._read("cannot list containers", lambda: self._get("/containers/json").json())
        found = []
        for entry in listing:
            mounts = [mount for mount in entry.get("Mounts") or () if isinstance(mount, dict)]
            named = {str(mount.get(name)) for mount in mounts for name in ("Source", "Name")}
            found += [(source, found_in(entry)) for source in sources if source in named]
        return found


def found_in(entry: Mapping[str, Any]) -> Found:
    """A container, as the engine lists it."""
    name = (entry.get("Names") or ["/"])[0].lstrip("/")
    return Found(entry["Id"], name, entry.get("State") or "", entry.get("Labels") or {})


def _volume(data: Mapping[str, Any]) -> Volume:
    return Volume(
        name=data["Name"],
        driver=data.get("Driver") or "",
        mountpoint=data.get("Mountpoint") or "",
        options=data.get("Options") or {},
        labels=data.get("Labels") or {},
    )
