"""Measuring a machine, keeping what was measured, and cards by their data sheets."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from ranks import run_ranks

import zero.probing
from gemini.device import HostDevice
from gemini.probe import _best_s, cache_path, cached_profile, keep_profile, machine_key, probe
from gemini.profile import NAMED, HardwareProfile, named_profile, neighbours
from gemini.simulated import SimulatedDevice, StreamOrder
from zero.cli.main import main
from zero.probing import host_update, measured_profile, slowest
from zero.world import join

Output = pytest.CaptureFixture[str]
_RATES = [field.name for field in dataclasses.fields(HardwareProfile) if "_per_s" in field.name]


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing that this machine's user has measured counts, nor is any of it changed."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    torch.set_num_threads(1)


def check(profile: HardwareProfile) -> None:
    """Every figure is there, and possible."""
    assert profile.measured
    for name in (*_RATES, "launch_s"):
        figure = getattr(profile, name)
        assert math.isfinite(figure), name
        assert figure > 0, name
    assert 1e7 < profile.host_dram_bytes_per_s < 1e13
    assert 1e6 < profile.host_update_numel_per_s < 1e12
    assert profile.both_bytes_per_s <= min(profile.h2d_bytes_per_s, profile.d2h_bytes_per_s)


class TestProbe:
    @pytest.mark.parametrize("order", [*StreamOrder, None])
    def test_any_device_is_measured_and_left_as_it_was(self, order: StreamOrder | None) -> None:
        device = HostDevice() if order is None else SimulatedDevice(64 << 20, order)
        profile = probe(device)
        check(profile)
        assert device.model_data_bytes == 0
        assert profile.capacity_bytes == device.capacity_bytes
        device.close()

    def test_a_small_device_is_measured_with_what_it_has(self) -> None:
        device = SimulatedDevice(1 << 20)
        check(probe(device))
        assert device.lifetime_peaks().device_bytes <= 1 << 20
        device.close()

    def test_the_update_that_is_given_is_measured(self) -> None:
        asked = []

        def update(numel: int) -> object:
            asked.append(numel)
            buffer = torch.zeros(numel)
            return lambda: buffer.add_(1)

        check(probe(HostDevice(), update))  # type: ignore[arg-type]
        assert len(asked) == 1

    def test_a_folder_on_disk_is_measured_and_left_empty(self, tmp_path: Path) -> None:
        from gemini.profile import DISK_READ_BYTES_PER_S, DISK_WRITE_BYTES_PER_S

        assumed, folder = (DISK_READ_BYTES_PER_S, DISK_WRITE_BYTES_PER_S), tmp_path / "made"
        found = probe(SimulatedDevice(1 << 20), disk=folder)
        check(found)
        rates = found.disk_read_bytes_per_s, found.disk_write_bytes_per_s
        assert all(rate not in assumed for rate in rates)
        assert not list(folder.iterdir())
        (tmp_path / "file").touch()
        unwritable = probe(SimulatedDevice(1 << 20), disk=tmp_path / "file" / "folder")
        assert (unwritable.disk_read_bytes_per_s, unwritable.disk_write_bytes_per_s) == assumed

    def test_the_optimizers_update_changes_weights(self) -> None:
        host_update(1000)()


class TestCache:
    def test_what_was_measured_is_known_the_next_time(self, tmp_path: Path) -> None:
        device = HostDevice()
        first = measured_profile(device)
        assert measured_profile(device) == first
        assert list(json.loads(cache_path().read_text())["machines"]) == [machine_key(device, "1 together")]
        assert measured_profile(device, disk=str(tmp_path)) != first
        assert measured_profile(device) == first

    def test_another_number_of_threads_is_another_machine(self) -> None:
        device = HostDevice()
        key = machine_key(device)
        torch.set_num_threads(2)
        assert machine_key(device) != key

    @pytest.mark.parametrize(
        "text",
        [
            "",
            "{",
            "[]",
            '"machines"',
            '{"format": 1, "machines": 3}',
            '{"format": 1, "machines": {"KEY": 7}}',
            '{"format": 1, "machines": {"KEY": {}}}',
            '{"format": 1, "machines": {"KEY": {"measured": true, "h2d_bytes_per_s": -1}}}',
            '{"format": 1, "machines": {"KEY": {"measured": true, "h2d_bytes_per_s": 1' + 400 * "0" + "}}}",
            '{"format": 2, "machines": {"KEY": {"measured": true}}}',
            '{"machines": {"KEY": {"measured": true}}}',
            '{"format": 1, "machines": {"KEY": {"measured": true, "h2d_bytes_per_s": "fast"}}}',
            '{"format": 1, "machines": {"KEY": {"measured": true, "no_such_rate": 1.0}}}',
            "\\u0000\\ud800",
        ],
    )
    def test_a_damaged_file_is_no_answer_and_is_replaced(self, text: str) -> None:
        device = HostDevice()
        key = machine_key(device)
        cache_path().parent.mkdir(parents=True)
        cache_path().write_text(text.replace("KEY", key))
        assert cached_profile(key) is None
        profile = dataclasses.replace(HardwareProfile(), measured=True)
        keep_profile(key, profile)
        assert cached_profile(key) == profile

    def test_a_folder_that_cannot_be_written_to_is_no_error(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        (tmp_path / "file").write_text("")
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
        keep_profile("key", HardwareProfile())
        assert cached_profile("key") is None

    def test_what_others_measured_stays(self) -> None:
        keep_profile("one", dataclasses.replace(HardwareProfile(), measured=True))
        keep_profile("two", dataclasses.replace(HardwareProfile(), measured=True))
        assert cached_profile("one") is not None


@pytest.mark.parametrize(
    ("taken_s", "best_s", "num_runs"),
    [
        ((9.0, 0.002, 0.002, 0.002), 0.002, 4),  # the first is not measured
        ((0.002, 0.03, 0.04, 0.03, 0.002, 0.03, 0.002, 0.002), 0.002, 8),  # others work on the machine
        ((0.002, *(0.03 / 1.3**i for i in range(100))), 0.03 / 1.3**10, None),  # as long as it gets better
        ((0.1, 1.0, 2.0, 3.0), 1.0, 4),  # but not for ever
    ],
)
def test_runs_that_differ_are_repeated(
    taken_s: tuple[float, ...], best_s: float, num_runs: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    now_s, left = [0.0], list(taken_s)

    def run() -> None:
        now_s[0] += left.pop(0)

    monkeypatch.setattr("gemini.probe.time.perf_counter", lambda: now_s[0])
    found_s = _best_s(run, lambda: None)
    if num_runs is None:
        assert found_s <= best_s
        assert left
    else:
        assert found_s == pytest.approx(best_s)
        assert len(taken_s) - len(left) == num_runs


def measure_together() -> tuple[HardwareProfile, HardwareProfile]:
    """What a rank finds, the first time and the second."""
    world = join(60.0)
    return measured_profile(HostDevice(), world), measured_profile(HostDevice(), world)


def test_ranks_measure_at_the_same_time_and_agree() -> None:
    (first, again), (other, other_again) = run_ranks(measure_together, 2)
    check(first)
    assert first == other
    assert again == other_again
    for name in _RATES:
        assert getattr(again, name) > 0


def measure_unlike(folder: str, fails: bool) -> HardwareProfile:
    """The second rank cannot write to the folder whose disk is measured, or has no room for an update."""
    world = join(60.0)
    if world is not None and world.rank == 1:
        folder += "/file/inside"
        if fails:
            zero.probing.host_update = _has_no_room
    return measured_profile(HostDevice(), world, disk=folder)


def _has_no_room(numel: int) -> Callable[[], None]:
    raise torch.OutOfMemoryError(f"no room for {numel} elements")


def test_a_rank_that_cannot_measure_its_disk_keeps_nobody_waiting(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    first, other = run_ranks(measure_unlike, 2, str(tmp_path), False)
    check(first)
    assert first == other


def test_where_one_rank_can_only_guess_all_do(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    assert run_ranks(measure_unlike, 2, str(tmp_path), True) == [HardwareProfile()] * 2


def test_the_slowest_of_each_counts() -> None:
    one = dataclasses.replace(HardwareProfile(), h2d_bytes_per_s=1.0, launch_s=1.0)
    two = dataclasses.replace(HardwareProfile(), d2h_bytes_per_s=2.0, launch_s=3.0)
    both = slowest([one, two])
    assert (both.h2d_bytes_per_s, both.d2h_bytes_per_s, both.launch_s) == (1.0, 2.0, 3.0)


class TestCards:
    def test_every_card_says_that_nobody_measured_it(self) -> None:
        for name, card in NAMED.items():
            assert named_profile(name) is card
            assert card.name == name
            assert not card.measured
            assert "published figures, not measured" in card.source
            assert card.capacity_bytes > 1 << 30
            assert all(getattr(card, rate) > 0 for rate in _RATES)

    @pytest.mark.parametrize(("given", "meant"), [("rtx309", "rtx3090"), ("H100", "h100"), ("a100-40", "a100-40gb")])
    def test_a_near_miss_is_refused_with_the_name_that_was_meant(self, given: str, meant: str) -> None:
        with pytest.raises(ValueError, match=f"did you mean {meant}"):
            named_profile(given)

    def test_neighbours_are_by_memory(self) -> None:
        smaller, larger = neighbours(NAMED["a100-40gb"])
        assert smaller is not None
        assert larger is not None
        assert smaller.capacity_bytes < NAMED["a100-40gb"].capacity_bytes < larger.capacity_bytes
        assert neighbours(NAMED["h200"])[1] is None


class TestCommand:
    def test_the_table(self, capsys: Output) -> None:
        assert main(["probe", "--device.type", "cpu"]) == 0
        said = capsys.readouterr().out
        for what in ("host to device", "both at once", "host memory", "AdamW on the host", "matrix products, bf16"):
            assert what in said
        assert "--again" in said

    def test_json_has_every_figure_in_plain_numbers(self, capsys: Output) -> None:
        assert main(["probe", "--json", "--device.type", "cpu"]) == 0
        first = capsys.readouterr().out
        check(HardwareProfile(**json.loads(first)))
        assert main(["probe", "--json", "--device.type", "cpu"]) == 0
        assert capsys.readouterr().out == first, "known from the first time"

    def test_the_disk_where_a_folder_is_named(self, tmp_path: Path, capsys: Output) -> None:
        assert main(["probe", "--device.type", "cpu", "--memory.disk", str(tmp_path / "disk")]) == 0
        assert "disk, reading" in capsys.readouterr().out

    @pytest.mark.parametrize(
        "words", [["--train.max_steps", "3"], ["--memory.host", "1GiB"], ["--device.type", "cud"], ["--agian"]]
    )
    def test_bad_words_are_refused(self, words: list[str], capsys: Output) -> None:
        assert main(["probe", *words]) == 2
        assert capsys.readouterr().err

    def test_the_config_takes_a_card_by_name(self, capsys: Output) -> None:
        assert main(["validate", "--device.profile", "rtx3090"]) == 0
        assert 'profile = "rtx3090"' in capsys.readouterr().out
        assert main(["validate", "--device.profile", "rtx309"]) == 2
        assert "did you mean rtx3090?" in capsys.readouterr().err
