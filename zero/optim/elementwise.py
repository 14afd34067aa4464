"""Which optimizers can run on chunks: those that treat each element alone.

A chunk may be cut anywhere, between tiers and later between ranks, so an optimizer that looks at rows, columns or norms
of whole parameters would compute something else. Such optimizers are refused with the reason.
"""

from __future__ import annotations

import copy
from collections import OrderedDict, defaultdict
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import _disable_current_modes

from gemini.tracker import StorageTracker
from zero.errors import UserError
from zero.optim.lion import Lion

_REASONS = {
    "Adafactor": "keeps row and column averages of whole matrices",
    "LBFGS": "needs all parameters at once and a closure",
    "Muon": "orthogonalises whole matrices",
    "SparseAdam": "works on sparse gradients",
}
_KNOWN = {"AdamW", "Adam", "SGD", "RMSprop", "Adagrad", "NAdam", "RAdam", "Adamax", "Adadelta", "ASGD", "Rprop"}
_ADVICE = f"chunks hold flat pieces of parameters. Use one of {', '.join(sorted(_KNOWN))}"


def require_elementwise(optimizer: torch.optim.Optimizer) -> None:
    """Raises UserError unless the optimizer treats each element alone.

    torch's own and ours are known; any other class is tried on a small matrix, whole and in two parts.
    """
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise UserError(f"optimizer: {type(optimizer).__name__} is not a torch.optim.Optimizer")
    name = type(optimizer).__name__
    for kind in type(optimizer).__mro__:
        if kind.__name__ in _REASONS and kind.__module__.startswith("torch"):
            raise UserError(f"optimizer: {name} is not elementwise: it {_REASONS[kind.__name__]}; {_ADVICE}")
    if type(optimizer) is Lion or (type(optimizer).__module__.startswith("torch.optim") and name in _KNOWN):
        return
    reason = _why_not(optimizer)
    if reason is not None:
        raise UserError(f"optimizer: {name} is not elementwise: it {reason}; {_ADVICE}")


def _why_not(optimizer: torch.optim.Optimizer) -> str | None:
    """What an unknown optimizer does that cannot be done piece by piece; None if nothing was found."""
    if any(isinstance(value, torch.optim.Optimizer) for value in vars(optimizer).values()):
        return "wraps another optimizer (give initialize() the one inside)"
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(4, 6, generator=generator)
    gradients = [torch.randn(4, 6, generator=generator) for _ in range(3)]
    try:
        whole = _trial(optimizer, values, gradients)
        parts = [
            _trial(optimizer, values.reshape(-1)[part], [gradient.reshape(-1)[part] for gradient in gradients])
            for part in (slice(0, 10), slice(10, 24))
        ]
    except _KeepsCountError as error:
        return str(error)
    except Exception as error:  # a user's class may fail in any way
        return f"cannot make a step on a plain tensor without a closure ({type(error).__name__}: {error})"
    if not torch.equal(whole.reshape(-1), torch.cat(parts)):
        return "gives another result on two parts of a matrix than on the whole"
    return None


_TRIAL_NUMEL = 256
_NUM_TRIALS = 12


class _KeepsCountError(Exception):
    """The optimizer keeps something of its own from step to step, outside its states."""


def _trial(optimizer: torch.optim.Optimizer, value: torch.Tensor, gradients: list[torch.Tensor]) -> torch.Tensor:
    """Steps of a shadow over one tensor."""
    shadow = shadow_of(optimizer)
    parameter = value.clone()
    group = {key: entry for key, entry in optimizer.param_groups[0].items() if key != "params"}
    for gradient in gradients:
        shadow.param_groups = [{**group, "params": [parameter]}]
        parameter.grad = gradient.clone()
        before = _numbers(shadow.__dict__), _numbers(group)
        run(shadow)
        after = _numbers(shadow.__dict__), _numbers(shadow.param_groups[0])
        if before != after:
            raise _KeepsCountError("counts steps in itself or in its groups, and every piece would count again")
    return parameter


def _numbers(attributes: dict[str, Any]) -> dict[str, Any]:
    """Plain numbers of an object; what torch itself notes there is not the optimizer's."""
    kept = {
        k: v for k, v in attributes.items() if isinstance(v, (bool, int, float, str)) and not k.startswith("_warned")
    }
    kept.pop("_opt_called", None)
    return kept


def shadow_of(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    """An optimizer of the same class and settings with no parameters, states or hooks of its own."""
    shadow: torch.optim.Optimizer = object.__new__(type(optimizer))
    methods = ("step", "zero_grad", "state_dict", "load_state_dict", "add_param_group")  # patched for the user's object
    shadow.__dict__.update({key: value for key, value in optimizer.__dict__.items() if key not in methods})
    shadow._optimizer_step_pre_hooks = OrderedDict()
    shadow._optimizer_step_post_hooks = OrderedDict()
    shadow.param_groups = []
    shadow.state = defaultdict(dict)
    return shadow


def run(shadow: torch.optim.Optimizer) -> None:
    """One step of the class's own arithmetic, without the hooks and the profiling that torch puts around it."""
    step: Any = type(shadow).step
    (step.__wrapped__ if getattr(step, "hooked", False) else step)(shadow)


def state_bytes_per_numel(optimizer: torch.optim.Optimizer) -> int:
    """Bytes per element of the elementwise states this optimizer will keep (8 for Adam), learnt from a trial step."""
    with _disable_current_modes():  # in a dry run, too: some look at the values of their states (ASGD)
        return _trial_state_bytes(optimizer)


def _trial_state_bytes(optimizer: torch.optim.Optimizer) -> int:
    shadow = shadow_of(optimizer)
    parameter = torch.ones(4, dtype=torch.float32)
    group = {key: value for key, value in optimizer.param_groups[0].items() if key != "params"}
    shadow.param_groups = [{**group, "params": [parameter]}]
    example = next((state for state in optimizer.state.values() if state), None)
    if example is not None:  # constructors may fill states (Adagrad): mimic them
        shadow.state[parameter] = {key: _mimic(value) for key, value in example.items()}
    parameter.grad = torch.ones_like(parameter)
    run(shadow)
    return sum(v.element_size() for v in shadow.state[parameter].values() if _elementwise(v))


def temporary_bytes_per_numel(optimizer: torch.optim.Optimizer) -> int:
    """Bytes per element that an update takes at its highest beside parameter, gradient and states.

    Learnt from trial steps: some optimizers (RAdam) need more after the first few.
    """
    with _disable_current_modes():
        shadow, tracker = shadow_of(optimizer), StorageTracker(lambda _: None)
        parameter = torch.ones(_TRIAL_NUMEL, dtype=torch.float32)
        group = {key: value for key, value in optimizer.param_groups[0].items() if key != "params"}
        most_bytes = 0
        for _ in range(_NUM_TRIALS):
            parameter.grad = torch.ones_like(parameter)
            shadow.param_groups = [{**group, "params": [parameter]}]
            with torch.no_grad(), tracker:
                tracker.reset_peak()
                before_bytes = tracker.live_bytes
                run(shadow)
            most_bytes = max(most_bytes, tracker.peak_bytes - before_bytes)
        return -(-most_bytes // _TRIAL_NUMEL)


def _mimic(value: Any) -> Any:
    """What a state would be for a parameter of four elements."""
    if not isinstance(value, torch.Tensor):
        return copy.deepcopy(value)
    if _elementwise(value):
        return torch.zeros(4, dtype=value.dtype)
    # A fake one (in a dry run) has no values. Never a deep copy of it: copying its storage ends the process.
    return torch.zeros((), dtype=value.dtype) if isinstance(value, FakeTensor) else value.detach().clone()


def _elementwise(value: object) -> bool:
    return isinstance(value, torch.Tensor) and value.dim() > 0
