"""Create requests, exactly as the engine gets them."""

from __future__ import annotations

import pytest

from builder.engine.api import ContainerSpec, Mount


def test_create_request_limits_what_it_may_take() -> None:
    host = ContainerSpec(image="i", name="n", memory=1 << 30, cpus="0,2", cpu_shares=2).body()["HostConfig"]
    assert (host["CpusetCpus"], host["CpuShares"]) == ("0,2", 2)
    assert host["Memory"] == host["MemorySwap"] == 1 << 30, "no swap"


def test_create_request_body_is_exact() -> None:
    spec = ContainerSpec(
        image="i",
        name="n",
        command=["c"],
        entrypoint=["e"],
        env={"A": "b=c"},
        labels={"l": "v"},
        mounts=(Mount("/a", "/b", read_only=True), Mount("v", "/c", kind="volume")),
        gpus=8,
        shm_size=32 << 30,
        network="none",
        stop_timeout=9,
        workdir="/w",
        stdin=True,
    )
    assert spec.body() == {
        "Image": "i",
        "Cmd": ["c"],
        "Entrypoint": ["e"],
        "Env": ["A=b=c"],
        "Labels": {"l": "v"},
        "WorkingDir": "/w",
        "StopTimeout": 9,
        "AttachStdin": True,
        "AttachStdout": True,
        "AttachStderr": True,
        "OpenStdin": True,
        "StdinOnce": True,
        "HostConfig": {
            "Init": True,
            "IpcMode": "private",
            "ShmSize": 32 << 30,
            "NetworkMode": "none",
            "Mounts": [{"Type": "bind", "Source": "/a", "Target": "/b", "ReadOnly": True}],
            "Binds": ["v:/c:nocopy"],
            "Tmpfs": {},
            "Ulimits": [
                {"Name": "memlock", "Soft": -1, "Hard": -1},
                {"Name": "stack", "Soft": 67108864, "Hard": 67108864},
            ],
            "LogConfig": {"Type": "json-file", "Config": {"max-size": "1000g", "max-file": "1"}},
            "CapDrop": ["ALL"],
            "CapAdd": ["CHOWN", "DAC_OVERRIDE", "FOWNER"],
            "SecurityOpt": ["no-new-privileges"],
            "ReadonlyRootfs": False,
            "PidsLimit": 512,
            "DeviceRequests": [{"Driver": "", "Capabilities": [["gpu"]], "Count": 8}],
        },
    }


@pytest.mark.parametrize(("gpus", "wanted"), [(-1, {"Count": -1}), (("2", "5"), {"DeviceIDs": ["2", "5"]})])
def test_gpus_by_count_or_index_are_device_requests(gpus: int | tuple[str, ...], wanted: dict[str, object]) -> None:
    host = ContainerSpec(image="i", name="n", gpus=gpus).body()["HostConfig"]
    assert host["DeviceRequests"] == [{"Driver": "", "Capabilities": [["gpu"]], **wanted}]


def test_gpus_none_is_no_device_request() -> None:
    body = ContainerSpec(image="i", name="n").body()
    assert "DeviceRequests" not in body["HostConfig"]
    assert not {"Cmd", "Entrypoint", "WorkingDir"} & body.keys()
