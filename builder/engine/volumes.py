"""Named volumes of an engine: look up, list, create and remove them, and find the containers that use them."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Collection, Mapping
from typing import Any

from builder.engine import answers
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
            return self._read(
                f"cannot look for the volume {name}",
                lambda: _volume(answers.an_object(self._get("/volumes/{0}", name).json())),
            )
        except NotFoundError:
            return None

    def volumes(self, label: str) -> list[Volume]:
        """Return the volumes with this label (``name`` or ``name=value``)."""
        params = {"filters": json.dumps({"label": [label]})}

        def read() -> list[Volume]:
            answer = answers.an_object(self._get("/volumes", params=params).json())
            return [_volume(entry) for entry in answers.objects(answer.get("Volumes"))]

        return self._read("cannot list volumes", read)

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
        return self._read(
            "cannot list containers", lambda: listed_containers(self._get("/containers/json", params=params).json())
        )

    def mounting(self, sources: Collection[str]) -> list[tuple[str, ListedContainer]]:
        """Return (source, container) for every running container that mounts one of these sources.

        sources: paths on the engine's host, and names of volumes.
        """

        def read() -> list[tuple[str, ListedContainer]]:
            found = []
            for entry in answers.objects(self._get("/containers/json").json()):
                mounts = answers.objects(entry.get("Mounts"))
                named = {str(mount.get(name)) for mount in mounts for name in ("Source", "Name")}
                found += [(source, _listed_container(entry)) for source in sources if source in named]
            return found

        return self._read("cannot list containers", read)


def may_mount(container: Mapping[str, Any]) -> bool:
    """Return whether a container, as it is inspected, has CAP_SYS_ADMIN."""
    host = answers.inner(container, "HostConfig")
    added = {name.upper().removeprefix("CAP_") for name in answers.texts(host, "CapAdd")}
    return host.get("Privileged") is True or bool(added & {"ALL", "SYS_ADMIN"})


def listed_containers(answer: object) -> list[ListedContainer]:
    """Return the containers of the engine's listing."""
    return [_listed_container(entry) for entry in answers.objects(answer)]


def _listed_container(entry: Mapping[str, Any]) -> ListedContainer:
    name = (answers.texts(entry, "Names") or ("/",))[0].lstrip("/")
    identity, labels = answers.required_text(entry, "Id"), answers.text_map(entry, "Labels")
    return ListedContainer(identity, name, answers.text(entry, "State"), labels)


def _volume(data: Mapping[str, Any]) -> Volume:
    return Volume(
        name=answers.required_text(data, "Name"),
        driver=answers.text(data, "Driver"),
        mountpoint=answers.text(data, "Mountpoint"),
        options=answers.text_map(data, "Options"),
        labels=answers.text_map(data, "Labels"),
    )
