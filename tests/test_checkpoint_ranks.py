"""Any number of ranks loads what any other number saved, bit for bit; one rank's trouble is everybody's."""

from __future__ import annotations

import json
import logging
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from tests.checkpoint_helpers import CountingFiles, FailingFiles, differences
from tests.checkpoint_ranks_case import files_of, make, own_state, place, train, whole_state
from tests.ranks import run_ranks
from zero.checkpoint import CheckpointError, export, files, find_latest, finding, verify
from zero.checkpoint.files import Files
from zero.checkpoint.manifest import read_manifest

logger = logging.getLogger("tests")
SIZES = (1, 2, 3, 4)


def run(function: Any, size: int, *args: Any) -> list[Any]:
    """One process without a group, or several ranks."""
    return run_ranks(function, size, *args, own_group=size > 1)


# -- any number loads any other --------------------------------------------------------------------------------------


def save_all(folder: str, dtypes: list[str]) -> dict[str, Any]:
    """Trains and saves with each dtype; returns the states."""
    states = {}
    for dtype in dtypes:
        engine = make(dtype)
        train(engine, 3)
        states[dtype] = whole_state(engine)
        engine.save_checkpoint(Path(folder) / dtype, extra={"dtype": dtype}, asynchronous=dtype == "bf16")
        engine.close()
    return states


def load_all(folder: str, sizes: list[int], dtypes: list[str]) -> dict[tuple[int, str], Any]:
    """Loads what each number of ranks has saved; returns the states."""
    states = {}
    for size in sizes:
        for dtype in dtypes:
            engine = make(dtype, seed=9)
            loaded = engine.load_checkpoint(Path(folder) / str(size) / dtype)
            engine.check_integrity()
            states[size, dtype] = whole_state(engine), loaded, own_state(engine)
            train(engine, 1)
            engine.close()
    return states


@pytest.mark.parametrize(
    ("sizes", "dtypes"),
    [((1, 2, 3), ["fp16"]), pytest.param(SIZES, ["fp32", "bf16", "fp16"], marks=pytest.mark.full)],
)
def test_any_number_of_ranks_loads_any_others(tmp_path: Path, sizes: tuple[int, ...], dtypes: list[str]) -> None:
    """Parameters, masters, moments, step counts, loss scale, counters: put together, every bit is what was saved."""
    saved = {size: run(save_all, size, str(tmp_path / str(size)), dtypes) for size in sizes}
    count = 0
    for size in sizes:
        for rank in run(load_all, size, str(tmp_path), list(sizes), dtypes):
            for (before, dtype), (state, loaded, _) in rank.items():
                assert differences(saved[before][0][dtype], state) == [], (before, size, dtype)
                assert (loaded.step, loaded.extra) == (3, {"dtype": dtype})
                assert any("random generators start" in line for line in loaded.warnings) == (before != size)
                count += 1
    logger.warning("%d ranks' loads compared, over %d pairs of numbers of ranks", count, len(sizes) ** 2)
    assert count == sum(sizes) * len(sizes) * len(dtypes)


def test_each_rank_writes_only_what_it_owns(tmp_path: Path) -> None:
    """Every element once; the work is divided; each rank names its own files."""
    run(save_all, 1, str(tmp_path / "1"), ["fp32"])
    run(save_all, 3, str(tmp_path / "3"), ["fp32"])
    one, three = (find_latest(tmp_path / size / "fp32") for size in "13")
    names = files_of(three)
    assert {f"rank-{rank:05d}.json" for rank in range(3)} <= set(names)
    manifest = read_manifest(three)
    assert manifest.world["size"] == 3
    by_rank = [sum(_bytes(part) for part in manifest.tensors if f"-r{rank:05d}-" in part.file) for rank in range(3)]
    assert sum(by_rank) == sum(_bytes(part) for part in read_manifest(one).tensors)
    assert max(by_rank) < 0.5 * sum(by_rank)
    whole = [part for part in manifest.tensors if part.numel == part.stop - part.start and part.role == "parameter"]
    assert {part.file[9:14] for part in whole} >= {"00000", "00001"}  # small chunks are spread over ranks
    assert verify(three) == []


def _bytes(part: Any) -> int:
    return (part.stop - part.start) * getattr(torch, part.dtype).itemsize


# -- going on --------------------------------------------------------------------------------------------------------


def never_stopped(num_micro_steps: int, accumulation: int) -> Any:
    engine = make(accumulation=accumulation)
    losses = train(engine, num_micro_steps)
    return losses, whole_state(engine), own_state(engine)["rng"]


def stop(folder: str, num_micro_steps: int, accumulation: int, asynchronous: bool) -> Any:
    engine = make(accumulation=accumulation)
    losses = train(engine, num_micro_steps)
    engine.save_checkpoint(folder, asynchronous=asynchronous)
    if asynchronous:
        train(engine, 3)  # the training that goes on leaves no trace in the checkpoint
    engine.close()
    return losses


def go_on(folder: str, num_micro_steps: int, accumulation: int) -> Any:
    engine = make(accumulation=accumulation, seed=5)
    engine.load_checkpoint(folder)
    return train(engine, num_micro_steps), whole_state(engine), own_state(engine)["rng"]


@pytest.mark.parametrize(
    ("size", "accumulation", "asynchronous"),
    [(2, 3, True), (3, 1, False), *(pytest.param(4, a, b, marks=pytest.mark.full) for a in (1, 3) for b in (0, 1))],
)
def test_resume_on_as_many_ranks_is_exact(tmp_path: Path, size: int, accumulation: int, asynchronous: bool) -> None:
    """Losses of every rank, the whole state and every rank's generators; with accumulation in an open window."""
    straight = run(never_stopped, size, 7, accumulation)
    first = run(stop, size, str(tmp_path), 4, accumulation, asynchronous)
    second = run(go_on, size, str(tmp_path), 3, accumulation)
    for rank in range(size):
        losses, state, rng = straight[rank]
        assert first[rank] + second[rank][0] == losses
        assert differences(state, second[rank][1]) == []
        assert torch.equal(rng, second[rank][2])


def gradients_of(folder: str, save: bool) -> dict[str, torch.Tensor]:
    """What the ranks' gradients of an open window come to, as their mean."""
    engine = make(accumulation=3, seed=0 if save else 4)
    if save:
        train(engine, 2)
        engine.save_checkpoint(folder)
    else:
        engine.load_checkpoint(folder)
    engine._agreement.settle_gradients()
    return {t.name: t.chunk.companion_of(t, "gradient") for t in engine._tensors.values() if t.has_gradient}


def test_an_open_window_is_divided_anew(tmp_path: Path) -> None:
    """Gradients summed by 3 ranks are the same mean for 1, 2 and 4."""
    saved = run(gradients_of, 3, str(tmp_path), True)[0]
    assert len(saved) > 8
    for size in (1, 2, 4):
        for rank in run(gradients_of, size, str(tmp_path), False):
            assert rank.keys() == saved.keys()
            for name, value in saved.items():
                assert torch.allclose(rank[name], value, rtol=1e-6, atol=1e-9), name


def test_derived_generators(tmp_path: Path) -> None:
    """On another number of ranks: the same from run to run, and no two ranks alike."""
    run(save_all, 2, str(tmp_path / "2"), ["fp32"])
    states = [run(load_all, 3, str(tmp_path), [2], ["fp32"]) for _ in range(2)]
    drawn = [[rank[2, "fp32"][2]["rng"] for rank in ranks] for ranks in states]
    assert all(torch.equal(a, b) for a, b in zip(*drawn, strict=True))
    assert not any(torch.equal(drawn[0][a], drawn[0][b]) for a, b in ((0, 1), (0, 2), (1, 2)))


# -- trouble ---------------------------------------------------------------------------------------------------------


def fail_at(folder: str, rank: int, points: list[int], asynchronous: bool) -> list[str]:
    """One operation after another fails on one rank; the texts that this rank reads."""
    engine = make()
    engine.save_checkpoint(folder)
    train(engine, 1)
    texts = []
    for at in points:
        operations = FailingFiles(at) if place()[0] == rank else CountingFiles()
        with files.replaced(operations):
            try:
                engine.save_checkpoint(folder, asynchronous=asynchronous)
                engine.synchronize()
                texts.append("")
            except CheckpointError as error:
                texts.append(str(error))
        engine.load_checkpoint(folder)
        assert find_latest(Path(folder)) is not None
        assert verify(find_latest(Path(folder))) == []
    engine.save_checkpoint(folder)
    assert sorted(path.name for path in Path(folder).iterdir())[0].startswith("step-")
    return texts


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("asynchronous", [False, True])
def test_a_failure_on_one_rank_is_raised_on_all(tmp_path: Path, rank: int, asynchronous: bool) -> None:
    """A full disk at any operation of one rank: all name the rank, and older checkpoints stand."""
    points = [0, 1, 2, 5, 8, 14, 20, 40]
    for texts in run(fail_at, 2, str(tmp_path), rank, points, asynchronous):
        failed = [text for text in texts if text]
        assert len(failed) >= 6
        for text in failed:
            assert text.startswith(f"rank {rank}: the checkpoint of step ")
            assert "No space left on device" in text
            assert "checkpoints written before still stand" in text


def refuse(folder: str) -> list[str]:
    """What each rank reads when it cannot be done."""
    rank = place()[0]
    texts = []

    def expect(do: Any) -> None:
        try:
            do()
        except CheckpointError as error:
            texts.append(str(error))
        else:
            texts.append("")

    engine = make()
    path = engine.save_checkpoint(folder)
    room = Files.free_bytes
    Files.free_bytes = lambda *_: (1 << 20) + 20_000  # room for one rank's part, not for all of them
    expect(lambda: engine.save_checkpoint(folder))
    Files.free_bytes = room
    expect(lambda: engine.save_checkpoint(folder, extra={"bad": object() if rank == 0 else 1}))
    # Damage that only one rank sees.
    check = finding._check_file

    def sees_damage(checkpoint: Path, record: Any) -> None:
        if record.path == "rank-00001.json":
            raise finding.DamagedError(f"{record.path} has changed since it was written (its SHA-256 differs)")
        check(checkpoint, record)

    if rank == 1:
        finding._check_file = sees_damage
    expect(lambda: engine.load_checkpoint(path))
    finding._check_file = check
    expect(lambda: engine.load_checkpoint(Path(folder) / "none"))
    engine.load_checkpoint(folder)
    train(engine, 1)
    return texts


def test_refusals_are_everybodys(tmp_path: Path) -> None:
    for texts in run(refuse, 2, str(tmp_path)):
        room, extra, damage, none = texts
        assert room.startswith("rank 0: the checkpoint of step 0 needs")
        assert "Nothing was written" in room
        assert extra.startswith("rank 0: extra.bad is a builtins.object")
        assert damage.startswith("rank 1: checkpoint ")
        assert "rank-00001.json has changed" in damage
        assert "is no folder" in none


class SlowFiles(CountingFiles):
    """One write takes longer than ranks wait for each other."""

    def write(self, handle: Any, data: memoryview) -> None:
        super().write(handle, data)
        if sum(name == "write" for name, _ in self.log) == 3:
            time.sleep(3.5)


def save_slowly(folder: str) -> None:
    engine = make(parallel={"timeout": 2.0, "replicate": 600})
    with files.replaced(SlowFiles() if place()[0] == 1 else CountingFiles()):
        engine.save_checkpoint(folder)


def test_a_slow_disk_is_no_lost_rank(tmp_path: Path) -> None:
    """The rank that still writes says so."""
    run(save_slowly, 2, str(tmp_path))
    assert verify(find_latest(tmp_path)) == []


def keep_two(folder: str) -> list[str]:
    engine = make()
    for _ in range(4):
        train(engine, 1)
        engine.save_checkpoint(folder, save_total_limit=2, asynchronous=True)
    engine.close()
    return sorted(path.name for path in Path(folder).iterdir())


def test_old_ones_go_once(tmp_path: Path) -> None:
    for names in run(keep_two, 2, str(tmp_path)):
        assert names == ["step-00000003", "step-00000004"]


# -- export ----------------------------------------------------------------------------------------------------------


def train_llama(folder: str) -> torch.Tensor:
    """Trains and saves; returns logits."""
    import zero

    torch.manual_seed(0)
    shape = {"intermediate_size": 48, "num_key_value_heads": 2, "max_position_embeddings": 32}
    common = {"vocab_size": 96, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**common, **shape))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    config = {"device": {"type": "cpu"}, "precision": {"dtype": "bf16"}, "parallel": {"replicate": "100B"}}
    engine = zero.initialize(model, optimizer, config=config)[0]
    ids = torch.randint(0, 96, (2, 12), generator=torch.Generator().manual_seed(place()[0]))
    for _ in range(2):
        engine.zero_grad()
        engine.backward(engine(input_ids=ids, labels=ids).loss)
        engine.step()
    engine.save_checkpoint(folder)
    engine.eval()
    with torch.no_grad():
        return engine(input_ids=torch.arange(24).view(2, 12)).logits.clone()


def test_export_of_three_ranks_loads_in_plain_transformers(tmp_path: Path) -> None:
    logits = run(train_llama, 3, str(tmp_path / "run"))[0]
    slices = json.loads((find_latest(tmp_path / "run") / "manifest.json").read_text())["tensors"]
    assert {part["file"][9:14] for part in slices} == {"00000", "00001", "00002"}
    export(tmp_path / "run", tmp_path / "hf")
    model, info = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf", output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    with torch.no_grad():
        assert torch.equal(model.eval()(input_ids=torch.arange(24).view(2, 12)).logits, logits)
