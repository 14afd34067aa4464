"""Several processes from one command: who they are, what they get, what they print, and how they end."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from gemini.hostinfo import cpu_count
from tests.cli_case import listing, write_config
from zero import UserError, binding
from zero.cli.main import main
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
