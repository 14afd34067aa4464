"""Logits of tiny OPTs of each kind against a reference in float64: of the plain class, and through the engine."""

from __future__ import annotations

from typing import Any

import opt_models
import pytest
import torch
from opt_reference import Shape, opt_logits
from torch import Tensor

import zero

TOLERANCE = 1e-5
LENGTH = 20
# What is padding, of three rows: nothing, beginnings, ends.
PADDINGS = {"none": (0, 0, 0), "left": (0, 4, 13), "right": (0, -4, -13)}
ENGINES: dict[str, dict[str, Any]] = {
    "cpu": {"device": {"type": "cpu"}, "precision": {"dtype": "fp32"}},
    # Parameters of the whole model do not fit: they come and go.
    "simulated": {
        "device": {"type": "simulated", "memory": "112KiB"},
        "precision": {"dtype": "fp32"},
        "memory": {"chunk": "8KiB"},
    },
}


def batch(padding: str) -> tuple[Tensor, Tensor]:
    """Tokens and mask."""
    torch.manual_seed(11)
    tokens, mask = torch.randint(3, 61, (3, LENGTH)), torch.ones(3, LENGTH, dtype=torch.long)
    for row, width in enumerate(PADDINGS[padding]):
        gone = slice(0, width) if width >= 0 else slice(width, None)
        tokens[row, gone], mask[row, gone] = 1, 0
    return tokens, mask


def wanted(model: Any, tokens: Tensor, mask: Tensor) -> Tensor:
    """The reference's logits."""
    config = model.config
    before = config.do_layer_norm_before
    shape = Shape(
        config.num_hidden_layers,
        config.num_attention_heads,
        norms_first=before,
        final_norm=before and not config._remove_final_layer_norm,
        activation=config.activation_function,
    )
    return opt_logits(opt_models.saved(model), shape, tokens, mask)


def largest_difference(given: Tensor, reference: Tensor, mask: Tensor) -> float:
    """Over all positions that are no padding."""
    return float((given.detach().double() - reference)[mask.bool()].abs().max())


@pytest.mark.parametrize("padding", PADDINGS)
@pytest.mark.parametrize("kind", opt_models.KINDS)
def test_the_plain_class(kind: str, padding: str) -> None:
    model = opt_models.opt_model(**opt_models.KINDS[kind])
    tokens, mask = batch(padding)
    reference = wanted(model, tokens, mask)
    assert reference.std() > 0.3  # no small numbers that anything equals
    with torch.no_grad():
        given = model(input_ids=tokens, attention_mask=mask).logits
        assert largest_difference(given, reference, mask) <= TOLERANCE
        if padding == "none":
            assert largest_difference(model(input_ids=tokens).logits, reference, mask) <= TOLERANCE


@pytest.mark.parametrize("kind", opt_models.KINDS)
def test_the_reference_notices_every_weight(kind: str) -> None:
    """A reference that left something out would agree with a class that did, too."""
    model = opt_models.opt_model(**opt_models.KINDS[kind])
    tokens, mask = batch("left")
    before = wanted(model, tokens, mask)
    for name, parameter in model.named_parameters():
        # Keys' biases move all scores of a query alike, which the softmax takes back; row 0 of positions is never read.
        if name.endswith("k_proj.bias"):
            continue
        with torch.no_grad():
            parameter.mul_(1.5)
            moved = largest_difference(wanted(model, tokens, mask), before, mask)
            parameter.div_(1.5)
        assert moved > 100 * TOLERANCE, name


@pytest.mark.parametrize("engine_name", ENGINES)
@pytest.mark.parametrize("kind", opt_models.KINDS)
def test_through_the_engine(kind: str, engine_name: str) -> None:
    model = opt_models.opt_model(**opt_models.KINDS[kind], num_hidden_layers=9)
    model_bytes = sum(parameter.nbytes for parameter in model.parameters())
    references = {padding: wanted(model, *batch(padding)) for padding in PADDINGS}
    engine, *_ = zero.initialize(model, config=ENGINES[engine_name])
    engine.eval()
    try:
        for padding, reference in references.items():
            tokens, mask = batch(padding)
            with torch.no_grad():
                given = engine(input_ids=tokens, attention_mask=mask, use_cache=False).logits
            assert largest_difference(given.cpu(), reference, mask) <= TOLERANCE
            engine.check_integrity()
        report = engine.memory_report()
    finally:
        engine.close()
    if engine_name == "simulated":
        assert report.device_capacity_bytes < model_bytes
        assert report.device_peak_bytes <= report.device_capacity_bytes
        assert report.num_fetches > report.num_chunks // 2
