"""A resumed run is the run that was never stopped, bit for bit; what does not belong together is refused by name."""

from __future__ import annotations

import functools
import json
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from tests import checkpoint_helpers as helpers
from tests.checkpoint_helpers import Setting, Trainer, batches, differences, everything
from zero.checkpoint import CheckpointError, codec, contents, find_latest, tensorfile, verify
from zero.checkpoint.hyperparameters import restore_groups
from zero.checkpoint.rng import restore_rng, rng_state

BATCHES = batches(6)


@pytest.fixture(autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def _begin(setting: Setting) -> Trainer:
    trainer = Trainer(setting)
    torch.manual_seed(5)
    return trainer


@functools.cache
def _never_stopped(dtype: str, accumulation: int, scale: float) -> tuple[list[Any], dict[str, Any]]:
    trainer = _begin(Setting(policy="cuda", dtype=dtype, accumulation=accumulation, scale=scale)).run(BATCHES)
    return trainer.seen, everything(trainer.engine)


SCALES = {"fp32": 1.0, "bf16": 1.0, "fp16": 2.0**18}
PLACEMENTS = {
    "auto-to-cpu": ({"policy": "auto"}, {"policy": "cpu"}),
    "cpu-to-cuda": ({"policy": "cpu"}, {"policy": "cuda", "memory": {"chunk": 20_000}}),
    "static-to-tight-auto": (
        {"policy": "static", "memory": {"resident_parameters": 0.3, "resident_optimizer": 0.6}},
        {"policy": "auto", "capacity_bytes": 250_000},
    ),
}


def _resumes() -> list[Any]:
    """Every dtype, placement and accumulation; in the short run one placement of each without accumulation."""
    cases = []
    for number, dtype in enumerate(SCALES):
        for position, placement in enumerate(PLACEMENTS):
            marks = () if position == number else (pytest.mark.full,)
            cases.append(pytest.param(dtype, placement, 1, id=f"{dtype}-{placement}-1", marks=marks))
            cases.append(pytest.param(dtype, placement, 2, id=f"{dtype}-{placement}-2"))
    return cases


@pytest.mark.parametrize(("dtype", "placement", "accumulation"), _resumes())
def test_resume_is_exact(tmp_path: Path, dtype: str, placement: str, accumulation: int) -> None:
    """Losses, scales, rates and the whole state; with accumulation the save falls into an open window."""
    scale = SCALES[dtype]
    before, after = ({"dtype": dtype, "scale": scale, "accumulation": accumulation, **c} for c in PLACEMENTS[placement])
    first = _begin(Setting(**before)).run(BATCHES[:3])
    first.save(tmp_path)
    saved = everything(first.engine)
    torch.manual_seed(999)  # whatever else happens in the new process

    second = Trainer(Setting(**after))
    second.load(tmp_path)
    assert differences(saved, everything(second.engine)) == []
    second.engine.check_integrity()
    second.run(BATCHES[3:])
    seen, end = _never_stopped(dtype, accumulation, scale)
    assert first.seen + second.seen == seen
    assert differences(end, everything(second.engine)) == []
    if dtype == "fp16":
        assert second.engine.num_skipped_steps > 0  # the loss scale did move
    # The run that saved is not disturbed by it either.
    torch.set_rng_state(saved["rng"])
    assert first.run(BATCHES[3:]).seen == seen


@pytest.mark.parametrize("optimizer", helpers.OPTIMIZERS)
def test_every_optimizer_state_comes_back(tmp_path: Path, optimizer: str) -> None:
    """Whatever a torch optimizer keeps: moments by name, step counts and products as scalars."""
    first = _begin(Setting("llama", optimizer)).run(BATCHES[:2])
    first.save(tmp_path)
    second = Trainer(Setting("llama", optimizer, policy="cpu"))
    second.load(tmp_path)
    assert differences(everything(first.engine), everything(second.engine)) == []
    assert first.run(BATCHES[2:4]).seen[2:] == second.run(BATCHES[2:4]).seen


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_native_kernel_resumes_exactly(tmp_path: Path, dtype: str) -> None:
    """The C kernel rounds values itself; a resume rounds them from the master: the bits must agree."""
    setting = Setting(policy="cpu", dtype=dtype, kernel="auto")
    first = _begin(setting).run(BATCHES[:3])
    first.save(tmp_path)
    second = Trainer(setting)
    second.load(tmp_path)
    assert differences(everything(first.engine), everything(second.engine)) == []


def test_a_used_engine_forgets_its_own_past(tmp_path: Path) -> None:
    """Rolling back inside a running process leaves nothing of what came after."""
    trainer = _begin(Setting()).run(BATCHES[:2])
    trainer.save(tmp_path)
    saved = everything(trainer.engine)
    later = trainer.run(BATCHES[2:5]).seen[2:]
    state = trainer.load(tmp_path)
    assert (state.step, trainer.engine.num_steps) == (2, 2)
    assert differences(saved, everything(trainer.engine)) == []
    assert trainer.run(BATCHES[2:5]).seen[5:] == later


def test_frozen_unused_and_buffers(tmp_path: Path) -> None:
    """Frozen parameters, parameters that never got a gradient, and buffers that training moves."""

    def prepare(model: nn.Module) -> None:
        model.model.embed_tokens.requires_grad_(False)
        model.unused = nn.Parameter(torch.ones(3))
        model.register_buffer("kept", torch.zeros(4))
        model.register_buffer("cache", torch.zeros(2), persistent=False)
        model.register_buffer("grown", torch.zeros(1), persistent=False)

    first = _begin(Setting("llama", dtype="bf16", prepare=prepare)).run(BATCHES[:2])
    first.engine.module.kept += 3
    first.engine.module.cache += 4
    first.engine.module.grown = torch.full((5,), 7.0)
    first.save(tmp_path)
    second = Trainer(Setting("llama", dtype="bf16", prepare=prepare))
    second.load(tmp_path)
    assert differences(everything(first.engine), everything(second.engine)) == []
    assert second.engine.module.grown.tolist() == [7.0] * 5


def test_frozen_values_may_stay_out(tmp_path: Path) -> None:
    """Without frozen values the checkpoint is smaller, and only a model that has them may load it."""

    def prepare(model: nn.Module) -> None:
        model.model.embed_tokens.requires_grad_(False)

    def other(model: nn.Module) -> None:
        prepare(model)
        model.model.embed_tokens.weight.data[3, 4] += 1

    setting = Setting("llama", prepare=prepare)
    first = _begin(setting).run(BATCHES[:1])
    whole, small = first.save(tmp_path / "whole"), first.save(tmp_path / "small", include_frozen=False)
    assert _num_bytes(whole) - _num_bytes(small) > 96 * 32 * 4 - 2000
    second = Trainer(setting)
    second.load(small)
    assert differences(everything(first.engine), everything(second.engine)) == []
    with pytest.raises(CheckpointError, match=r"model\.embed_tokens\.weight: frozen and not stored"):
        Trainer(Setting("llama", prepare=other)).load(small)


def _num_bytes(path: Path) -> int:
    return sum(file.stat().st_size for file in helpers.all_files(path))


def test_large_tensors_are_cut(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Files stay within their limit, a tensor larger than it becomes slices, and comes back whole."""
    monkeypatch.setattr(contents, "MAX_FILE_BYTES", 5000)
    first = _begin(Setting(policy="static", memory={"resident_parameters": 0.37, "resident_optimizer": 0.61}))
    path = first.run(BATCHES[:2]).save(tmp_path)
    files = sorted(path.glob("*.safetensors"))
    assert len(files) > 60
    assert all(file.stat().st_size < 5000 + 4000 for file in files)  # and a header
    slices = json.loads((path / "manifest.json").read_text())["tensors"]
    assert any(part["start"] > 0 for part in slices)
    second = Trainer(Setting(policy="cpu", memory={"chunk": 7000}))
    second.load(path)
    assert differences(everything(first.engine), everything(second.engine)) == []


def test_memory_order_differs(tmp_path: Path) -> None:
    """A parameter whose memory runs over its dimensions in another order loads into one of the usual order."""

    def transpose(model: nn.Module) -> None:
        weight = model.model.layers[0].mlp.up_proj.weight
        weight.data = weight.data.t().contiguous().t()

    odd, usual = Setting("llama", prepare=transpose), Setting("llama")
    for source, target in ((odd, usual), (usual, odd), (odd, odd)):
        first = _begin(source).run(BATCHES[:2])
        path = first.save(tmp_path)
        second = Trainer(target)
        second.load(path)
        assert differences(everything(first.engine), everything(second.engine)) == []


def test_all_generators_come_back(tmp_path: Path) -> None:
    """torch, Python and numpy go on where they were; saving draws from none of them."""
    trainer = _begin(Setting())
    random.seed(4), np.random.seed(4), np.random.normal(), random.gauss(0, 1)
    trainer.save(tmp_path)
    drawn = (torch.rand(3).tolist(), random.random(), random.gauss(0, 1), np.random.normal(), np.random.rand())
    torch.manual_seed(0), random.seed(0), np.random.seed(0)
    trainer.load(tmp_path)
    again = (torch.rand(3).tolist(), random.random(), random.gauss(0, 1), np.random.normal(), np.random.rand())
    assert drawn == again


def test_saving_copies_nothing_on_the_host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is written of parameters and states are views of where they live, a block at a time."""
    trainer = _begin(Setting(policy="cpu", dtype="bf16")).run(BATCHES[:1])
    held = [
        (buffer.data_ptr(), buffer.data_ptr() + buffer.nbytes)
        for chunk in trainer.engine.manager.chunks
        for segment in chunk.segments
        for buffer in (segment.values, *segment.companions.values())
    ]
    monkeypatch.setattr(tensorfile, "BLOCK_BYTES", 1000)
    written: list[torch.Tensor] = []
    as_bytes = tensorfile.as_bytes
    monkeypatch.setattr(tensorfile, "as_bytes", lambda block: (written.append(block), as_bytes(block))[1])
    trainer.save(tmp_path)
    assert len(written) > 400
    for block in written:
        assert block.nbytes <= 1000
        assert any(start <= block.data_ptr() < stop for start, stop in held)


def test_an_accelerators_generator_comes_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its state is stored too; on another kind of device that is said."""
    device = torch.device("cuda", 0)

    class Module:
        state = torch.arange(16, dtype=torch.uint8)
        get_rng_state = staticmethod(lambda _: Module.state.clone())
        set_rng_state = staticmethod(lambda state, _: setattr(Module, "state", state))

    monkeypatch.setattr(torch, "get_device_module", lambda _: Module)
    saved, before = codec.parse(codec.dump(rng_state(device))), Module.state
    Module.state = torch.zeros(16, dtype=torch.uint8)
    assert restore_rng(saved, device) == []
    assert torch.equal(Module.state, before)
    assert "written on cuda, this run computes on cpu" in restore_rng(saved, torch.device("cpu"))[0]


CHILD = """
import sys, torch
torch.set_num_threads(1)
from pathlib import Path
from tests.checkpoint_helpers import Setting, Trainer, batches
trainer = Trainer(Setting(policy="cpu", dtype="bf16"))
state = trainer.load(Path(sys.argv[1]))
print(state.step, state.extra, [x.hex() for seen in trainer.run(batches(6)[3:]).seen for x in seen])
"""


def test_another_process_goes_on(tmp_path: Path) -> None:
    """Nothing but the folder passes between the processes."""
    first = _begin(Setting(dtype="bf16")).run(BATCHES[:3])
    first.save(tmp_path, extra={"epoch": 1, "index": 24})
    done = subprocess.run([sys.executable, "-c", CHILD, tmp_path], capture_output=True, text=True, timeout=120)
    seen = [x.hex() for seen in first.run(BATCHES[3:]).seen[3:] for x in seen]
    assert done.stdout.strip().splitlines()[-1:] == [f"3 {{'epoch': 1, 'index': 24}} {seen}"], done.stderr


def test_trace_is_taken_over_only_where_it_is_true(tmp_path: Path) -> None:
    """The same layout and device go on without a warm-up; other chunks warm up anew."""
    first = _begin(Setting()).run(BATCHES[:2])
    first.save(tmp_path)
    same, other = Trainer(Setting()), Trainer(Setting(memory={"chunk": 9000}))
    same.load(tmp_path), other.load(tmp_path)
    assert same.engine.manager.trace == first.engine.manager.trace
    assert other.engine.manager.trace is None


# -- settings that changed -------------------------------------------------------------------------------------------


def test_unchanged_hyperparameters_are_not_mentioned(tmp_path: Path) -> None:
    first = _begin(Setting()).run(BATCHES[:1])
    first.save(tmp_path)
    assert Trainer(Setting(policy="cpu")).load(tmp_path).warnings == ()


def test_tensor_rates_are_restored() -> None:
    """A learning rate may be a tensor."""
    mine = [{"lr": torch.tensor(0.5), "fused": True}]
    notes = restore_groups(mine, [{"lr": torch.tensor(0.25), "fused": None, "new": 3}], obey=False)
    assert (mine[0]["lr"].item(), mine[0]["fused"], mine[0]["new"], len(notes)) == (0.25, True, 3, 1)


def test_mismatches_are_all_named(tmp_path: Path) -> None:
    """Shapes, missing and unexpected parameters, freezing, buffers, optimizer and scheduler, in one message."""
    first = _begin(Setting("llama"))
    first.save(tmp_path)

    def prepare(model: nn.Module) -> None:
        model.model.norm = nn.LayerNorm(33, bias=True)
        model.model.layers[1].input_layernorm.weight.requires_grad_(False)
        model.register_buffer("more", torch.zeros(1))

    other = Trainer(Setting("llama", "sgd", prepare=prepare))
    before = everything(other.engine)
    with pytest.raises(CheckpointError) as caught:
        other.load(tmp_path)
    text = str(caught.value)
    for expected in (
        "model.norm.weight: shape [32] in the checkpoint, [33] in the model",
        "model.norm.bias: in the model, not in the checkpoint",
        "model.layers.1.input_layernorm.weight: trained in the checkpoint, frozen in the model",
        "buffer more: in the model, not in the checkpoint",
        "optimizer: AdamW in the checkpoint, SGD here",
    ):
        assert expected in text
    assert differences(before, everything(other.engine)) == []  # nothing was touched


def test_ties_and_schedulers_must_agree(tmp_path: Path) -> None:
    tied = _begin(Setting("opt-pre-norm"))
    tied.engine.save_checkpoint(tmp_path)  # without its scheduler

    def untie(model: nn.Module) -> None:
        model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().clone())

    with pytest.raises(CheckpointError, match=r"lm_head\.weight: in the model, not in the checkpoint"):
        Trainer(Setting("opt-pre-norm", prepare=untie)).load(tmp_path)
    with pytest.raises(CheckpointError, match="lr_scheduler: one was given, but the checkpoint was written without"):
        Trainer(Setting("opt-pre-norm")).load(tmp_path)


# -- what can be stored ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "value",
    [
        None, True, 0, -(2**80), 0.1, -0.0, float("inf"), float("-inf"), "text\u2028\U0001f600",
        [], {}, (), (1, (2.5, None)), {"a": {"b": [1]}}, {1: "x", (2, 3): "y"}, {"$tuple": 1},
        torch.tensor(3.5), torch.tensor([[1, 2]], dtype=torch.int8), torch.empty(0, 3), torch.tensor(1.5).bfloat16(),
    ],
)  # fmt: skip
def test_codec_is_exact(value: Any) -> None:
    text = codec.dump(codec.encode(value, "value"))
    assert differences(codec.decode(codec.parse(text)), value) == []
    assert type(codec.decode(codec.parse(text))) is type(value)


@pytest.mark.parametrize("value", [object(), lambda: 0, {1, 2}, b"bytes", np.zeros(3), torch.zeros(1 << 20), Path("x")])
def test_what_is_not_json_is_refused_before_writing(tmp_path: Path, value: Any) -> None:
    """Never a pickle: the refusal names the place, and nothing is written."""
    trainer = _begin(Setting())
    with pytest.raises(CheckpointError, match=r"extra\.deep\[0\] is a .* which a checkpoint cannot hold"):
        trainer.save(tmp_path / "new", extra={"deep": [value]})
    assert not (tmp_path / "new").exists()


def test_schedulers_of_torch_come_back(tmp_path: Path) -> None:
    """Counters with whole-number keys, infinities, schedulers inside schedulers."""
    schedules = torch.optim.lr_scheduler
    makers = [
        lambda o: schedules.MultiStepLR(o, milestones=[1, 3]),
        lambda o: schedules.OneCycleLR(o, max_lr=0.1, total_steps=10),
        lambda o: schedules.ReduceLROnPlateau(o),
        lambda o: schedules.CosineAnnealingWarmRestarts(o, T_0=3),
        lambda o: schedules.SequentialLR(o, [schedules.LinearLR(o), schedules.CosineAnnealingLR(o, 9)], milestones=[2]),
    ]
    for make in makers:
        first, second = _begin(Setting("llama")), Trainer(Setting("llama"))
        for trainer in (first, second):
            trainer.scheduler = make(trainer.engine.optimizer)
        for _ in range(2):
            first.engine.optimizer.mark_stepped()
            _advance(first.scheduler)
        first.save(tmp_path)
        second.load(tmp_path)
        second.engine.optimizer.mark_stepped()
        for _ in range(4):
            _advance(first.scheduler), _advance(second.scheduler)
            rates = [t.engine.optimizer.param_groups[0]["lr"] for t in (first, second)]
            assert rates[0] == rates[1]


def _advance(scheduler: Any) -> None:
    plateau = isinstance(scheduler, torch.optim.lr_scheduler.ReduceLROnPlateau)
    scheduler.step(1.0) if plateau else scheduler.step()


def test_saving_inside_a_pass_is_refused(tmp_path: Path) -> None:
    trainer = _begin(Setting())
    loss = trainer.engine(**BATCHES[0]).loss
    with pytest.raises(CheckpointError, match=r"call it after engine\.step"):
        trainer.save(tmp_path)
    trainer.engine.backward(loss)


# -- folders ---------------------------------------------------------------------------------------------------------


def test_folders_and_limits(tmp_path: Path) -> None:
    """Names, the newest, the limit, another run's checkpoints in the same folder, and one step saved twice."""
    assert find_latest(tmp_path / "none") is None
    with pytest.raises(CheckpointError, match="holds no checkpoint"):
        _begin(Setting()).load(tmp_path)
    foreign = _begin(Setting()).save(tmp_path / "checkpoints")
    trainer = _begin(Setting())
    directory = tmp_path / "checkpoints"
    paths = []
    for batch in BATCHES[:4]:
        trainer.run([batch])
        paths.append(trainer.save(directory, save_total_limit=2))
    assert [path.name for path in paths] == [f"step-{step:08d}" for step in (1, 2, 3, 4)]
    assert sorted(p.name for p in directory.iterdir()) == [foreign.name, "step-00000003", "step-00000004"]
    assert find_latest(directory) == paths[-1]
    assert verify(paths[-1]) == []
    # Going back to step 3 and on to step 4 again: the later one counts, whatever the numbers.
    trainer.load(paths[2])
    assert trainer.save(directory) == paths[2]
    assert find_latest(directory) == paths[2]
    assert trainer.load(tmp_path).path == paths[2]  # the run's folder will do
    with pytest.raises(CheckpointError, match="save_total_limit = 0"):
        trainer.save(directory, save_total_limit=0)
