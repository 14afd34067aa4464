"""torch's collectives under one name each: 2.13 renamed some, and the old names warn there."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist

Group = dist.ProcessGroup


def _either(new: str, old: str) -> Any:
    return getattr(dist, new, None) or getattr(dist, old)


_all_gather = _either("all_gather_single", "all_gather_into_tensor")


def all_gather(output: torch.Tensor, own: torch.Tensor, group: Group | None = None) -> None:
    """Puts every rank's ``own`` [n] side by side into ``output`` [ranks * n], of which ``own`` may be a part."""
    _all_gather(output, own, group=group)


def begin_all_to_all(outputs: list[torch.Tensor], inputs: list[torch.Tensor], group: Group | None = None) -> Any:
    """Sends ``inputs[r]`` to rank r and gets ``outputs[r]`` from it, once ``wait()`` of what is returned has returned.

    Shapes agree pairwise. Neither side may be touched until then.
    """
    return dist.all_to_all(outputs, inputs, group=group, async_op=True)


def all_to_all(outputs: list[torch.Tensor], inputs: list[torch.Tensor], group: Group | None = None) -> None:
    """The same, waited for."""
    begin_all_to_all(outputs, inputs, group).wait()
