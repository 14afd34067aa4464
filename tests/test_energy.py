"""What a run says of its energy: read where it can be, estimated where not, and lost steps apart."""

from __future__ import annotations

import json
import logging
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from cli_case import train

from zero.cli.main import main
from zero.config import load_config
from zero.config.cost import CostSection, Country
from zero.errors import UserError
from zero.ranks import Ranks
from zero.report.codecarbon import check_codecarbon
from zero.report.energy import Cost, EnergyMeter, Part, Reading, combined, cost_of
from zero.report.grid import _COUNTRY_KG, card_watts, grid_of
from zero.report.meters import CpuEstimate, GpuEstimate, NvmlMeter, RaplMeter, cpu_meter, gpu_meter
from zero.report.nvml import NvmlCard, NvmlError
from zero.run_cost import RunCost, StepLedger, earlier_sessions
from zero.run_folder import ENERGY_FILE

Output = pytest.CaptureFixture[str]


class Clock:
    """Seconds that a test sets."""

    now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


class Fake:
    """A meter that a test moves."""

    method, is_measured, period_s = "counted by hand", True, 0.01

    def __init__(self, key: str | None = None) -> None:
        self.key = key
        self.total = 0.0
        self.num_read = 0

    def joules(self) -> float:
        self.num_read += 1
        if self.total < 0:
            raise OSError("gone")
        return self.total


def zones(folder: Path, **counters: int) -> Path:
    """A powercap folder with packages and what lies in and beside them."""
    for number, (name, value) in enumerate(counters.items()):
        zone = folder / f"intel-rapl:{number}"
        zone.mkdir(parents=True, exist_ok=True)
        (zone / "name").write_text(name.replace("_", "-") + "\n")
        (zone / "energy_uj").write_text(f"{value}\n")
        (zone / "max_energy_range_uj").write_text("999999999\n")
    return folder


class TestRapl:
    def test_packages_and_memory_are_added_up_and_nothing_twice(self, tmp_path: Path) -> None:
        before = {"package_0": 5_000_000, "package_1": 0, "dram": 0, "core": 0, "psys": 0}
        meter = RaplMeter(zones(tmp_path, **before))
        assert meter.joules() == 0
        zones(tmp_path, package_0=8_000_000, package_1=2_000_000, dram=500_000, core=9_000_000, psys=20_000_000)
        assert meter.joules() == pytest.approx(5.5)
        assert meter.joules() == pytest.approx(5.5)

    def test_a_counter_that_turns_over(self, tmp_path: Path) -> None:
        meter = RaplMeter(zones(tmp_path, package_0=999_000_000))
        zones(tmp_path, package_0=1_000_000)
        assert meter.joules() == pytest.approx(2.0)
        zones(tmp_path, package_0=999_000_000)
        assert meter.joules() == pytest.approx(1000.0)

    def test_without_it_there_is_an_estimate(self, tmp_path: Path) -> None:
        assert isinstance(cpu_meter(10.0, folder=tmp_path / "none"), CpuEstimate)
        zones(tmp_path, package_0=1)
        assert isinstance(cpu_meter(10.0, folder=tmp_path), RaplMeter)
        assert isinstance(cpu_meter(10.0, may_measure=False, folder=tmp_path), CpuEstimate)
        (tmp_path / "intel-rapl:0" / "energy_uj").write_text("no number")
        assert isinstance(cpu_meter(10.0, folder=tmp_path), CpuEstimate)


class TestOtherMeters:
    def test_busy_cores(self) -> None:
        busy = iter([100.0, 103.5])
        meter = CpuEstimate(8.0, lambda: next(busy))
        assert meter.joules() == pytest.approx(28.0)
        assert "8 W for each busy core" in meter.method
        assert not meter.is_measured

    def test_this_process_is_busy_when_it_computes(self) -> None:
        meter = CpuEstimate(10.0)
        sum(i * i for i in range(400_000))
        assert meter.joules() > 0

    def test_a_card_with_a_counter(self) -> None:
        values = iter([500.0, 512.0])
        meter = NvmlMeter(SimpleNamespace(has_counter=True, joules=lambda: next(values)), "GPU-1")
        assert meter.joules() == pytest.approx(12.0)
        assert meter.key == "GPU-1"

    def test_a_card_with_power_alone(self) -> None:
        clock, watts = Clock(), iter([100.0, 300.0, 300.0])
        meter = NvmlMeter(SimpleNamespace(has_counter=False, watts=lambda: next(watts)), "GPU-1", clock)
        clock.now_s = 2.0
        assert meter.joules() == pytest.approx(400.0)
        clock.now_s = 3.0
        assert meter.joules() == pytest.approx(700.0)
        assert meter.period_s == 1.0

    def test_a_card_that_cannot_be_read(self) -> None:
        clock = Clock()
        meter = GpuEstimate(300.0, "card not known", clock)
        clock.now_s = 10.0
        assert meter.joules() == pytest.approx(3000.0)
        assert "estimated: 300 W (card not known)" in meter.method

    def test_no_card(self) -> None:
        assert gpu_meter(torch.device("cpu"), None) is None
        assert gpu_meter(None, None) is None

    @pytest.mark.parametrize("watts", [None, 111.0])
    def test_a_card_without_nvml_is_estimated_by_its_name(
        self, watts: float | None, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        card = SimpleNamespace(name="NVIDIA A100-SXM4-80GB", uuid="no-such-card")
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: card)
        meter = gpu_meter(torch.device("cuda", 0), watts)
        assert isinstance(meter, GpuEstimate)
        assert ("111 W (cost.gpu_watts)" if watts else "400 W (data sheet)") in meter.method

    def test_an_unknown_card_is_refused_by_nvml(self) -> None:
        with pytest.raises(NvmlError):
            NvmlCard("no-such-card")

    def test_cards_by_name(self) -> None:
        assert card_watts("NVIDIA GeForce RTX 3090") == 350
        assert card_watts("NVIDIA H100 PCIe") == 350
        assert card_watts("NVIDIA H100 80GB HBM3") == 700
        assert card_watts("Tesla T4") == 70
        assert card_watts("GTX 1080") is None


class TestArithmetic:
    def test_kwh_and_co2e(self) -> None:
        part = Part(3.6e6, "m", True, None)
        cost = cost_of(Reading(part, Part(7.2e6, "g", False, None), 60.0), CostSection(pue=1.5, grid_factor=0.2))
        assert cost.kwh == pytest.approx(4.5)
        assert cost.kg == pytest.approx(0.9)
        rows = dict(cost.rows())
        assert rows["energy, GPU"] == "2 kWh, g"
        assert rows["energy, CPU"] == "1 kWh, m"
        assert rows["CO2e"] == "0.9 kg = 4.5 kWh with PUE 1.5 x 0.2 kg/kWh (cost.grid_factor)"
        said = cost.as_json()
        assert (said["cpu_measured"], said["gpu_measured"]) == (True, False)
        assert json.loads(json.dumps(said))["co2e_kg"] == pytest.approx(0.9)

    def test_without_a_card(self) -> None:
        assert (
            dict(cost_of(Reading(Part(1.0, "m", True, None), None, 1.0), CostSection()).rows())["energy, GPU"] == "none"
        )

    def test_the_papers_own_sum(self) -> None:
        """LLaMA's table 15: 809,472 GPU hours x 400 W x PUE 1.1, at 0.385 kg/kWh: 356 MWh and 137 t."""
        gpu = Part(809_472 * 3600 * 400.0, "TDP", False, None)
        cost = cost_of(Reading(Part(0.0, "none", False, None), gpu, 1.0), CostSection(pue=1.1, grid_factor=0.385))
        assert cost.kwh / 1000 == pytest.approx(356, abs=0.5)
        assert cost.kg / 1000 == pytest.approx(137, abs=0.5)

    def test_grids(self) -> None:
        assert set(_COUNTRY_KG) == set(Country.__args__)
        assert grid_of("FRA", None).kg_per_kwh == pytest.approx(0.056)
        assert "2023, Ember" in grid_of("FRA", None).source
        assert grid_of("FRA", 0.0).kg_per_kwh == 0.0
        assert "world average" in grid_of(None, None).source

    def test_what_ranks_count_together_counts_once(self) -> None:
        def of(joules: float, key: str | None, card: str | None) -> Reading:
            return Reading(Part(joules, "c", True, key), Part(joules, "g", True, card), joules)

        machine = [of(10.0, "rapl a", "GPU-1"), of(12.0, "rapl a", "GPU-2"), of(7.0, "rapl b", "GPU-2")]
        total = combined([Reading.from_json(json.loads(json.dumps(reading.as_json()))) for reading in machine])
        assert total.cpu.joules == pytest.approx(19.0)
        assert total.gpu is not None
        assert total.gpu.joules == pytest.approx(22.0)
        assert total.elapsed_s == 12.0
        assert combined([of(1.0, None, None), of(2.0, None, None)]).cpu.joules == pytest.approx(3.0)


class TestMeter:
    def test_it_reads_beside_the_run_and_ends(self) -> None:
        fake = Fake()
        meter = EnergyMeter(CostSection(), meters=(fake, None))
        meter.start()
        waited = threading.Event()
        for _ in range(200):
            if fake.num_read > 2 or waited.wait(0.01):
                break
        meter.stop()
        meter.stop()
        assert fake.num_read > 2
        assert not any(thread.name == "zero-energy" for thread in threading.enumerate())

    def test_a_meter_that_fails_keeps_its_last_value_and_says_so(self) -> None:
        fake = Fake()
        meter = EnergyMeter(CostSection(), meters=(fake, None))
        fake.total = 5.0
        meter.read()
        fake.total = -1.0
        reading = meter.read()
        assert reading.cpu.joules == 5.0
        assert "stopped answering" in reading.cpu.method

    def test_nothing_that_goes_wrong_in_the_beginning_ends_a_run(
        self, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
    ) -> None:
        def broken(*arguments: Any) -> None:
            raise RuntimeError("no such thing")

        monkeypatch.setattr("zero.report.energy.gpu_meter", broken)
        with caplog.at_level(logging.WARNING, "zero"):
            reading = EnergyMeter(CostSection(), torch.device("cpu")).read()
        assert "estimated" in reading.cpu.method
        assert "no such thing" in caplog.text


class TestLedger:
    def test_kinds_of_steps(self) -> None:
        ledger = StepLedger()
        ledger.repeats_until = 2
        for step in range(1, 7):
            ledger.note(step, 1.0, skipped=step == 4)
        assert {lost.kind: (lost.num_steps, lost.joules) for lost in ledger.lost(100.0, 10.0)} == {
            "skipped": (1, 10.0),
            "rolled back": (0, 0.0),
            "repeated": (2, 20.0),
        }

    def test_going_back_undoes_what_came_after(self) -> None:
        ledger = StepLedger()
        for step in range(1, 11):
            ledger.note(step, 1.0, skipped=step > 8)
        ledger.go_back(5)
        for step in range(6, 9):
            ledger.note(step, 2.0, skipped=False)
        found = {lost.kind: (lost.num_steps, lost.joules) for lost in ledger.lost(160.0, 16.0)}
        assert found == {"skipped": (2, 20.0), "rolled back": (3, 30.0), "repeated": (0, 0.0)}
        ledger.go_back(0)
        assert {lost.kind: lost.num_steps for lost in ledger.lost(1.0, 1.0)}["rolled back"] == 11

    def test_nothing_has_run(self) -> None:
        assert [lost.joules for lost in StepLedger().lost(0.0, 0.0)] == [0.0, 0.0, 0.0]


def run_cost(folder: Path, fake: Fake, clock: Clock, ranks: Any = None) -> RunCost:
    meter = EnergyMeter(CostSection(), clock=clock, meters=(fake, None))
    cost = RunCost(CostSection(), ranks or Ranks(None), None, meter, clock)
    cost.open(folder)
    return cost


class TestRunCost:
    def test_a_process_that_was_killed_counts(self, tmp_path: Path) -> None:
        first, clock = Fake(), Clock()
        killed = run_cost(tmp_path, first, clock)
        for step in range(1, 5):
            clock.now_s, first.total = 10.0 * step, 100.0 * step
            killed.note(step, 8.0, skipped=step == 2)
        with (tmp_path / ENERGY_FILE).open("ab") as file:
            file.write(b'{"session": "torn')
        (tmp_path / "metrics.jsonl").write_text('{"step": 3}\n{"step": 4}\n')
        second, clock = Fake(), Clock()
        cost = run_cost(tmp_path, second, clock)
        for step in range(3, 7):
            clock.now_s, second.total = 10.0 * (step - 2), 50.0 * (step - 2)
            cost.note(step, 10.0, skipped=False)
        total = cost.finish()
        assert total is not None
        assert total.cpu.joules == pytest.approx(400.0 + 200.0)
        assert (total.num_processes, total.elapsed_s) == (2, 80.0)
        lost = {one.kind: (one.num_steps, one.joules) for one in total.lost}
        assert lost["skipped"] == (1, pytest.approx(80.0))
        assert lost["repeated"] == (2, pytest.approx(100.0))
        rows = dict(total.rows())
        assert rows["energy is of"] == "2 processes, one after the other"
        assert rows["of it repeated"].startswith("2 steps, ")
        assert "of it rolled back" not in rows

    def test_lines_are_few(self, tmp_path: Path) -> None:
        fake, clock = Fake(), Clock()
        cost = run_cost(tmp_path, fake, clock)
        for step in range(1, 1001):
            clock.now_s += 0.05
            cost.note(step, 0.05, skipped=False)
        lines = [line for line in (tmp_path / ENERGY_FILE).read_text().splitlines() if line]
        assert len(lines) == 5

    def test_a_killed_rank_stands_for_the_others(self, tmp_path: Path) -> None:
        fake, clock = Fake(), Clock()
        of_three = SimpleNamespace(rank=0, size=3, is_first=True, gather=lambda value, what: [value] * 3)
        killed = run_cost(tmp_path, fake, clock, of_three)
        fake.total = 100.0
        killed.note(1, 1.0, skipped=False)
        after = run_cost(tmp_path, Fake(), Clock()).finish()
        assert after is not None
        assert after.cpu.joules == pytest.approx(300.0)
        told = killed.finish()
        assert told is not None
        assert told.cpu.joules == pytest.approx(300.0)
        assert len(earlier_sessions(tmp_path / ENERGY_FILE, "none of them")) == 2

    def test_a_file_that_cannot_be_written_ends_nothing(self, tmp_path: Path) -> None:
        cost = run_cost(tmp_path / "no such folder", Fake(), Clock())
        cost.note(1, 1.0, skipped=False)
        assert cost.finish() is not None

    def test_off_says_nothing(self, tmp_path: Path) -> None:
        with RunCost(CostSection(energy="off"), Ranks(None), None) as cost:
            cost.open(tmp_path)
            cost.note(1, 1.0, skipped=False)
            assert cost.finish() is None
        assert list(tmp_path.iterdir()) == []


class TestConfig:
    def test_keys(self) -> None:
        cost = load_config({"cost": {"country": "SWE", "pue": 1.1, "cpu_core_watts": 6}}).cost
        assert (cost.country, cost.pue, cost.cpu_core_watts, cost.energy) == ("SWE", 1.1, 6.0, "auto")

    @pytest.mark.parametrize(
        ("key", "value", "fragment"),
        [("pue", 0.9, "a number, 1 or more"), ("country", "Sweden", "SWE"), ("grid_factor", -1, "0 or more")],
    )
    def test_what_cannot_be_is_refused(self, key: str, value: Any, fragment: str) -> None:
        with pytest.raises(UserError, match=fragment):
            load_config({"cost": {key: value}})

    def test_a_missing_extra_is_said_first(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("zero.report.codecarbon.importlib.util.find_spec", lambda name: None)
        with pytest.raises(UserError, match=r"-e \"\.\[energy\]\""):
            check_codecarbon("codecarbon")
        check_codecarbon("auto")

    def test_codecarbon_itself(self, capfd: pytest.CaptureFixture[str]) -> None:
        pytest.importorskip(
            "codecarbon", reason='codecarbon is not installed: pip install -c constraints.txt -e ".[energy]"'
        )
        meter = EnergyMeter(CostSection(energy="codecarbon"))
        reading = meter.read()
        meter.stop()
        assert reading.cpu.joules >= 0
        assert "codecarbon" in reading.cpu.method
        assert "[codecarbon INFO" not in "".join(capfd.readouterr())


class TestRun:
    """A real run and what it says."""

    def test_the_summary_has_the_lines(self, tmp_path: Path, capsys: Output) -> None:
        run = tmp_path / "run"
        assert (
            train(tmp_path, run, "--train.max_steps", "2", "--cost.country", "FRA", "--cost.energy", "estimated") == 0
        )
        said = capsys.readouterr().out
        assert "energy, GPU" in said
        assert "estimated: 10 W for each busy core" in said
        assert "with PUE 1 x 0.056 kg/kWh (FRA 2023, Ember" in said
        cost = json.loads((run / "summary.json").read_text())["cost"]
        assert cost["cpu_kwh"] > 0
        assert cost["gpu_kwh"] is None
        assert cost["co2e_kg"] == pytest.approx(cost["cpu_kwh"] * 0.056)
        assert cost["num_processes"] == 1
        assert (run / ENERGY_FILE).is_file()
        # Going on from its checkpoint, after some steps that are not in it.
        (run / "metrics.jsonl").open("a").write('{"step": 3}\n{"step": 4}\n')
        words = ("--train.resume_from_checkpoint", "true", "--train.max_steps", "5")
        assert train(tmp_path, run, *words) == 0
        after = json.loads((run / "summary.json").read_text())["cost"]
        assert after["num_processes"] == 2
        assert after["cpu_kwh"] > cost["cpu_kwh"]
        assert {lost["kind"]: lost["num_steps"] for lost in after["lost"]} == {
            "skipped": 0,
            "rolled back": 0,
            "repeated": 2,
        }
        assert "of it repeated" in capsys.readouterr().out

    def test_a_new_run_in_the_folder_begins_anew(self, tmp_path: Path) -> None:
        run = tmp_path / "run"
        for _ in range(2):
            assert train(tmp_path, run, "--train.max_steps", "1") == 0
        assert json.loads((run / "summary.json").read_text())["cost"]["num_processes"] == 1
        assert (run / "earlier-1" / ENERGY_FILE).is_file()

    def test_off(self, tmp_path: Path, capsys: Output) -> None:
        run = tmp_path / "run"
        assert train(tmp_path, run, "--train.max_steps", "1", "--cost.energy", "off") == 0
        assert "CO2e" not in capsys.readouterr().out
        assert not (run / ENERGY_FILE).exists()
        text = tmp_path / "t.txt"
        text.write_text("Some words to read.")
        words = ["eval", str(run / "model"), "--text", str(text)]
        assert main([*words, "--cost.energy", "off"]) == 0
        assert "CO2e" not in capsys.readouterr().out
        assert main([*words, "--cost.grid_factor", "0.1"]) == 0
        assert "0.1 kg/kWh (cost.grid_factor)" in capsys.readouterr().out


def test_units_leave_digits() -> None:
    part = Part(36.0, "m", True, None)
    cost = Cost(part, None, 1.0, grid_of(None, 0.5), 1.0)
    assert dict(cost.rows())["CO2e"].startswith("0.005 g = 0.01 Wh")
