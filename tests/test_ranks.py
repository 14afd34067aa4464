"""Several ranks train as one process with the same global batch."""

from __future__ import annotations

import functools
import json
from typing import Any

import pytest
import torch

from tests.rank_case import NUM_STEPS, Job, digest, make_model, share, train
from tests.ranks import run_ranks

CPU = {"type": "cpu"}
SIMULATED = {"type": "simulated", "memory": "1MiB"}
DIVIDED = {"replicate": "1KiB"}
POLICIES = {
    "auto": {"policy": "auto"},
    "cpu": {"policy": "cpu"},
    "cuda": {"policy": "cuda"},
    "static": {"policy": "static", "resident_parameters": 0.5, "resident_optimizer": 0.3},
}


def _config(policy: str | None = None, clip: float | None = 1.0, **more: Any) -> dict[str, Any]:
    config: dict[str, Any] = {"device": CPU, "parallel": DIVIDED, "train": {"max_grad_norm": clip}}
    if policy is not None:
        config |= {"device": SIMULATED, "memory": POLICIES[policy]}
    return config | more


@functools.cache
def _alone(job: str) -> dict[str, Any]:
    return run_ranks(train, 1, Job(**json.loads(job)), own_group=False)[0]


def _compare(num_ranks: int, family: str, config: dict[str, Any], tolerance: float = 1e-6, **options: Any) -> list[Any]:
    plain = {**config, "device": CPU, "memory": {}}
    alone = _alone(json.dumps({"family": family, "config": plain, **options}))
    ranks = run_ranks(train, num_ranks, Job(family, config, **options))
    for rank in ranks:
        assert rank["norms"] == pytest.approx(alone["norms"], rel=10 * tolerance)
        assert rank["hash"] == ranks[0]["hash"]
        for name, value in alone["weights"].items():
            assert torch.allclose(rank["weights"][name].float(), value.float(), rtol=0, atol=tolerance), name
        assert rank["state"].keys() == alone["state"].keys()
        for number, state in alone["state"].items():
            assert float(rank["state"][number].get("step", 0)) == float(state.get("step", 0))
    return ranks


@pytest.mark.parametrize("num_ranks", [2, pytest.param(4, marks=pytest.mark.full)])
@pytest.mark.parametrize("family", ["opt", "llama", "mixtral"])
def test_ranks_train_as_one_process(family: str, num_ranks: int) -> None:
    _compare(num_ranks, family, _config())


@pytest.mark.parametrize("num_ranks", [2, pytest.param(4, marks=pytest.mark.full)])
@pytest.mark.parametrize("policy", POLICIES)
def test_every_policy(policy: str, num_ranks: int) -> None:
    ranks = _compare(num_ranks, "opt", _config(policy))
    assert all(rank["peak_bytes"] <= rank["capacity_bytes"] for rank in ranks)
    assert ranks[0]["num_apart"] == 0


@pytest.mark.parametrize("clip", [pytest.param(None, marks=pytest.mark.full), 1.0])
@pytest.mark.parametrize("accumulation", [1, 3])
@pytest.mark.parametrize("policy", [pytest.param(None, marks=pytest.mark.full), "auto"])
def test_accumulation_and_clipping(accumulation: int, clip: float | None, policy: str | None) -> None:
    _compare(2, "opt", _config(policy, clip), accumulation=accumulation)


@pytest.mark.parametrize("num_ranks", [2, pytest.param(4, marks=pytest.mark.full)])
@pytest.mark.parametrize("policy", [None, "auto", pytest.param("cpu", marks=pytest.mark.full)])
def test_parameters_that_only_some_ranks_use(policy: str | None, num_ranks: int) -> None:
    ranks = _compare(num_ranks, "one-sided", _config(policy))
    assert ranks[0]["num_apart"] > 0


@pytest.mark.parametrize(
    "optimizer",
    ["SGD", "NAdam", *(pytest.param(n, marks=pytest.mark.full) for n in ("Adam", "RMSprop", "Adagrad", "ASGD"))],
)
def test_other_optimizers(optimizer: str) -> None:
    # Where a gradient should be zero it is rounding, which a small eps would blow up.
    options = {"SGD": {"momentum": 0.9}, "ASGD": {}}.get(optimizer, {"eps": 1e-3})
    _compare(2, "opt", _config(), optimizer=optimizer, options=options)


@pytest.mark.parametrize("options", [{"fused": True}, pytest.param({"amsgrad": True}, marks=pytest.mark.full)])
def test_torchs_own_arithmetic(options: dict[str, Any]) -> None:
    _compare(2, "opt", _config("cpu", optimizer={"kernel": "torch"}), options=options)


def test_run_to_run_no_bit_differs() -> None:
    job = Job("one-sided", _config("auto"))
    first, second = run_ranks(train, 2, job), run_ranks(train, 2, job)
    assert [rank["hash"] for rank in first] == [rank["hash"] for rank in second]
    assert [rank["losses"] for rank in first] == [rank["losses"] for rank in second]


@pytest.mark.parametrize("reduce", ["fp32", "bf16"])
def test_low_precision(reduce: str) -> None:
    precision = {"dtype": "bf16", "reduce": reduce}
    _compare(2, "opt", _config("auto", precision=precision), tolerance=2e-2)


def train_on_one(dtype: str, both: bool) -> Any:
    """Rank 1 has nothing to learn from; or a process alone learns from rank 0's half, weighed half."""
    import torch.distributed as dist

    import zero

    rank = dist.get_rank() if dist.is_initialized() else 0
    model = make_model("opt")
    precision = {"dtype": dtype, "initial_scale": 1024.0}
    config = {"device": CPU, "parallel": DIVIDED, "precision": precision}
    engine, *_ = zero.initialize(model, torch.optim.AdamW(model.parameters(), lr=1e-3, eps=1e-4), config=config)
    for step in range(NUM_STEPS):
        engine.zero_grad()
        if rank == 0:
            loss = engine(**share(step, 0, 0, 2)).loss
            engine.backward(loss if both else loss / 2)
        engine.step()
        assert not engine.skipped_last_step
    return {name: value.float() for name, value in engine.module.state_dict().items()}, engine.loss_scale


@pytest.mark.parametrize("dtype", ["fp32", "fp16"])
def test_a_rank_with_nothing_to_learn_from(dtype: str) -> None:
    alone, _ = run_ranks(train_on_one, 1, dtype, False, own_group=False)[0]
    for weights, loss_scale in run_ranks(train_on_one, 2, dtype, True):
        assert loss_scale == (1.0 if dtype == "fp32" else 1024.0)
        for name, value in alone.items():
            assert torch.allclose(weights[name], value, rtol=0, atol=1e-6 if dtype == "fp32" else 2e-3), name


def interlude(kind: str) -> Any:
    """Two steps with something between them that the ranks do not do alike."""
    import torch.distributed as dist

    import zero

    rank = dist.get_rank()
    model = make_model("opt")
    config = {"device": SIMULATED, "memory": POLICIES["auto"], "parallel": DIVIDED}
    engine, *_ = zero.initialize(model, torch.optim.AdamW(model.parameters(), lr=1e-3), config=config)
    for step in range(2):
        engine.zero_grad()
        engine.backward(engine(**share(step, 0, rank, 2)).loss)
        engine.step()
        prompt = torch.tensor([[2, 5, 7]])
        if kind == "generation of other lengths":
            engine.eval()
            model.generate(prompt, max_new_tokens=3 + 4 * rank, do_sample=False)
            engine.train()
        elif kind == "evaluation on one rank" and rank == 0:
            engine.eval()
            with torch.no_grad():
                engine(input_ids=prompt)
            engine.train()
        elif kind == "weights read on one rank" and rank == 1:
            assert float(model.lm_head.weight.norm()) > 0
            assert model.state_dict()
        elif kind == "weights written by one rank":
            with engine.gathered_parameters(), torch.no_grad():
                if rank == 1:
                    model.lm_head.weight[3].fill_(0.5)
        engine.check_integrity()
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    written = float(weights["lm_head.weight"][3].sum())
    return digest(weights), written


@pytest.mark.parametrize("kind", ["generation of other lengths", "evaluation on one rank", "weights read on one rank"])
def test_what_ranks_do_apart_disturbs_nothing(kind: str) -> None:
    assert run_ranks(interlude, 2, kind) == run_ranks(interlude, 2, "nothing")


def test_what_one_rank_writes_counts_on_all() -> None:
    first, second = run_ranks(interlude, 2, "weights written by one rank")
    assert first == second
    assert first[1] == 0.5 * 32
