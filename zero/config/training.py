"""Tables about the training: optimizer, scheduler, train."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field

from zero.config.types import (
    Allowed,
    Betas,
    Fraction,
    Growth,
    MaxSteps,
    NonNegativeInt,
    NonNegativeNumber,
    OpenFraction,
    PositiveInt,
    PositiveNumber,
    Section,
    Seed,
    Shrink,
    Text,
)

# The arguments of torch.optim's class that the table sets, per optimizer, beside lr.
OPTIMIZER_KEYS: dict[str, tuple[str, ...]] = {
    "adamw": ("betas", "eps", "weight_decay"),
    "adam": ("betas", "eps", "weight_decay"),
    "sgd": ("momentum", "weight_decay"),
    "lion": ("betas", "weight_decay"),
    "rmsprop": ("eps", "momentum", "weight_decay"),
    "adagrad": ("eps", "weight_decay"),
    "nadam": ("betas", "eps", "weight_decay"),
    "radam": ("betas", "eps", "weight_decay"),
    "adamax": ("betas", "eps", "weight_decay"),
    "adadelta": ("eps", "weight_decay"),
    "asgd": ("weight_decay",),
    "rprop": (),
}

_NOT_ELEMENTWISE = {
    "adafactor": "its factored moments need whole matrices",
    "lbfgs": "it needs all gradients at once and calls the loss several times a step",
    "muon": "it orthogonalises whole matrices",
    "lamb": "it needs the norm of each whole tensor",
    "lars": "it needs the norm of each whole tensor",
    "shampoo": "it preconditions whole matrices",
    "soap": "it preconditions whole matrices",
    "galore": "it projects whole matrices",
    "sparseadam": "it works on sparse gradients, and chunks are dense",
}


def _elementwise(value: Any) -> Any:
    """Refuses, with the reason, optimizers that cannot work on a chunk of many parameters."""
    reason = _NOT_ELEMENTWISE.get(value.lower()) if isinstance(value, str) else None
    if reason:
        raise ValueError(f"not elementwise, {reason}; use one of {', '.join(OPTIMIZER_KEYS)}")
    return value


class OptimizerSection(Section):
    """The optimizer that `zero train` builds. Your own loop builds its own and leaves this table out."""

    name: Annotated[
        Literal[
            "adamw",
            "adam",
            "sgd",
            "lion",
            "rmsprop",
            "adagrad",
            "nadam",
            "radam",
            "adamax",
            "adadelta",
            "asgd",
            "rprop",
        ],
        BeforeValidator(_elementwise),
    ] = "adamw"
    """Which optimizer, by the name of its torch.optim class in lower case; `lion` is `zero.optim.lion.Lion`. Only
    elementwise ones work on chunks."""

    lr: NonNegativeNumber = 5e-5
    """Learning rate at its highest; the scheduler multiplies it."""

    betas: Betas = (0.9, 0.999)
    """Decay of the two moments, per step; lion's authors advise [0.9, 0.99]. Only for adamw, adam, lion, nadam, radam and
    adamax."""

    eps: NonNegativeNumber | None = None
    """Added to the denominator. Unset: torch's own default for that optimizer (1e-8 for adamw)."""

    weight_decay: NonNegativeNumber = 0.0
    """Weight decay per unit of learning rate (adamw, lion) or as an L2 term in the gradient (the others)."""

    momentum: OpenFraction = 0.0
    """Momentum of sgd and rmsprop."""

    kernel: Literal["auto", "native", "torch"] = "auto"
    """Who computes the update on the CPU: `native` is the C kernel of this package (adamw, adam, lion and sgd), `torch` is
    torch's own arithmetic bit for bit, `auto` takes native where it could be built and the optimizer is adamw, adam or
    lion."""

    workers: Annotated[int, Field(ge=0)] | Literal["auto"] = "auto"
    """Threads that update parameters on the CPU while the device goes on to the next forward pass; results are the same
    to the bit. `auto` is one beside an accelerator, and none with device.type = cpu, where the model needs the same
    cores; 0 makes every update before step() returns."""

    early: bool | Literal["auto"] = "auto"
    """Where gradients are not clipped, begin updates inside backward. What they overwrite is kept, in at most half of the
    host memory that the model leaves free, until the step is known to be good: results are the same to the bit. `auto` is
    true on a real accelerator, and false where nothing can be gained. Only with one process, without accumulation, and
    with workers."""

    @property
    def num_workers(self) -> int | None:
        """Threads for updates; None for as many as suit the device."""
        return None if self.workers == "auto" else self.workers

    def arguments(self) -> dict[str, Any]:
        """Keyword arguments for the optimizer's class in torch.optim: lr and what else it takes of this table."""
        values = {key: getattr(self, key) for key in OPTIMIZER_KEYS[self.name]}
        return {"lr": self.lr} | {key: value for key, value in values.items() if value is not None}


class SchedulerSection(Section):
    """How the learning rate moves over the run of `zero train`."""

    name: Literal[
        "linear", "cosine", "constant", "constant_with_warmup", "cosine_with_restarts", "polynomial", "inverse_sqrt"
    ] = "linear"
    """Shape of the curve, with the names of transformers' schedules. `linear` and `cosine` fall to 0 at the last
    step."""

    warmup_ratio: Fraction = 0.0
    """Fraction of all steps over which the rate rises from 0 to lr. May be given in [train] as well."""

    warmup_steps: NonNegativeInt = 0
    """Number of steps over which the rate rises from 0 to lr; instead of warmup_ratio. May be given in [train] as
    well."""

    def num_warmup_steps(self, num_steps: int) -> int:
        """Warm-up in optimizer steps.

        Args:
            num_steps: Number of optimizer steps of the whole run.

        Returns:
            `warmup_steps` where it is set, else the ratio of `num_steps`, rounded up as transformers does.
        """
        return self.warmup_steps or math.ceil(num_steps * self.warmup_ratio)


def _zero_is_off(value: float | None) -> float | None:
    """As in transformers, a norm of 0 means no clipping; clipping to a norm of 0 would erase every gradient."""
    return value or None


def _trackers(value: Any) -> Any:
    """One name, or several; "none" is the empty list, as in transformers."""
    names = [value] if isinstance(value, str) else value
    if isinstance(names, list | tuple):
        return tuple(name for name in names if name != "none")
    return value


Tracker = Literal["tensorboard", "wandb", "trackio", "mlflow"]


class TrainSection(Section):
    """The loop: batches, steps, what is saved and when. Words as in transformers' TrainingArguments."""

    per_device_train_batch_size: PositiveInt = 8
    """Samples per rank and micro-batch in training."""

    per_device_eval_batch_size: PositiveInt = 8
    """Samples per rank and batch in evaluation."""

    gradient_accumulation_steps: PositiveInt = 1
    """Micro-batches per optimizer step."""

    accumulation_order: Literal["batch", "layer"] = "batch"
    """Order of the micro-batches of a step: `batch` takes one after the other through the whole model; `layer` takes all
    through each layer before the next, so that parameters cross the link once a step and not once a micro-batch, for the
    memory of all micro-batches' activations (with gradient_checkpointing, one input per layer). The numbers are the same
    but for dropout, and for the rounding of tied weights. In your own loop, call engine.run_window()."""

    max_grad_norm: Annotated[NonNegativeNumber | None, AfterValidator(_zero_is_off)] = None
    """Gradients are scaled down to this global L2 norm where theirs is larger. Unset or 0: no clipping."""

    max_steps: MaxSteps = -1
    """Number of optimizer steps, repeating the data as needed. -1: as many as num_train_epochs say."""

    num_train_epochs: PositiveNumber = 3.0
    """Times the data is gone through; may be a fraction. max_steps goes before it."""

    seed: Seed = 42
    """Seed of initial weights, data order and dropout."""

    deterministic: bool = False
    """Only algorithms whose results repeat bit for bit; slower on some accelerators."""

    gradient_checkpointing: Annotated[
        Literal[False, True, "reentrant", "non_reentrant"],
        Allowed('true, false, "reentrant" or "non_reentrant"'),
    ] = False
    """Keep only each block's input and compute the rest again in backward: less memory, a third more computing.
    `true` is "non_reentrant"."""

    compile: bool = False
    """Compile each block with torch.compile: faster steps after a first one that takes a minute or more. Results are those
    of plain PyTorch up to rounding. Give zero.initialize() the model uncompiled. A block with hooks on modules inside of it
    stays as it is."""

    liger: bool = False
    """Compute norms, rotary positions and gated layers with Liger's Triton kernels (extra `liger`:
    pip install -c constraints.txt -e ".[liger]"): faster, and less memory for activations. Results are those of plain
    PyTorch up to rounding. Only on a GPU and for the models that Liger knows, which OPT and GPT-2 are not among."""

    chunked_loss: bool | Literal["auto"] = "auto"
    """Compute the loss from the last hidden states piece by piece, so that the logits of a large batch are never on the
    device as a whole: results are those of plain PyTorch up to rounding, and to the bit for small batches. `auto` is
    true in `zero train`, and false in your own loop. Only for models of transformers whose head is a linear layer."""

    max_skipped_steps: PositiveInt = 10
    """Steps in a row that may be skipped for a loss or gradient that is not finite, or for a spike, before the run goes
    back to its newest healthy checkpoint or, where that may not be, stops."""

    spike_factor: Growth | None = None
    """A step whose loss is this many times the median of the last 32 is skipped as a spike. Unset: no loss is too
    high."""

    max_rollbacks: NonNegativeInt = 2
    """Times a run may go back to its newest healthy checkpoint, leaving out the data since; then it stops."""

    rollback_lr_factor: Shrink = 0.5
    """The learning rate is multiplied by this each time a run goes back."""

    rollback_max_grad_norm: PositiveNumber | None = None
    """Gradients are clipped to this norm once a run has gone back. Unset: as before."""

    logging_steps: PositiveInt = 1
    """Steps between two log lines."""

    eval_steps: PositiveInt | None = None
    """Steps between two evaluations. Unset: before the first step and after the last."""

    save_steps: PositiveInt = 500
    """Steps between two checkpoints. The last step always saves."""

    save_total_limit: PositiveInt | None = None
    """Number of checkpoints kept, oldest removed first. Unset: all."""

    output_dir: Text | None = None
    """Folder for the run: resolved config, metrics, checkpoints, the model. Unset: "runs/" and the name of the config
    file."""

    resume_from_checkpoint: Annotated[bool | Text | None, Allowed("true, false or a checkpoint folder")] = None
    """Continue from this checkpoint folder, or with `true` from the newest one of output_dir."""

    report_to: Annotated[
        tuple[Tracker, ...],
        BeforeValidator(_trackers),
        Allowed('a list of "tensorboard", "wandb", "trackio" and "mlflow", or "none"'),
    ] = ("tensorboard",)
    """Trackers that get the metrics, beside the JSONL file that is always written."""

    @property
    def checkpointing(self) -> Literal["off", "reentrant", "non_reentrant"]:
        """Kind of activation checkpointing, `true` resolved."""
        if self.gradient_checkpointing is False:
            return "off"
        return "non_reentrant" if self.gradient_checkpointing is True else self.gradient_checkpointing

    @property
    def num_in_turn(self) -> int:
        """Micro-batches of `zero train` that go through the model layer by layer; 1 if they go one after the other."""
        return self.gradient_accumulation_steps if self.accumulation_order == "layer" else 1

    def run_folder(self, stem: str) -> Path:
        """Folder of the run.

        Args:
            stem: Name of the config without its suffix, used where output_dir is unset.
        """
        return Path(self.output_dir) if self.output_dir else Path("runs") / stem
