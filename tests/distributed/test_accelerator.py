"""Which device a rank binds, and when; on an accelerator that only keeps a record."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, field

import deepspeed
import pytest
import torch

from lander_ds.common.errors import ConfigError
from lander_ds.distributed import accelerator, discovery, process_group


@dataclass
class Recorded:
    """Devices of one kind; `calls` is what was done, in order."""

    kind: str
    count: int
    calls: list[str] = field(default_factory=list)
    current: int = 0

    def device_name(self, index: int | None = None) -> str:
        return self.kind if index is None else f"{self.kind}:{index}"

    def device_count(self) -> int:
        return self.count

    def set_device(self, index: int) -> None:
        self.calls.append(f"device {index}")
        self.current = index

    def current_device_name(self) -> str:
        return f"{self.kind}:{self.current}"


Host = Callable[..., Recorded]


@pytest.fixture
def host(monkeypatch: pytest.MonkeyPatch) -> Host:
    """A rank on a host with some devices."""

    def make(kind: str, count: int, local_rank: int, **variables: str) -> Recorded:
        devices = Recorded(kind, count)
        monkeypatch.setattr(accelerator, "get_accelerator", lambda: devices)
        monkeypatch.delenv("OMPI_COMM_WORLD_LOCAL_RANK", raising=False)
        here = {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": str(local_rank), **variables}
        for name, value in here.items():
            monkeypatch.setenv(name, value)
        return devices

    return make


def test_the_device_is_bound_before_the_ranks_meet(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    """NCCL would exchange the first objects on device 0 of every rank."""
    devices = host("cuda", 4, 3)
    monkeypatch.setattr(discovery, "check_interfaces", lambda *names: devices.calls.append(f"check {names}"))
    monkeypatch.setattr(discovery, "discover", lambda: devices.calls.append("discover"))
    monkeypatch.setattr(discovery, "choose_interface", lambda: None)
    monkeypatch.setattr(deepspeed, "init_distributed", lambda **_: devices.calls.append("meet"))
    process_group.start()
    checked = "check ('GLOO_SOCKET_IFNAME', 'NCCL_SOCKET_IFNAME')"
    assert devices.calls == [checked, "discover", "device 3", "meet"]
    assert accelerator.device() == torch.device("cuda", 3)


@pytest.mark.parametrize(
    ("kind", "count", "local_rank", "bound"),
    [("cuda", 4, 2, 2), ("cuda", 1, 3, 0), ("xpu", 2, 1, 1)],
    ids=["all shown", "one shown to each", "another kind"],
)
def test_the_number_of_the_device(host: Host, kind: str, count: int, local_rank: int, bound: int) -> None:
    devices = host(kind, count, local_rank, OMPI_COMM_WORLD_LOCAL_RANK=str(local_rank))
    accelerator.bind()
    assert devices.calls == [f"device {bound}"]
    assert accelerator.device() == torch.device(kind, bound)
    # DeepSpeed takes its device from these.
    assert os.environ["LOCAL_RANK"] == os.environ["OMPI_COMM_WORLD_LOCAL_RANK"] == str(bound)


def test_more_ranks_than_devices_are_refused(host: Host) -> None:
    host("cuda", 2, 2)
    with pytest.raises(ConfigError, match="local rank 2 of a host that shows 2 cuda devices"):
        accelerator.bind()


def test_ranks_on_the_cpu_bind_nothing(host: Host) -> None:
    devices = host("cpu", 1, 3)
    accelerator.bind()
    assert devices.calls == []
    assert os.environ["LOCAL_RANK"] == "3"
    assert accelerator.device() == torch.device("cpu")
