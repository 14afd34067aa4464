"""Host memory and cores as the kernel enforces them, against fake cgroup trees."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import psutil
import pytest

from gemini import hostinfo

MIB = 1024**2
UNLIMITED_V1 = "9223372036854771712\n"


class FakeCgroups:
    """A cgroup tree in a folder: files are written by path, the process's own groups by line."""

    def __init__(self, folder: Path) -> None:
        self.root = folder / "cgroup"
        self.root.mkdir()
        self.proc = folder / "proc_self_cgroup"
        self.proc.write_text("")

    def processes_groups(self, *lines: str) -> None:
        self.proc.write_text("".join(f"{line}\n" for line in lines))

    def write(self, path: str, **files: str | int) -> None:
        folder = self.root / path
        folder.mkdir(parents=True, exist_ok=True)
        for name, content in files.items():
            (folder / name.replace("__", ".")).write_text(f"{content}\n")

    def memory(self) -> hostinfo.HostMemory:
        return hostinfo.host_memory(cgroup_root=self.root, proc_cgroup=self.proc)

    def cpus(self) -> int:
        return hostinfo.cpu_count(cgroup_root=self.root, proc_cgroup=self.proc)

    def quota(self) -> float | None:
        return hostinfo.cgroup_cpu_quota(cgroup_root=self.root, proc_cgroup=self.proc)


@pytest.fixture
def cgroups(tmp_path: Path) -> FakeCgroups:
    return FakeCgroups(tmp_path)


@pytest.fixture(autouse=True)
def big_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine of 64 GiB with 48 GiB available and 16 cores, whatever the tests run on."""
    memory = psutil.virtual_memory()._replace(total=64 * 1024 * MIB, available=48 * 1024 * MIB)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: memory)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(16)), raising=False)


def test_without_cgroups_the_machine_itself_is_the_limit(cgroups: FakeCgroups) -> None:
    cgroups.proc.unlink()
    memory = cgroups.memory()
    assert memory == hostinfo.HostMemory(64 * 1024 * MIB, 48 * 1024 * MIB, "physical memory")
    assert cgroups.cpus() == 16
    assert cgroups.quota() is None


def test_v2_limit_of_the_own_group(cgroups: FakeCgroups) -> None:
    cgroups.processes_groups("0::/user/job")
    stat = f"anon {700 * MIB}\ninactive_file {200 * MIB}\nactive_file {100 * MIB}"
    cgroups.write("user/job", memory__max=4096 * MIB, memory__current=1000 * MIB, memory__stat=stat)
    # 1000 used, of which 300 are file cache that can be dropped.
    assert cgroups.memory() == hostinfo.HostMemory(4096 * MIB, (4096 - 700) * MIB, "cgroup v2")


def test_v2_limit_of_an_ancestor_counts_with_its_own_usage(cgroups: FakeCgroups) -> None:
    cgroups.processes_groups("0::/user/job")
    cgroups.write("user/job", memory__max="max", memory__current=10 * MIB)
    cgroups.write("user", memory__max=2048 * MIB, memory__current=1500 * MIB, memory__stat="")
    assert cgroups.memory() == hostinfo.HostMemory(2048 * MIB, 548 * MIB, "cgroup v2")


def test_v2_smallest_total_and_smallest_available_may_come_from_different_levels(cgroups: FakeCgroups) -> None:
    cgroups.processes_groups("0::/user/job")
    cgroups.write("user/job", memory__max=2048 * MIB, memory__current=0)
    cgroups.write("user", memory__max=4096 * MIB, memory__current=4000 * MIB)
    assert cgroups.memory() == hostinfo.HostMemory(2048 * MIB, 96 * MIB, "cgroup v2")


def test_v2_memory_high_stalls_and_therefore_limits(cgroups: FakeCgroups) -> None:
    cgroups.processes_groups("0::/job")
    cgroups.write("job", memory__max="max", memory__high=1024 * MIB, memory__current=0)
    assert cgroups.memory().total_bytes == 1024 * MIB


@pytest.mark.parametrize("own_group", ["/", "/kubepods/pod1/container1", "/../../other"])
def test_v2_in_a_container_the_mount_is_the_own_group(cgroups: FakeCgroups, own_group: str) -> None:
    cgroups.processes_groups(f"0::{own_group}")
    cgroups.write("", memory__max=512 * MIB, memory__current=MIB)
    assert cgroups.memory() == hostinfo.HostMemory(512 * MIB, 511 * MIB, "cgroup v2")


def test_v2_beside_v1_is_found(cgroups: FakeCgroups) -> None:
    cgroups.processes_groups("4:memory:/job", "0::/job")
    cgroups.write("memory/job", memory__limit_in_bytes=UNLIMITED_V1)
    cgroups.write("unified/job", memory__max=256 * MIB)
    assert cgroups.memory().limit_source == "cgroup v2"


def test_v1_limit_uses_the_totals_that_include_children(cgroups: FakeCgroups) -> None:
    cgroups.processes_groups("5:devices:/", "4:memory:/docker/abc", "0::/")
    stat = f"inactive_file 0\ntotal_inactive_file {50 * MIB}\ntotal_active_file {25 * MIB}"
    cgroups.write(
        "memory/docker/abc",
        memory__limit_in_bytes=1000 * MIB,
        memory__usage_in_bytes=200 * MIB,
        memory__stat=stat,
    )
    cgroups.write("memory", memory__limit_in_bytes=UNLIMITED_V1)
    assert cgroups.memory() == hostinfo.HostMemory(1000 * MIB, 875 * MIB, "cgroup v1")


def test_v1_unlimited_leaves_the_machine(cgroups: FakeCgroups) -> None:
    cgroups.processes_groups("4:memory:/")
    cgroups.write("memory", memory__limit_in_bytes=UNLIMITED_V1, memory__usage_in_bytes=10 * MIB)
    assert cgroups.memory() == hostinfo.HostMemory(64 * 1024 * MIB, 48 * 1024 * MIB, "physical memory")


def test_a_limit_above_physical_memory_is_none(cgroups: FakeCgroups) -> None:
    cgroups.processes_groups("0::/job")
    cgroups.write("job", memory__max=1024 * 1024 * MIB, memory__current=0)
    assert cgroups.memory().limit_source == "physical memory"


def test_a_full_group_has_nothing_available_not_less(cgroups: FakeCgroups) -> None:
    cgroups.processes_groups("0::/job")
    cgroups.write("job", memory__max=100 * MIB, memory__current=120 * MIB)
    assert cgroups.memory().available_bytes == 0


@pytest.mark.parametrize("garbage", ["", "no colons", "0::", "::::\n\n", "x:memory:"])
def test_odd_files_count_as_no_limit(cgroups: FakeCgroups, garbage: str) -> None:
    cgroups.proc.write_text(garbage)
    cgroups.write("memory", memory__limit_in_bytes="not a number", memory__stat="short")
    cgroups.write("", memory__max="", cpu__max="100000")
    assert cgroups.memory().limit_source == "physical memory"
    assert cgroups.cpus() == 16


@pytest.mark.parametrize(
    ("quota", "cores"), [("max 100000", 16), ("200000 100000", 2), ("150000 100000", 2), ("10000 100000", 1)]
)
def test_v2_cpu_quota_is_rounded_up(cgroups: FakeCgroups, quota: str, cores: int) -> None:
    cgroups.processes_groups("0::/job")
    cgroups.write("job", cpu__max=quota)
    assert cgroups.cpus() == cores


def test_v2_smallest_quota_on_the_way_up_holds(cgroups: FakeCgroups) -> None:
    cgroups.processes_groups("0::/user/job")
    cgroups.write("user/job", cpu__max="800000 100000")
    cgroups.write("user", cpu__max="250000 100000")
    assert cgroups.quota() == 2.5
    assert cgroups.cpus() == 3


@pytest.mark.parametrize("mount", ["cpu", "cpu,cpuacct"])
def test_v1_cpu_quota_under_either_mount_name(cgroups: FakeCgroups, mount: str) -> None:
    cgroups.processes_groups("3:cpu,cpuacct:/job")
    cgroups.write(f"{mount}/job", cpu__cfs_quota_us=400000, cpu__cfs_period_us=100000)
    cgroups.write(mount, cpu__cfs_quota_us=-1, cpu__cfs_period_us=100000)
    assert cgroups.cpus() == 4


def test_affinity_limits_below_the_quota(cgroups: FakeCgroups, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {3})
    cgroups.processes_groups("0::/job")
    cgroups.write("job", cpu__max="400000 100000")
    assert cgroups.cpus() == 1


def test_resident_memory_follows_what_is_taken_and_the_peak_stays() -> None:
    before_bytes = hostinfo.process_rss_bytes()
    block = np.ones(64 * MIB, dtype=np.uint8)
    held_bytes = hostinfo.process_rss_bytes()
    assert held_bytes - before_bytes > 48 * MIB
    del block
    # The two figures are read one after the other, and the kernel batches its counts: allow a few MiB.
    assert hostinfo.peak_rss_bytes() >= held_bytes - 8 * MIB


def test_peak_is_read_from_the_kernels_high_water_mark(tmp_path: Path) -> None:
    status = tmp_path / "status"
    status.write_text("Name:\tpython\nVmHWM:\t  123456 kB\nVmRSS:\t    1000 kB\n")
    assert hostinfo.peak_rss_bytes(proc_status=status) == 123456 * 1024


def test_peak_without_proc_is_at_least_what_is_held(tmp_path: Path) -> None:
    assert hostinfo.peak_rss_bytes(proc_status=tmp_path / "missing") >= hostinfo.process_rss_bytes() - 8 * MIB


def test_importing_needs_nothing_above_gemini() -> None:
    modules = "{name.split('.')[0] for name in sys.modules}"
    code = f"import sys, gemini.hostinfo; print(sorted({modules} & {{'zero', 'rich', 'transformers'}}))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.strip() == "[]"
