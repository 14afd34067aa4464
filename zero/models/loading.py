"""``zero.models.load``: a model and its tokenizer in one call, wherever its bytes find room."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from gemini.device import Device
from zero.config.loading import load_config
from zero.config.schema import Config
from zero.dryrun import Generation
from zero.engine import Engine
from zero.errors import UserError
from zero.inference import Outlook, make_inference_engine
from zero.launcher import current_config
from zero.models.build import build_model, build_tokenizer, in_stored_dtype, max_positions
from zero.pending import remember, restore
from zero.setup import DTYPES, make_device

logger = logging.getLogger("zero")

_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_MOST_TOKENS = 2048
"""Of the longest pass that is expected where nobody says what to expect."""

_ATTRIBUTE = "_zero_loaded"


class Loaded:
    """What keeps a loaded model's bytes.

    Attributes:
        engine: it runs in.
        outlook: where its bytes are and how fast it will be.
    """

    def __init__(self, engine: Engine, outlook: Outlook, stored: dict[str, Any]) -> None:
        self.engine = engine
        self.outlook = outlook
        self._stored = stored

    def give_up(self) -> None:
        """Leaves the model as if it had only been named: what has not been written since is read from its files again.

        So the host never holds more than what comes next needs, and training begins with the files' own values, however
        coarse the dtype was that they were run in.
        """
        stays = not self._stored or any(chunk.was_written for chunk in self.engine.manager.chunks)
        self.engine.close(keep_values=stays)
        if not stays:
            restore(self.engine.module, self._stored)


def load(
    name: str | Path,
    device: str | torch.device | Device = "auto",
    *,
    memory: str | int | None = None,
    dtype: str | torch.dtype | None = None,
    rows: int = 1,
    tokens: int | None = None,
    config: Config | Mapping[str, Any] | str | Path | None = None,
) -> tuple[Any, Any]:
    """A causal language model and its tokenizer, ready to generate, to serve, and to be given to ``zero.initialize``::

        model, tokenizer = zero.models.load("opt-6.7b", device="cuda")
        model.generate(**tokenizer("Hello", return_tensors="pt"), max_new_tokens=20)

    Weights go from their files straight to where they stay: on the device as far as there is room, else on the host, else
    in ``memory.disk``; with several ranks each keeps its slice. What is not on the device is fetched unit by unit in each
    pass. One line in the log says where everything is and how fast that will be.

    Args:
        name: of a published OPT (``opt-125m`` to ``opt-175b``), of a model on the Hub, a folder, or a ``.gguf`` file.
        device: ``auto``, ``cuda``, ``cpu``, ``simulated``, or a device made already.
        memory: cap on the device's memory, such as ``"6GiB"``.
        dtype: ``fp32``, ``bf16`` or ``fp16`` to compute in; by default that of the files.
        rows: sequences that will be generated at a time.
        tokens: most positions of each; by default what the model reads, at most 2048. Longer ones work too, but what is
            on the device must then make room for them.
        config: path, dict or Config for everything else (``[memory]`` above all); by default what ``launch()`` read.

    Returns:
        The transformers model, in evaluation mode, and its tokenizer with a padding token, padding on the left.

    Raises:
        UserError: it cannot be had, or something given is not allowed; the message says what to do.
        gemini.plan.DoesNotFitError: not even one unit at a time fits on the device.
    """
    if rows < 1 or (tokens is not None and tokens < 1):
        raise UserError(f"rows = {rows}, tokens = {tokens}: at least 1 of each")
    given = config if config is not None else current_config()
    resolved = load_config(given, _overrides(str(name), device, memory, dtype), require=("model",))
    tokenizer = build_tokenizer(resolved)
    tokenizer.padding_side = "left"
    model: Any = build_model(resolved, tokenizer)
    model.eval()
    made = device if isinstance(device, Device) else make_device(resolved)
    resolved = in_stored_dtype(resolved, model, made)
    positions = min(max_positions(model.config) or _MOST_TOKENS, tokens or _MOST_TOKENS)
    stored = remember(model)
    engine, outlook = make_inference_engine(model, resolved, made, Generation(rows, positions), tokens is None)
    setattr(model, _ATTRIBUTE, Loaded(engine, outlook, stored))
    logger.info("%s: %s", name, outlook.text)
    return model, tokenizer


def loaded(model: nn.Module) -> Loaded:
    """What keeps the bytes of a model from :func:`load`.

    Raises:
        UserError: it is not from there, or has been given to ``zero.initialize`` since.
    """
    kept: Loaded | None = model.__dict__.get(_ATTRIBUTE)
    if kept is None:
        raise UserError("the model is not one that zero.models.load() has made, or training has it now")
    return kept


def take_back(model: nn.Module) -> None:
    """Before somebody else takes a model over: gives it up, if :func:`load` made it."""
    kept: Loaded | None = model.__dict__.pop(_ATTRIBUTE, None)
    if kept is not None:
        kept.give_up()


def _overrides(
    name: str, device: str | torch.device | Device, memory: str | int | None, dtype: str | torch.dtype | None
) -> dict[str, Any]:
    tables: dict[str, Any] = {"model": {"name_or_path": name}}
    if not isinstance(device, Device):
        tables["device"] = {"type": str(device).partition(":")[0]}
    if memory is not None:
        tables.setdefault("device", {})["memory"] = memory
    if dtype is not None:
        if isinstance(dtype, torch.dtype):
            dtype = _NAMES.get(dtype, str(dtype).removeprefix("torch."))
        tables["precision"] = {"dtype": dtype}
    return tables
