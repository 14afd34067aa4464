"""A rank that fails, dies or stops: the others end within the timeout, and say which rank, at what step, doing what."""

from __future__ import annotations

import os
import re
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.rank_case import make_model, share
from tests.ranks import try_ranks

TIMEOUT_S = 4.0
FAULT_STEP = 2


class InjectedError(RuntimeError):
    pass


def _die(kind: str) -> None:
    if kind == "raise":
        raise InjectedError("injected here")
    if kind == "exit":
        os._exit(7)
    os.kill(os.getpid(), signal.SIGKILL if kind == "kill" else signal.SIGSTOP)
    time.sleep(60)


def _once(when: Callable[[], bool], original: Callable[..., Any], kind: str) -> Callable[..., Any]:
    def faulty(*args: Any, **kwargs: Any) -> Any:
        if when():
            _die(kind)
        return original(*args, **kwargs)

    return faulty


def _arm(engine: Any, place: str, kind: str, when: Callable[[], bool]) -> None:
    """Makes ``place`` fail from the moment ``when`` says so."""
    from zero.checkpoint import loading, saving

    exchange = engine.exchange
    if place in ("gather", "reduce"):
        setattr(exchange, f"_{place}", _once(when, getattr(exchange, f"_{place}"), kind))
    elif place == "norm":
        engine._agreement.statistics = _once(when, engine._agreement.statistics, kind)
    elif place == "save":
        saving.write_tensor_file = _once(when, saving.write_tensor_file, kind)
    elif place == "load":
        loading.TensorReader = _once(when, loading.TensorReader, kind)
    elif place == "forward":
        engine.module.model.decoder.layers[1].register_forward_pre_hook(lambda *_: _die(kind) if when() else None)
    elif place == "backward":
        parameter = engine.module.model.decoder.layers[1].fc1.weight
        parameter.register_hook(lambda _: _die(kind) if when() else None)


def faulty_run(place: str, kind: str, culprit: int, folder: str) -> None:
    import torch.distributed as dist

    import zero

    rank = dist.get_rank()
    model = make_model("opt")
    config = {"device": {"type": "cpu"}, "parallel": {"replicate": "1KiB", "timeout": TIMEOUT_S}}
    engine, *_ = zero.initialize(model, torch.optim.AdamW(model.parameters(), lr=1e-3), config=config)
    step = 0
    if rank == culprit:
        _arm(engine, place, kind, lambda: step == FAULT_STEP)
    for step in range(FAULT_STEP + 1):
        if place == "data" and rank == culprit and step == FAULT_STEP:
            _die(kind)
        engine.zero_grad()
        loss = engine(**share(step, 0, rank, 2)).loss
        engine.backward(loss)
        engine.step()
    engine.save_checkpoint(Path(folder))
    engine.load_checkpoint(Path(folder))
    if place == "ends early" and rank == culprit:
        return
    engine(**share(step, 0, rank, 2))
    if place == "ends early" and kind == "before a step":
        engine.step()


PLACES = ("data", "forward", "backward", "gather", "reduce", "norm", "save", "load")
SAMPLE = {
    ("forward", "raise", 1),
    ("reduce", "kill", 0),
    ("data", "stop", 1),
    ("save", "raise", 1),
    ("load", "kill", 1),
}
MATRIX = [
    pytest.param(
        place, kind, culprit, marks=() if (place, kind, culprit) in SAMPLE else pytest.mark.full
    )
    for place in PLACES
    for kind in ("raise", "kill", "exit", "stop")
    for culprit in (0, 1)
]  # fmt: skip


@pytest.mark.parametrize(("place", "kind", "culprit"), MATRIX)
def test_no_rank_waits_for_ever(place: str, kind: str, culprit: int, tmp_path: Path) -> None:
    began_s = time.monotonic()
    ended = try_ranks(faulty_run, 2, place, kind, culprit, str(tmp_path), timeout_s=90, group_timeout_s=TIMEOUT_S)
    survivor = ended[1 - culprit]
    assert survivor.exit_code == 1, survivor.problem
    assert "it hung" not in (survivor.problem or "")
    assert not ended[culprit].well
    assert time.monotonic() - began_s < 90  # of which a busy machine takes most
    said = (survivor.problem or "").strip().splitlines()[-1]
    if place in ("save", "load") and kind == "raise":  # said by the save or load itself, on all ranks
        assert "CheckpointError" in said
        assert f"rank {culprit}" in said
        return
    assert re.search(rf"PeerLostError: rank {1 - culprit}, step \d+, .+: rank {culprit} ", said), said
    if kind == "raise":
        assert "injected here" in said


def test_the_count_of_faults() -> None:
    assert len(MATRIX) >= 30


def caught_and_gone_on() -> str:
    """An error inside an exchange that the user's code catches, to go on as if nothing had been."""
    import torch.distributed as dist

    import zero

    rank = dist.get_rank()
    model = make_model("opt")
    config = {"device": {"type": "cpu"}, "parallel": {"replicate": "1KiB", "timeout": TIMEOUT_S}}
    engine, *_ = zero.initialize(model, torch.optim.AdamW(model.parameters(), lr=1e-3), config=config)

    def fails(*_: Any) -> None:
        raise ValueError("inside")

    engine.exchange._carry_out = fails
    with pytest.raises(ValueError, match="inside"):
        engine(**share(0, 0, rank, 2))
    with pytest.raises(RuntimeError, match="an earlier exchange failed here"):
        engine.step()
    return "told"


def test_after_a_failed_exchange_nothing_is_trained_silently() -> None:
    assert [end.result for end in try_ranks(caught_and_gone_on, 2, timeout_s=40)] == ["told", "told"]


def test_a_rank_that_ends_serves_the_others_to_their_end(tmp_path: Path) -> None:
    assert all(end.well for end in try_ranks(faulty_run, 2, "ends early", "", 1, str(tmp_path), timeout_s=40))


def test_a_rank_that_ends_before_a_common_verb_is_named(tmp_path: Path) -> None:
    ended = try_ranks(faulty_run, 2, "ends early", "before a step", 1, str(tmp_path), timeout_s=40)
    assert ended[0].exit_code == 1
    assert "rank 0 at step(), rank 1 at the end of the program" in (ended[0].problem or "")


def wrong_verb(_: Any = None) -> None:
    import torch.distributed as dist

    import zero

    model = make_model("opt")
    config = {"device": {"type": "cpu"}, "parallel": {"replicate": "1KiB", "timeout": TIMEOUT_S}}
    engine, *_ = zero.initialize(model, torch.optim.AdamW(model.parameters()), config=config)
    engine.backward(engine(**share(0, 0, dist.get_rank(), 2)).loss)
    if dist.get_rank():
        engine.step()
    else:
        engine.meet("evaluation")


def other_model() -> None:
    import torch.distributed as dist

    import zero

    model = make_model("opt" if dist.get_rank() else "llama")
    zero.initialize(model, torch.optim.AdamW(model.parameters()), config={"device": {"type": "cpu"}})


def test_ranks_at_different_verbs_are_told_so() -> None:
    for rank, ended in enumerate(try_ranks(wrong_verb, 2, timeout_s=40)):
        assert ended.exit_code == 1, rank
        assert "rank 0 at evaluation" in (ended.problem or "") or "rank 1 at step()" in (ended.problem or "")


def test_ranks_with_different_models_are_refused() -> None:
    for ended in try_ranks(other_model, 2, timeout_s=40):
        assert "the ranks have different models" in (ended.problem or "")
