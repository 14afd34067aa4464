"""Which optimizers can run on chunks: those that treat each element alone.

A chunk may be cut anywhere, between tiers and later between ranks, so an optimizer that looks at rows, columns or norms
of whole parameters would compute something else. Such optimizers are refused with the reason.
"""

from __future__ import annotations

from collections import defaultdict

import torch

from zero.errors import UserError

_REASONS = {
    "Adafactor": "keeps row and column averages of whole matrices",
    "LBFGS": "needs all parameters at once and a closure",
    "Muon": "orthogonalises whole matrices",
    "SparseAdam": "works on sparse gradients",
}
_KNOWN = frozenset(
    ("AdamW", "Adam", "SGD", "RMSprop", "Adagrad", "NAdam", "RAdam", "Adamax", "Adadelta", "ASGD", "Rprop")
)


def require_elementwise(optimizer: torch.optim.Optimizer) -> None:
    """Raises UserError unless the optimizer treats each element alone.

    torch's own are known; any other class is tried on a small matrix, whole and in two halves.
    """
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise UserError(f"optimizer: {type(optimizer).__name__} is not a torch.optim.Optimizer")
    name = type(optimizer).__name__
    for kind in type(optimizer).__mro__:
        if kind.__name__ in _REASONS and kind.__module__.startswith("torch"):
            raise UserError(
                f"optimizer: {name} is not elementwise: it {_REASONS[kind.__name__]}; chunks hold flat pieces of "
                f"parameters. Use one of {', '.join(sorted(_KNOWN))}"
            )
    if type(optimizer).__module__.startswith("torch.optim") and name in _KNOWN:
        return
    if not _same_in_halves(optimizer):
        raise UserError(
            f"optimizer: {name} gives another result on two halves of a matrix than on the whole, so it is not "
            f"elementwise and cannot run on chunks. Use one of {', '.join(sorted(_KNOWN))}"
        )


def shadow_of(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    """An optimizer of the same class and settings with no parameters and no state of its own."""
    shadow: torch.optim.Optimizer = object.__new__(type(optimizer))
    shadow.__dict__.update({key: value for key, value in optimizer.__dict__.items() if key != "step"})
    shadow.param_groups = []
    shadow.state = defaultdict(dict)
    return shadow


def run(shadow: torch.optim.Optimizer) -> None:
    """One step of the class's own arithmetic."""
    type(shadow).step(shadow)  # type: ignore[call-arg]


def _same_in_halves(optimizer: torch.optim.Optimizer) -> bool:
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(4, 6, generator=generator)
    gradients = [torch.randn(4, 6, generator=generator) for _ in range(3)]
    whole = _trial(optimizer, [values], [[g] for g in gradients])[0]
    flat = _trial(optimizer, [values.reshape(-1)[:10], values.reshape(-1)[10:]],
                  [[g.reshape(-1)[:10], g.reshape(-1)[10:]] for g in gradients])  # fmt: skip
    return torch.equal(whole.reshape(-1), torch.cat(flat))


def _trial(
    optimizer: torch.optim.Optimizer, values: list[torch.Tensor], gradients: list[list[torch.Tensor]]
) -> list[torch.Tensor]:
    shadow = shadow_of(optimizer)
    parameters = [value.clone() for value in values]
    group = {key: value for key, value in optimizer.param_groups[0].items() if key != "params"}
    shadow.param_groups = [{**group, "params": parameters}]
    for step in gradients:
        for parameter, gradient in zip(parameters, step, strict=True):
            parameter.grad = gradient.clone()
        run(shadow)
    return parameters


def state_bytes_per_numel(optimizer: torch.optim.Optimizer) -> int:
    """Bytes per element of the elementwise states this optimizer will keep (8 for Adam), learnt from a trial step."""
    shadow = shadow_of(optimizer)
    parameter = torch.ones(4)
    group = {key: value for key, value in optimizer.param_groups[0].items() if key != "params"}
    shadow.param_groups = [{**group, "params": [parameter]}]
    example = next((state for state in optimizer.state.values() if state), None)
    if example is not None:  # constructors may fill states (Adagrad): mimic them
        shadow.state[parameter] = {
            key: torch.zeros(4, dtype=value.dtype) if _elementwise(value) else value for key, value in example.items()
        }
    parameter.grad = torch.ones(4)
    run(shadow)
    return sum(v.element_size() for v in shadow.state[parameter].values() if _elementwise(v))


def _elementwise(value: object) -> bool:
    return isinstance(value, torch.Tensor) and value.dim() > 0
