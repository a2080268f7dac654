"""How far a pull is, in few enough different texts to print them all."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_DONE = ("Pull complete", "Already exists")


class PullProgress:
    """Takes the engine's messages, several a second for each layer."""

    def __init__(self, tag: str) -> None:
        self._tag = tag
        self._layers: dict[str, tuple[str, int, int]] = {}
        self._said = ""

    def text(self, message: Mapping[str, Any]) -> str:
        """What there is to say now; empty when that was said already."""
        name, detail = message.get("id"), message.get("progressDetail") or {}
        if name and name != self._tag:
            self._layers[name] = (str(message.get("status")), detail.get("current") or 0, detail.get("total") or 0)
        text = self._text()
        if text == self._said:
            return ""
        self._said = text
        return text

    def _text(self) -> str:
        if not self._layers:
            return ""
        finished = sum(status in _DONE for status, _, _ in self._layers.values())
        text = f"{finished} of {len(self._layers)} layers"
        loading = [(now, total) for status, now, total in self._layers.values() if status == "Downloading" and total]
        if loading:
            here, whole = (sum(column) for column in zip(*loading, strict=True))
            text += f", {here >> 30} of {-(-whole >> 30)} GiB of the next"
        return text
