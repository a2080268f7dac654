"""How GPUs are asked for, by what an engine answers about itself. The answers are stubs of ``docker info``."""

from __future__ import annotations

from typing import Any

import pytest

from builder.engine.gpu_request import cdi_devices, device_requests, uses_cdi

FOUND = {"DiscoveredDevices": [{"Source": "cdi", "ID": f"nvidia.com/gpu={name}"} for name in ("0", "1", "all")]}
OTHER = {"DiscoveredDevices": [{"Source": "cdi", "ID": "vendor.com/net=0"}]}
RUNTIME: dict[str, Any] = {"Runtimes": {"runc": {}, "nvidia": {}}}


@pytest.mark.parametrize(
    ("gpus", "names"),
    [
        (2, ["nvidia.com/gpu=0", "nvidia.com/gpu=1"]),
        (-1, ["nvidia.com/gpu=all"]),
        (("4", "7"), ["nvidia.com/gpu=4", "nvidia.com/gpu=7"]),
    ],
)
def test_cdi_request_names_every_device(gpus: int | tuple[str, ...], names: list[str]) -> None:
    assert device_requests(gpus, cdi=True) == [{"Driver": "cdi", "DeviceIDs": names}]


@pytest.mark.parametrize(
    ("info", "local", "hook", "expected"),
    [
        (FOUND, True, False, True),
        (FOUND, False, False, True),
        ({**FOUND, **RUNTIME}, True, False, False),  # the way that worked yesterday stays
        (FOUND, True, True, False),
        (FOUND, False, True, True),  # our PATH says nothing about another machine's
        (OTHER, True, False, False),
        ({}, True, False, False),
        ({"DiscoveredDevices": "junk", "Runtimes": ["junk"]}, True, False, False),
        ({"DiscoveredDevices": [None, 1, {"ID": 2}]}, True, False, False),
    ],
)
def test_docker_uses_cdi_only_where_it_has_no_other_way(
    info: dict[str, Any], local: bool, hook: bool, expected: bool
) -> None:
    which = {"nvidia-container-runtime-hook": "/usr/bin/hook"}.get if hook else (lambda _: None)
    assert uses_cdi(info, podman=False, local=local, which=which) is expected


@pytest.mark.parametrize(
    ("version", "expected"), [("5.4.0", True), ("5.10.1", True), ("6.0.0-dev", True), ("5.3.2", False), ("", False)]
)
def test_podman_uses_cdi_from_5_4_on(version: str, expected: bool) -> None:
    assert uses_cdi({"ServerVersion": version}, podman=True, local=True) is expected


def test_cdi_devices_are_those_of_nvidia() -> None:
    assert cdi_devices({"DiscoveredDevices": [*FOUND["DiscoveredDevices"], *OTHER["DiscoveredDevices"]]}) == [
        "nvidia.com/gpu=0",
        "nvidia.com/gpu=1",
        "nvidia.com/gpu=all",
    ]
