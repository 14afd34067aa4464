"""Where a process is told its place: SLURM, the cores and threads it gets, and which failure is named first."""

from __future__ import annotations

import io
import os
from pathlib import Path

import pytest
import torch

from zero import UserError, binding
from zero.launching import slurm
from zero.launching.failure import Failure, first_failure, leave_word, read_words, trace_of
from zero.launching.output import PrefixedLines
from zero.launching.place import Place, complete_environment, find_place, tasks_left_out

Output = pytest.CaptureFixture[str]


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
