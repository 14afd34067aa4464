"""Several processes from one command: who they are, what they get, what they print, and how they end."""

from __future__ import annotations

import io
import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from gemini.hostinfo import cpu_count
from tests.cli_case import listing, write_config
from zero import UserError, binding
from zero.cli.main import main
from zero.launching import slurm
from zero.launching.failure import Failure, first_failure, leave_word, read_words, trace_of
from zero.launching.output import PrefixedLines
from zero.launching.place import Place, complete_environment, find_place, tasks_left_out
from zero.report.metrics import read_metrics

ROOT = Path(__file__).resolve().parent.parent
Output = pytest.CaptureFixture[str]

# Nothing but the sum over the ranks, where the engine is not what is tried.
SUM = """
import atexit, os, signal, sys
import torch, zero
import torch.distributed as dist
atexit.register(lambda: print("parted", not dist.is_initialized()))
zero.launch({"device": {"type": "cpu"}})
rank = dist.get_rank()
wish = sys.argv[1]
if rank == 1 and wish == "raise":
    raise ValueError("on purpose")
if wish == "fork":
    child = os.fork()
    if child == 0:
        sys.exit(3)
    print("child", os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
if rank == 1 and wish == "refuse":
    raise zero.UserError("not like this")
if rank == 1 and wish == "kill once" and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
    os.kill(os.getpid(), signal.SIGKILL)
total = torch.tensor([rank + 1.0])
dist.all_reduce(total)
print("total", float(total), "restarts", os.environ.get("TORCHELASTIC_RESTART_COUNT"), torch.get_num_threads())
sys.stderr.write(f"said by {rank}\\n")
sys.exit(0)
"""

TRAIN = """
import json, os, signal, sys, time
import torch, zero
import torch.distributed as dist
zero.launch({"device": {"type": "cpu"}, "parallel": {"replicate": "1B"}})
torch.manual_seed(0)
model = torch.nn.Linear(8, 8)
engine, *_ = zero.initialize(model, torch.optim.AdamW(model.parameters(), lr=0.01))
inputs, losses = torch.arange(64.0).view(8, 8) / 64, []
for _ in range(3):
    engine.zero_grad()
    loss = engine(inputs).pow(2).mean()
    engine.backward(loss)
    engine.step()
    losses.append(float(loss.detach()))
said = {"losses": losses, "words": sys.argv[1:], "size": dist.get_world_size()}
said["threads"] = os.environ.get("OMP_NUM_THREADS")
stop = []
signal.signal(signal.SIGTERM, lambda *_: stop.append(True))
dist.barrier()
print("trained", flush=True)
while not stop:
    time.sleep(0.05)
open(f"rank-{dist.get_rank()}.json", "w").write(json.dumps(said))
print("saved")
"""


def start(folder: Path, *words: str, **environment: str) -> subprocess.Popen[str]:
    """A command in a folder, as from a shell that knows nothing of ranks."""
    foreign = ("OMP_NUM_THREADS", "RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    clean = {name: value for name, value in os.environ.items() if name not in foreign and "SLURM" not in name}
    paths = os.pathsep.join([str(ROOT), clean.get("PYTHONPATH", "")])
    return subprocess.Popen(
        [sys.executable, *words], text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=folder,
        env={**clean, "PYTHONPATH": paths, **environment},
    )  # fmt: skip


def finish(process: subprocess.Popen[str], timeout_s: float = 90.0) -> tuple[int, str, str]:
    """Exit code, stdout and stderr; a command that hangs is killed and fails the test."""
    try:
        out, err = process.communicate(timeout=timeout_s)
    except subprocess.TimeoutExpired:
        process.kill()
        out, err = process.communicate()
        pytest.fail(f"it hung\n{out}\n{err}")
    return process.returncode, out, err


def script(folder: Path, text: str) -> str:
    path = folder / "loop.py"
    path.write_text(text)
    return str(path)


class TestRealLaunches:
    def test_two_ranks_train_with_one_loss_until_sigterm(self, tmp_path: Path) -> None:
        words = ("-nprocs", "2", "--steps", "3", "--nprocs")
        process = start(tmp_path, "-m", "zero", "run", script(tmp_path, TRAIN), *words)
        assert process.stdout is not None
        assert process.stdout.readline() == "trained\n"
        process.send_signal(signal.SIGTERM)
        code, out, err = finish(process)
        assert code == 0, err
        assert out == "saved\n", "the second rank prints no results"
        said = [json.loads((tmp_path / f"rank-{rank}.json").read_text()) for rank in range(2)]
        assert said[0] == said[1]
        assert said[0]["size"] == 2
        assert said[0]["words"] == ["--steps", "3", "--nprocs"]
        assert said[0]["threads"] == str(max(1, cpu_count() // 2))
        assert said[0]["losses"][2] < said[0]["losses"][0]

    @pytest.mark.full
    def test_under_torchrun(self, tmp_path: Path) -> None:
        torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
        code, out, err = finish(start(tmp_path, *torchrun, "-m", "zero", "run", script(tmp_path, SUM), "pass"))
        assert code == 0, err
        assert out == f"total 3.0 restarts 0 {max(1, cpu_count() // 2)}\nparted True\n"
        assert "[rank 1] said by 1\n" in err
        assert "\nsaid by 0\n" in err
        assert "destroy" not in err

    @pytest.mark.full
    def test_a_program_of_torchrun_names_the_cause(self, tmp_path: Path) -> None:
        torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
        code, _, err = finish(start(tmp_path, *torchrun, script(tmp_path, SUM), "raise"))
        assert code == 1
        cause = err.partition("Root Cause (first observed failure)")[2]
        assert "rank      : 1 " in cause
        assert "ValueError: on purpose" in cause

    @pytest.mark.full
    def test_zero_train_runs_as_ranks(self, tmp_path: Path) -> None:
        train = ("-m", "zero", "train", write_config(tmp_path))
        torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
        for name, words in (("ours", (*train, "--nprocs", "2")), ("torchrun", (*torchrun, *train))):
            code, out, err = finish(start(tmp_path, *words, "--train.output_dir", name), timeout_s=180)
            assert code == 0, err
            assert out.count("step 6/6") == 1
            assert "destroy" not in err
        ours, theirs = (read_metrics(tmp_path / name) for name in ("ours", "torchrun"))
        assert [line["loss"] for line in ours if "loss" in line] == [line["loss"] for line in theirs if "loss" in line]

    def test_a_rank_that_raises_is_named_with_its_traceback_once(self, tmp_path: Path) -> None:
        loop = script(tmp_path, SUM)
        code, _, err = finish(start(tmp_path, "-m", "zero", "run", "--nprocs", "2", loop, "raise"))
        assert code == 1
        # Gloo itself logs a line on a rank that was still connecting.
        err = "".join(line for line in err.splitlines(keepends=True) if not re.match(r"\[rank\d+\]:\[[EW]\d", line))
        assert err.startswith(f'zero: rank 1 failed\nTraceback (most recent call last):\n  File "{loop}"')
        assert err.endswith("ValueError: on purpose\n")
        assert err.count("Traceback") == err.count("on purpose") - 1 == 1, "once as source, once as message"
        assert "PeerLostError" not in err
        assert "elastic" not in err

    @pytest.mark.full
    def test_a_forked_child_is_no_rank(self, tmp_path: Path) -> None:
        options = ("--nprocs", "2", script(tmp_path, SUM), "fork")
        code, out, err = finish(start(tmp_path, "-m", "zero", "run", *options))
        assert code == 0, err
        assert "child 3\n" in out
        assert "total 3.0 restarts 0 " in out

    def test_a_killed_rank_is_named_and_all_start_again(self, tmp_path: Path) -> None:
        options = ("--nprocs", "2", "--max-restarts", "1")
        code, out, err = finish(
            start(tmp_path, "-m", "zero", "run", *options, script(tmp_path, SUM), "kill once"), timeout_s=120
        )
        assert code == 0, err
        assert "zero: rank 1 was killed by SIGKILL" in err
        assert "all ranks start again, restart 1 of 1" in err
        assert out.startswith("total 3.0 restarts 1 ")

    @pytest.mark.full
    def test_what_a_rank_refuses_is_said_once_and_not_tried_again(self, tmp_path: Path) -> None:
        options = ("--nprocs", "2", "--max-restarts", "5")
        code, out, err = finish(start(tmp_path, "-m", "zero", "run", *options, script(tmp_path, SUM), "refuse"))
        assert (code, out, err) == (2, "", "zero: not like this\n")

    @pytest.mark.full
    def test_inside_a_slurm_step(self, tmp_path: Path) -> None:
        loop = script(tmp_path, SUM)
        step = {
            **{"SLURM_JOB_ID": str(os.getpid()), "SLURM_STEP_ID": "0", "SLURM_NTASKS": "2"},
            **{"SLURM_STEP_NODELIST": "localhost", "SLURM_STEP_TASKS_PER_NODE": "2", "SLURM_NODEID": "0"},
        }
        tasks = [
            start(tmp_path, "-m", "zero", "run", loop, "x", SLURM_PROCID=str(rank), SLURM_LOCALID=str(rank), **step)
            for rank in range(2)
        ]
        (code, out, err), (other_code, other_out, other_err) = [finish(task) for task in tasks]
        assert (code, other_code) == (0, 0), err + other_err
        assert out == f"total 3.0 restarts None {max(1, cpu_count() // 2)}\nparted True\n"
        assert other_out == ""
        assert "[rank 1] said by 1\n" in other_err


class TestRefusals:
    @pytest.mark.parametrize(
        ("number", "fragment"),
        [("0", "at least 1"), ("-1", "at least 1"), ("two", "two"), ("1.5", "1.5"), ("1000", "--nprocs 1000")],
    )
    @pytest.mark.parametrize("option", ["--nprocs", "-nprocs"])
    def test_numbers_of_processes(
        self, option: str, number: str, fragment: str, tmp_path: Path, capsys: Output
    ) -> None:
        for command in (["train", write_config(tmp_path)], ["run"]):
            words = [*command, f"{option}={number}"] if option == "--nprocs" else [*command, option, number]
            path = script(tmp_path, "raise SystemExit('must not run')")
            assert main(words if command[0] == "train" else [*words, path]) == 2
            said = capsys.readouterr()
            assert fragment in said.err
            assert "Traceback" not in said.err

    def test_restarts(self, tmp_path: Path, capsys: Output) -> None:
        assert main(["train", write_config(tmp_path), "--max-restarts", "-1"]) == 2
        assert "at least 0" in capsys.readouterr().err

    def test_a_bad_config_is_said_once_and_starts_nothing(
        self, tmp_path: Path, capsys: Output, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        from zero.launching import agent

        monkeypatch.setattr(agent, "launch_ranks", _must_not_start)
        path = write_config(tmp_path, train={"max_steps": 0})
        before = listing(tmp_path)
        assert main(["train", path, "--nprocs", "2"]) == 2
        assert capsys.readouterr().err.count("train.max_steps = 0") == 1
        assert main(["run", script(tmp_path, ""), "--nprocs", "2", "--config", path]) == 2
        assert capsys.readouterr().err.count("train.max_steps = 0") == 1
        assert main(["run", "none.py", "--nprocs", "2"]) == 2
        (tmp_path / "loop.py").unlink()
        assert listing(tmp_path) == before

    def test_ranks_that_the_config_does_not_divide_into(
        self, tmp_path: Path, capsys: Output, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        from zero.launching import agent

        monkeypatch.setattr(agent, "launch_ranks", _must_not_start)
        assert main(["train", write_config(tmp_path), "--nprocs", "2", "--parallel.data", "3"]) == 2
        assert "parallel" in capsys.readouterr().err

    def test_a_rank_does_not_start_ranks(self, tmp_path: Path, capsys: Output, monkeypatch: pytest.MonkeyPatch) -> None:
        place = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}
        for name, value in {**place, "TORCHELASTIC_RUN_ID": "run"}.items():
            monkeypatch.setenv(name, value)
        path = script(tmp_path, "print('ran')")
        monkeypatch.setattr(sys, "argv", list(sys.argv))
        monkeypatch.setattr(sys, "path", list(sys.path))
        assert main(["run", path, "--nprocs", "2"]) == 2
        assert "is rank 0 of 1 already, started by torchrun with 1" in capsys.readouterr().err
        assert main(["run", "--max-restarts", "3", path]) == 2
        assert "torchrun" in capsys.readouterr().err
        assert main(["run", path, "--nprocs", "1"]) == 0
        assert capsys.readouterr().out == "ran\n"

    def test_two_ranks_do_not_share_an_accelerator(self) -> None:
        for device_type, count in (("cpu", 1), ("simulated", 1), ("auto", 0), ("auto", 2), ("cuda", 2)):
            binding.check_accelerators(device_type, 2, count)
        with pytest.raises(UserError, match="2 processes on a machine with 1 accelerator: .* --nprocs 1"):
            binding.check_accelerators("auto", 2, 1)


def _must_not_start(*_: Any) -> int:
    raise AssertionError("ranks were started")


class TestSlurm:
    @pytest.mark.parametrize(
        ("text", "hosts"),
        [
            ("gpu5", ["gpu5"]),
            ("a,b", ["a", "b"]),
            ("node[01-03,07],gpu5", ["node01", "node02", "node03", "node07", "gpu5"]),
            ("n[8-11]", ["n8", "n9", "n10", "n11"]),
            ("n[098-101].site", ["n098.site", "n099.site", "n100.site", "n101.site"]),
            ("rack[1-2]n[1,3]", ["rack1n1", "rack1n3", "rack2n1", "rack2n3"]),
            ("gpu-a-[2],gpu-b-7", ["gpu-a-2", "gpu-b-7"]),
        ],
    )
    def test_lists_of_hosts(self, text: str, hosts: list[str]) -> None:
        assert slurm.expand_hosts(text) == hosts

    @pytest.mark.parametrize("text", ["", "n[1-", "n[a-b]", "n]1[", "n[1-2-3]"])
    def test_lists_that_name_nothing(self, text: str) -> None:
        with pytest.raises(UserError, match="MASTER_ADDR"):
            slurm.expand_hosts(text)

    def test_counts_of_tasks(self) -> None:
        assert slurm.expand_counts("2(x3),1") == [2, 2, 2, 1]
        assert slurm.expand_counts("4") == [4]
        with pytest.raises(UserError, match="2x3"):
            slurm.expand_counts("2x3")

    def step(self, **changes: str) -> dict[str, str]:
        return {
            **{"SLURM_JOB_ID": "123456", "SLURM_STEP_ID": "0", "SLURM_PROCID": "5", "SLURM_NTASKS": "7"},
            **{"SLURM_LOCALID": "1", "SLURM_NODEID": "2", "SLURM_STEP_TASKS_PER_NODE": "2(x3),1"},
            **{"SLURM_JOB_NODELIST": "node[01-03],gpu5"},
            **changes,
        }

    def test_a_step_is_said_in_the_words_of_torchrun(self) -> None:
        environment = self.step()
        assert find_place(environment) == Place(rank=5, size=7, local_rank=1, local_size=2)
        complete_environment(environment)
        said = {name: environment[name] for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")}
        assert said == {"RANK": "5", "WORLD_SIZE": "7", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}
        assert environment["MASTER_ADDR"] == "node01"
        assert 49152 <= int(environment["MASTER_PORT"]) <= 65535
        assert find_place(environment) == Place(5, 7, 1, 2), "a second look finds the same"

    def test_the_port_is_of_the_job_and_the_step(self) -> None:
        ports = [slurm.meeting_point(self.step(**c))["MASTER_PORT"] for c in ({}, {"SLURM_PROCID": "1"})]
        assert ports[0] == ports[1], "every task finds it alone"
        assert slurm.meeting_point(self.step(SLURM_STEP_ID="1"))["MASTER_PORT"] != ports[0]
        assert slurm.meeting_point(self.step(SLURM_JOB_ID="123457"))["MASTER_PORT"] != ports[0]

    def test_what_the_user_has_set_stands(self) -> None:
        given = self.step(MASTER_ADDR="head", MASTER_PORT="50000", SLURM_JOB_NODELIST="n[")
        assert slurm.meeting_point(given) == {"MASTER_ADDR": "head", "MASTER_PORT": "50000"}

    @pytest.mark.parametrize("step", [None, "4294967290", "4294967291"], ids=["batch", "interactive", "batch number"])
    def test_the_shell_of_a_job_is_no_rank(self, step: str | None) -> None:
        environment = self.step(SLURM_PROCID="0")
        del environment["SLURM_STEP_ID"]
        if step is not None:
            environment["SLURM_STEP_ID"] = step
        assert find_place(environment) is None
        assert tasks_left_out(environment) == 7
        before = dict(environment)
        complete_environment(environment)
        assert environment == before

    def test_torchrun_within_a_step_has_the_word(self) -> None:
        environment = self.step(RANK="1", WORLD_SIZE="4", LOCAL_RANK="1", LOCAL_WORLD_SIZE="4")
        assert find_place(environment) == Place(1, 4, 1, 4)
        assert find_place({**environment, "RANK": "0", "WORLD_SIZE": "1"}) is None

    @pytest.mark.parametrize(
        "environment",
        [{"RANK": "2", "WORLD_SIZE": "2"}, {"RANK": "-1", "WORLD_SIZE": "2"}, {"RANK": "x", "WORLD_SIZE": "2"}],
    )
    def test_contradictions(self, environment: dict[str, str]) -> None:
        with pytest.raises(UserError, match="RANK"):
            find_place(environment)


class TestBinding:
    def machine(self, root: Path, *lists: str) -> Path:
        for node, cores in enumerate(lists):
            folder = root / f"devices/system/node/node{node}"
            folder.mkdir(parents=True)
            (folder / "cpulist").write_text(cores + "\n")
        return root

    def test_nodes(self, tmp_path: Path) -> None:
        root = self.machine(tmp_path, "0-3,8-11", "4-7", "")
        assert binding.numa_nodes(root) == {0: {0, 1, 2, 3, 8, 9, 10, 11}, 1: {4, 5, 6, 7}}
        assert binding.numa_nodes(tmp_path / "none") == {}
        assert binding.parse_cpu_list("odd,1-x,5") == {5}

    @pytest.mark.parametrize(
        ("local_size", "nodes"),
        [(2, [0, 1]), (3, [0, 0, 1]), (4, [0, 0, 1, 1]), (8, [0, 0, 0, 0, 1, 1, 1, 1])],
    )
    def test_each_rank_stays_on_the_node_of_its_share(self, local_size: int, nodes: list[int], tmp_path: Path) -> None:
        found = binding.numa_nodes(self.machine(tmp_path, "0-3", "4-7"))
        cores = [binding.cores_of_rank(Place(r, local_size, r, local_size), range(8), found) for r in range(local_size)]
        assert cores == [found[node] for node in nodes]

    def test_two_ranks_share_four_nodes(self, tmp_path: Path) -> None:
        found = binding.numa_nodes(self.machine(tmp_path, "0-1", "2-3", "4-5", "6-7"))
        assert binding.cores_of_rank(Place(1, 2, 1, 2), range(8), found) == {4, 5, 6, 7}

    def test_only_allowed_cores_count(self, tmp_path: Path) -> None:
        found = binding.numa_nodes(self.machine(tmp_path, "0-3", "4-7"))
        assert binding.cores_of_rank(Place(1, 2, 1, 2), {0, 1, 6}, found) == {6}
        assert binding.cores_of_rank(Place(1, 2, 1, 2), {0, 1, 2, 3}, found) is None, "one node is left"

    def test_an_accelerator_decides(self, tmp_path: Path) -> None:
        found = binding.numa_nodes(self.machine(tmp_path, "0-3", "4-7"))

        def node_of(rank: int, *device_nodes: int | None) -> int:
            cores = binding.cores_of_rank(Place(rank, 2, rank, 2), range(8), found, device_nodes)
            return next(node for node, of_node in found.items() if of_node == cores)

        assert [node_of(rank, 1, 0) for rank in range(2)] == [1, 0]
        assert [node_of(rank, 1, 1) for rank in range(2)] == [0, 1], "one node alone would leave half the cores idle"
        assert [node_of(rank, 5, None) for rank in range(2)] == [0, 1], "unknown nodes"

    def test_one_node_or_one_process_is_left_alone(self, tmp_path: Path) -> None:
        assert binding.cores_of_rank(Place(0, 2, 0, 2), range(8), {0: set(range(8))}) is None
        found = binding.numa_nodes(self.machine(tmp_path, "0-3", "4-7"))
        assert binding.cores_of_rank(Place(3, 4, 0, 1), range(8), found) is None

    def test_node_of_a_device(self, tmp_path: Path) -> None:
        folder = tmp_path / "bus/pci/devices/0000:3b:00.0"
        folder.mkdir(parents=True)
        (folder / "numa_node").write_text("1\n")
        assert binding.node_of_device("0000:3B:00.0", tmp_path) == 1
        (folder / "numa_node").write_text("-1\n")
        assert binding.node_of_device("0000:3b:00.0", tmp_path) is None
        assert binding.node_of_device("0000:00:00.0", tmp_path) is None

    @pytest.mark.parametrize(
        ("local_size", "environment", "threads"),
        [
            (1, {}, 8),
            (2, {}, 4),
            (3, {}, 2),
            (16, {}, 1),
            (4, {"SLURM_PROCID": "0", "SLURM_CPUS_ON_NODE": "8"}, 2),
            (4, {"SLURM_PROCID": "0", "SLURM_CPUS_ON_NODE": "32"}, 8),
        ],
        ids=["alone", "half", "a third", "too many", "SLURM, not bound", "SLURM, bound to 8 of 32"],
    )
    def test_threads(self, local_size: int, environment: dict[str, str], threads: int) -> None:
        assert binding.threads_per_rank(local_size, environment, usable_cores=8) == threads

    def test_the_users_threads_stand_and_torchruns_do_not(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        parent = tmp_path / str(os.getppid())
        parent.mkdir()
        torchrun = {"OMP_NUM_THREADS": "1", "TORCHELASTIC_RUN_ID": "run"}
        assert binding._is_of_torchrun(torchrun, tmp_path), "nobody can say"
        (parent / "environ").write_bytes(b"HOME=/\0PATH=/bin\0")
        assert binding._is_of_torchrun(torchrun, tmp_path)
        (parent / "environ").write_bytes(b"HOME=/\0OMP_NUM_THREADS=1\0")
        assert not binding._is_of_torchrun(torchrun, tmp_path)
        assert not binding._is_of_torchrun({**torchrun, "OMP_NUM_THREADS": "3"}, tmp_path)

        monkeypatch.setattr(binding, "threads_per_rank", lambda *_: 3)
        try:
            binding.use_threads(Place(0, 2, 0, 2), {"OMP_NUM_THREADS": "2"})
            assert torch.get_num_threads() == 1
            binding.use_threads(Place(0, 2, 0, 2), {})
            assert torch.get_num_threads() == 3
        finally:
            torch.set_num_threads(1)


class TestFailures:
    def words(self, *failures: tuple[int, float, bool]) -> list[Failure]:
        return [Failure(r, 1, f"said by {r}", time_s=time_s, lost_peer=lost) for r, time_s, lost in failures]

    def test_the_cause_comes_before_those_who_lost_a_peer(self) -> None:
        words = self.words((0, 1.0, True), (2, 3.0, False), (1, 2.0, False))
        assert first_failure(words, {0: 1, 1: 1, 2: 1}).rank == 1

    def test_a_silent_death_comes_before_those_who_lost_a_peer(self) -> None:
        found = first_failure(self.words((0, 1.0, True)), {0: 1, 1: -9})
        assert found.rank == 1
        assert found.describe() == "rank 1 was killed by SIGKILL: the kernel does that where memory runs out\nsaid by 0"
        assert "exit code 7" in first_failure([], {1: 7}).describe()
        assert first_failure([], {0: -15, 1: -9}).rank == 1, "the launcher ends those that are left by SIGTERM"
        assert first_failure([], {0: -15, 1: 2}).is_refusal
        assert first_failure(self.words((0, 1.0, True)), {0: 1}).describe() == "said by 0"

    def test_a_word_is_read_back(self, tmp_path: Path) -> None:
        try:
            raise KeyError("on purpose")
        except KeyError as error:
            for rank in (0, 1):
                folder = tmp_path / "attempt_0" / str(rank)
                folder.mkdir(parents=True)
                failure = Failure(rank, 1, "KeyError", trace_of(error))
                leave_word(error, failure, {"TORCHELASTIC_ERROR_FILE": str(folder / "error.json")})
            leave_word(error, failure, {})
        (tmp_path / "attempt_0/1/error.json").write_text("{half")
        (found,) = read_words(tmp_path)
        assert "KeyError: 'on purpose'" in found.describe()
        assert found.time_s > 0

    def test_the_error_files_of_torch_are_read_too(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        from torch.distributed.elastic.multiprocessing.errors import ErrorHandler

        (tmp_path / "1").mkdir()
        monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / "1" / "error.json"))
        try:
            raise KeyError("on purpose")
        except KeyError as error:
            ErrorHandler().record_exception(error)
        (found,) = read_words(tmp_path)
        assert found.rank == 1
        assert "on purpose" in found.describe()

    def test_lines_carry_the_number_of_their_rank(self) -> None:
        out = io.StringIO()
        lines = PrefixedLines(out, "[rank 3] ")
        for part in ("one\ntw", "o\n", "", "three"):
            lines.write(part)
        assert out.getvalue() == "[rank 3] one\n[rank 3] two\n"
        lines.finish()
        assert out.getvalue().endswith("[rank 3] three\n")
