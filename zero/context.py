"""``ZeroInitContext``: ``from_pretrained`` without loading; the values go from the files straight into chunks."""

from __future__ import annotations

import functools
import logging
import os
import threading
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any

from torch import nn

from zero.errors import UserError
from zero.pending import PendingTensor, Stored, guard, is_pending
from zero.weights_folder import INDEX, SINGLE, ShardedWeights, how_to_convert, pickles_in

logger = logging.getLogger("zero")

# Loaders are looked up on transformers' classes by every thread; this says which threads are inside a context.
_inside = threading.local()
_lock = threading.Lock()
_num_open = 0
_patches: list[_Patch] = []


class ZeroInitContext:
    """Inside, ``from_pretrained`` builds a model whose parameters remember where their values lie.

    :func:`zero.initialize` then reads each value from its safetensors file straight into its chunk, so host memory
    holds the final state and never a second copy of the model::

        with zero.ZeroInitContext():
            model = OPTForCausalLM.from_pretrained("facebook/opt-1.3b", revision="refs/pr/8")

    The model is the one that ``from_pretrained`` gives without the context, value for value: transformers itself maps
    names, ties weights, initialises what the files lack and loads the generation config. Where a parameter has to be
    computed from several tensors (fused experts), it is computed while loading and waits in memory. What cannot be
    streamed at all (GGUF files, quantised models, a ``device_map``) is loaded whole by transformers, with one line in
    the log.

    A model made directly (``OPTForCausalLM(config)``, any ``nn.Module``) is made as ever, in memory: the same seed
    gives the weights of plain PyTorch. ``initialize`` takes its parameters over one by one, freeing each, so the peak
    is still the final state, where that is larger than the model itself; but a model that does not fit in host memory
    as PyTorch makes it cannot be made here either.

    Pickled weights are refused unless ``use_safetensors=False`` says that they are wanted.

    The context can be nested and used again. On exit, also by an exception, transformers is as it was before. Other
    threads load as ever.
    """

    def __enter__(self) -> ZeroInitContext:
        """Starts to stream what this thread loads."""
        _open()
        _inside.depth = getattr(_inside, "depth", 0) + 1
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Puts everything back."""
        _inside.depth -= 1
        _close()


def _is_inside() -> bool:
    return getattr(_inside, "depth", 0) > 0


# -- transformers' methods ---------------------------------------------------------------------------------------------


class _Patch:
    """One method of a class, replaced while any thread is inside a context.

    Args:
        owner: the class.
        name: of a ``classmethod`` or ``staticmethod`` in it.
        replacement: called as ``replacement(original, *args, **kwargs)`` by threads that are inside.
    """

    def __init__(self, owner: type, name: str, replacement: Callable[..., Any]) -> None:
        self._owner = owner
        self._name = name
        self._original = owner.__dict__[name]
        function = self._original.__func__

        @functools.wraps(function)
        def switch(*args: Any, **kwargs: Any) -> Any:
            if _is_inside():
                return replacement(function, *args, **kwargs)
            return function(*args, **kwargs)

        self._ours = type(self._original)(switch)
        setattr(owner, name, self._ours)

    def undo(self) -> None:
        """Puts the original back, unless somebody has replaced ours in the meantime: outside it does nothing."""
        if self._owner.__dict__.get(self._name) is self._ours:
            setattr(self._owner, self._name, self._original)


def _open() -> None:
    global _num_open
    with _lock:
        if _num_open == 0:
            _patches.extend(_patch_transformers())
        _num_open += 1


def _close() -> None:
    global _num_open
    with _lock:
        _num_open -= 1
        if _num_open == 0:
            while _patches:
                _patches.pop().undo()


def _patch_transformers() -> list[_Patch]:
    try:
        from transformers import AutoModelForCausalLM, PreTrainedModel
    except ImportError:
        return []  # no from_pretrained to stream from
    wanted: list[tuple[Any, str, type, Callable[..., Any]]] = [
        (PreTrainedModel, "_load_pretrained_model", staticmethod, _load_weights),
        (PreTrainedModel, "from_pretrained", classmethod, _from_pretrained),
        # It asks for the config first, and so is the first to find that a name cannot be had.
        (AutoModelForCausalLM, "from_pretrained", classmethod, _auto_from_pretrained),
    ]
    for owner, name, kind, _ in wanted:
        if not isinstance(owner.__dict__.get(name), kind):
            import transformers

            logger.warning(
                "transformers %s has no %s.%s: ZeroInitContext cannot stream, models are loaded whole; the versions in "
                "constraints.txt are known to work", transformers.__version__, owner.__name__, name,
            )  # fmt: skip
            return []
    return [_Patch(owner, name, replacement) for owner, name, _, replacement in wanted]


# -- inside ------------------------------------------------------------------------------------------------------------


def _from_pretrained(original: Callable[..., Any], cls: type, name: Any = None, *args: Any, **kwargs: Any) -> Any:
    """``PreTrainedModel.from_pretrained`` with pickles off, and a guard on the model."""
    if kwargs.get("use_safetensors") is None and kwargs.get("state_dict") is None and kwargs.get("gguf_file") is None:
        kwargs["use_safetensors"] = True
    result = _auto_from_pretrained(original, cls, name, *args, **kwargs)
    model = result[0] if isinstance(result, tuple) else result
    if any(is_pending(parameter) for parameter in model.parameters()):
        guard(model)
    return result


def _auto_from_pretrained(original: Callable[..., Any], cls: type, name: Any = None, *args: Any, **kwargs: Any) -> Any:
    """``from_pretrained`` with a folder looked at first, and errors that say what to do."""
    _check_folder(name, kwargs)
    try:
        return original(cls, name, *args, **kwargs)
    except OSError as error:
        if isinstance(name, (str, os.PathLike)) and not os.path.exists(name):
            raise UserError(_hub_message(str(name), error)) from error
        raise


def _check_folder(name: Any, kwargs: dict[str, Any]) -> None:
    """Refuses damaged, hostile or pickled weights of a local folder before anything opens them."""
    if not isinstance(name, (str, os.PathLike)) or not os.path.isdir(name) or kwargs.get("variant") is not None:
        return
    folder = Path(name, kwargs.get("subfolder") or "")
    if (folder / SINGLE).exists() or (folder / INDEX).exists():
        ShardedWeights(folder)
    elif kwargs.get("use_safetensors") is not False and not kwargs.get("gguf_file") and pickles_in(folder):
        raise UserError(
            f"{folder} holds {', '.join(pickles_in(folder))} but no safetensors weights. {how_to_convert(folder)}"
        )


def _hub_message(name: str, error: OSError) -> str:
    reason = str(error).strip().split("\n")[0]
    message = f"{name} cannot be loaded: {reason}\n{name} is neither a folder here nor "
    if "safetensors" in reason:
        return f"{message}a Hub model with safetensors weights. {how_to_convert(name)}"
    return (
        f"{message}could it be had from the Hugging Face Hub or its cache on this machine. Check the name and the "
        "network (HF_HUB_OFFLINE=1 forbids it), or download the model first (`hf download NAME`) and give the folder"
    )


def _load_weights(
    original: Callable[..., Any],
    model: nn.Module,
    state_dict: dict[str, Any] | None,
    checkpoint_files: list[str] | None,
    load_config: Any,
    *args: Any,
    **kwargs: Any,
) -> Any:
    """``PreTrainedModel._load_pretrained_model`` with pending tensors in place of what it would read.

    transformers does the rest as ever: renames, casts, ties, initialises what is missing, reports what is odd.
    """
    whole = _why_whole(model, state_dict, checkpoint_files, load_config)
    if whole is not None or checkpoint_files is None:
        logger.info("%s is loaded whole by transformers: %s", type(model).__name__, whole)
        return original(model, state_dict, checkpoint_files, load_config, *args, **kwargs)
    name = load_config.pretrained_model_name_or_path
    subfolder = (load_config.download_kwargs or {}).get("subfolder") or ""
    folder = Path(name, subfolder) if os.path.isdir(name) else Path(checkpoint_files[0]).parent
    weights = ShardedWeights(folder, checkpoint_files)
    pending = {name: PendingTensor.of(Stored(weights, name)) for name in weights.names()}
    result = original(model, pending, checkpoint_files, load_config, *args, **kwargs)
    for buffer in model.buffers():
        if isinstance(buffer, PendingTensor):
            buffer.load()
    return result


def _why_whole(
    model: nn.Module, state_dict: dict[str, Any] | None, checkpoint_files: list[str] | None, load_config: Any
) -> str | None:
    """Why these weights cannot be streamed; None if they can.

    Raises:
        UserError: they are pickles, and nobody said that they are wanted.
    """
    if any(file.endswith(".gguf") for file in checkpoint_files or ()):
        return "its values are unpacked from a GGUF file"
    if state_dict is not None or not checkpoint_files:
        return "its values are given, not read from files"
    if not all(file.endswith(".safetensors") for file in checkpoint_files):
        if load_config.use_safetensors is not False:
            raise UserError(f"{checkpoint_files[0]}: {how_to_convert(load_config.pretrained_model_name_or_path)}")
        return "use_safetensors=False asks for its pickled weights"
    if load_config.hf_quantizer is not None:
        return "it is quantised"
    if load_config.device_mesh is not None:
        return "it is distributed by transformers"
    if any(str(device) != "cpu" for device in (load_config.device_map or {}).values()):
        return f"device_map sends it to {', '.join(sorted({str(d) for d in load_config.device_map.values()}))}"
    if any(parameter.device.type != "meta" for parameter in model.parameters()):
        return "it has values already"
    return None
