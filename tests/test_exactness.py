"""The exactness suite: every causal language model of transformers, on a device too small for it, bit for bit.

Each architecture that can be built tiny makes three fp32 AdamW steps in plain PyTorch and three under the engine, on a
simulated device hardly larger than the smallest on which one pass runs at all. Losses and every weight must be equal.
"""

from __future__ import annotations

import pytest
import torch

import zero
from tests import exactness, zoo
from tests.sampled import sampled

_MOST_ROOM = 0.02
_exact: set[str] = set()


@pytest.mark.parametrize("model_type", sampled(zoo.BUILT, 3))
def test_architecture_trains_exactly(model_type: str) -> None:
    want = exactness.plain(model_type)
    least_bytes = exactness.least_capacity(model_type)
    params_bytes = sum(value.nbytes for value in want.weights.values())
    capacity_bytes = least_bytes + int(min(_MOST_ROOM * least_bytes, params_bytes / 4))
    run, report = exactness.managed(model_type, capacity_bytes)
    assert run.losses == want.losses
    assert [name for name in want.weights if not torch.equal(run.weights[name], want.weights[name])] == []
    assert report.device_peak_bytes <= capacity_bytes
    # Model data and the peak of activations together: it would not fit without offloading.
    model_data_bytes = sum(report.host_bytes_by_kind.values()) + sum(report.device_bytes_by_kind.values())
    assert model_data_bytes + report.non_model_peak_bytes > capacity_bytes
    assert report.num_fetches > 0
    _exact.add(model_type)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_parameters_begin_where_torch_has_tensors_begin(dtype: str) -> None:
    """Matrix products round differently where a matrix begins elsewhere."""
    model = torch.nn.Sequential(torch.nn.Linear(7, 5), torch.nn.Linear(5, 3), torch.nn.Linear(3, 1))
    config = {"device": {"type": "simulated", "memory": "1MiB"}, "precision": {"dtype": dtype}}
    engine, *_ = zero.initialize(model, torch.optim.AdamW(model.parameters()), config=config)
    begins = []
    handles = [
        layer.register_forward_pre_hook(lambda module, _: begins.extend(p.data_ptr() for p in module.parameters()))
        for layer in model
    ]
    engine(torch.ones(2, 7, dtype=torch.float32 if dtype == "fp32" else torch.bfloat16))
    for handle in handles:
        handle.remove()
    engine.close()
    assert len(begins) == 6
    assert [begin % 64 for begin in begins] == [0] * 6


def test_every_architecture_is_accounted_for(
    request: pytest.FixtureRequest, capsys: pytest.CaptureFixture[str]
) -> None:
    """Prints the counts of the tests above; all of them must have been collected."""
    assert len(zoo.BUILT) + len(zoo.NOT_BUILT) == len(zoo.ARCHITECTURES)
    collected = {item.callspec.params["model_type"] for item in request.session.items if _is_ours(item)}
    with capsys.disabled():
        print(f"\nexactness: {len(zoo.ARCHITECTURES)} architectures, {len(zoo.BUILT)} built, {len(_exact)} exact")
        for name, reason in sorted(zoo.NOT_BUILT.items()):
            print(f"  not built: {name}: {reason}")
    # Tests that run side by side are several processes, none of which sees them all.
    assert _exact <= collected if hasattr(request.config, "workerinput") else _exact == collected


def _is_ours(item: pytest.Item) -> bool:
    return getattr(item, "originalname", "") == "test_architecture_trains_exactly"
