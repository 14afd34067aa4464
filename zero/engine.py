"""The loop's verbs around the user's model and optimizer."""

from __future__ import annotations

import contextlib
import logging
import math
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from gemini.arena import HostArena
from gemini.device import Device
from gemini.exchange import ALONE, Exchange
from gemini.manager import Phase
from gemini.plan import Plan
from gemini.tensor import ChunkTensor
from zero import checkpoint, export
from zero.agreement import make_agreement
from zero.config.schema import Config
from zero.dryrun import Blueprint
from zero.errors import UserError
from zero.gathered import gathered
from zero.gradient import forget_gradient, settle_gradient, unmanage, zero_gradient
from zero.guard import CastGuard
from zero.memory_report import MemoryReport, report_of
from zero.optim.chunked import ZeroOptimizer, require_ours
from zero.optim.native import NativeKernel
from zero.passes import PassPlanner
from zero.precision import clip_coefficient, require_loss
from zero.rerun import BufferWatch, StartingPoint
from zero.setup import Managed, make_activations, make_policy, make_scaler, most_logits, survey, take_over
from zero.updating import early_bytes, make_updater, update_bytes, updates_allowed
from zero.window import WindowVerbs
from zero.window_hooks import WindowHooks

logger = logging.getLogger("zero")


class Engine(WindowVerbs):
    """A model whose parameters, gradients and optimizer states a :class:`gemini.manager.Manager` keeps.

    Made by :func:`zero.initialize`. The loop is the user's::

        for batch in train_dataloader:
            engine.zero_grad()
            loss = engine(**batch).loss
            engine.backward(loss)
            engine.step()

    Attributes:
        run_id: names the run; a resumed run takes over its checkpoint's.
        module: the user's model; calling it, ``loss.backward()`` and ``optimizer.step()`` work as ever.
        optimizer: a ``torch.optim.Optimizer`` to the eye; None if none was given.
        exchange: with the other ranks.
        max_grad_norm: gradients are scaled down to this norm; None for no clipping.
        criterion: the user's, unchanged.
        grad_norm: global 2-norm of the last step's gradients before clipping; None before the first step.
        num_steps: optimizer steps taken, skipped ones not counted.
        num_skipped_steps: steps skipped for a gradient that was not finite.
        skipped_last_step: whether the last one was.
        last_step_peak_bytes: highest bytes on the device during the last step.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer | None,
        criterion: Callable[..., Any] | None,
        config: Config,
        device: Device,
        kernel: NativeKernel | None,
        arena: type[HostArena] = HostArena,
        blueprint: Blueprint | None = None,
        exchange: Exchange = ALONE,
        only_infers: bool = False,
    ) -> None:
        self.module = model
        self.criterion = criterion
        self.config = config
        self.device = device
        self.run_id = uuid.uuid4().hex
        self.grad_norm: float | None = None
        self.max_grad_norm = config.train.max_grad_norm
        self.num_steps = 0
        self.num_skipped_steps = 0
        self.skipped_last_step = False
        self.last_step_peak_bytes = 0
        self.scaler = make_scaler(config)
        # What the gradients of this window have been multiplied by: a user's own loss.backward() scales nothing.
        self._applied_scale = 1.0
        self._accumulation = config.train.gradient_accumulation_steps
        self._micro_step = 0
        self._at_loader_end = False
        self._closed = False
        self._keeps_values = True
        self._blueprint = blueprint
        self._last_batch: tuple[Any, Any, int] = ((), {}, 1)
        self.exchange = exchange
        self._saves = checkpoint.BackgroundSaves()
        budget_bytes = config.memory.host // exchange.num_local if config.memory.host else None
        self._host = arena(device, config.memory.pin, budget_bytes)
        if optimizer is not None:
            require_ours(optimizer, model)  # before anything is touched
        about = survey(model, config, optimizer, exchange, only_infers)
        managed = take_over(model, about, config, device, self._host, exchange)
        self.optimizer: ZeroOptimizer | None = None
        self.manager = managed.manager
        with contextlib.ExitStack() as undo:  # a refusal leaves model and optimizer as they were
            self._take_charge(managed, optimizer, kernel, exchange, undo)
            self._undo = undo.pop_all()
        self._last_counters = (self.manager.counters, 0, 0)

    def _take_charge(
        self,
        managed: Managed,
        optimizer: torch.optim.Optimizer | None,
        kernel: NativeKernel | None,
        exchange: Exchange,
        undo: contextlib.ExitStack,
    ) -> None:
        """Hooks, optimizer and first plan; ``undo`` learns how to take each back, last first."""
        undo.callback(self.device.close)
        # Updates run on it until chunks are dissolved.
        self._queue = self.device.host_queue(self.config.optimizer.num_workers)
        undo.callback(self._queue.close)
        # Several ranks must make the same plan, and what others send comes when they have it: none is early there.
        spare_bytes = early_bytes(self.config, self._queue, managed) if exchange is ALONE else 0
        policy = make_policy(self.config, self.device, exchange, spare_bytes)
        self._planner = PassPlanner(policy, managed.facts, self.manager, self.device)
        undo.callback(self._dissolve)
        self._tensors = managed.tensors
        self.facts = managed.facts
        self._ordered = [managed.tensors.get(id(p), p) for p in self.module.parameters()]
        self._agreement = make_agreement(self._ordered, self.manager, exchange)
        self._agreement.begin(self.device)
        logits, activations = most_logits(self.config), make_activations(self.config, self.manager)
        self._units = managed.units
        hooked = (self.module, managed.units, self.manager, self._tensors, self._planner)
        self._hooks = WindowHooks(*hooked, logits, activations, self.config.train.compile)
        undo.callback(self._hooks.remove)
        undo.callback(export.StateDictHook(self.module, self._tensors, self.manager).remove)
        undo.callback(CastGuard(self.module).remove)
        if optimizer is not None:
            updater = make_updater(optimizer, managed, self.config, self._queue, kernel, spare_bytes)
            self._planner.step_bytes = update_bytes(optimizer, self.config, self.facts, self.device)
            self._planner.streamed_piece_numel = self.manager.streamed.piece_numel
            self.optimizer = ZeroOptimizer(
                optimizer, self.manager, self._tensors, updater, self.step, self.zero_grad, self._hooks.settle_outside
            )
            undo.callback(self.optimizer.release)
        self.manager.apply(policy.initial(self.facts, self.device.capacity_bytes))
        self._buffers = BufferWatch(self.module)
        undo.callback(self._saves.wait)  # first of all: a save that still runs reads the chunks

    # -- the loop ----------------------------------------------------------------------------------------------------

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Runs the model.

        Raises:
            gemini.plan.DoesNotFitError: no placement lets this batch run on the device.
        """
        self._require_placed()
        self._last_batch = (args, kwargs, 1)
        self._doing("forward")
        start = StartingPoint(self._buffers, self.device.torch_device) if self._planner.may_offload else None
        try:
            return self._forward(args, kwargs)
        except torch.OutOfMemoryError as error:
            if start is None or not self._planner.offload_everything():
                raise self._refusal(error) from error
        # The placement was too greedy for this batch: everything is off the device now, run the same batch again. Not
        # in the handler above, where the error's traceback still holds what the failed pass had made.
        start.restore()
        try:
            return self._forward(args, kwargs)
        except torch.OutOfMemoryError as error:
            raise self._refusal(error) from error

    def _forward(self, args: Any, kwargs: Any) -> Any:
        try:
            return self.module(*args, **kwargs)
        except BaseException:
            self._hooks.settle_interrupted_forward()  # torch runs no hooks after a Ctrl-C
            raise

    def backward(self, loss: torch.Tensor, scale_by_accumulation: bool = True) -> None:
        """Computes gradients.

        Args:
            loss: scalar; divided by ``gradient_accumulation_steps``, as DeepSpeed and accelerate do.
            scale_by_accumulation: False when the caller has weighted the micro-batches already.
        """
        self._require_placed()
        self._doing("backward")
        require_loss(loss)
        if scale_by_accumulation and self._accumulation > 1:
            loss = loss / self._accumulation
        if self.scaler.scale != 1.0:
            loss = loss * self.scaler.scale
            self._applied_scale = self.scaler.scale
        factor = 1.0 / self._applied_scale if self.is_boundary and self.max_grad_norm is None else None
        try:
            with self.device.activity(), updates_allowed(self.optimizer, factor):
                loss.backward()
        except BaseException as error:
            self._hooks.backward_failed()
            self.manager.abort_pass()
            if isinstance(error, torch.OutOfMemoryError):
                raise self._backward_refusal(error) from error
            raise

    @property
    def is_boundary(self) -> bool:
        """Whether the next ``step()`` acts: its micro-batch ends the accumulation window, or the loader."""
        return self._at_loader_end or (self._micro_step + 1) % self._accumulation == 0

    def step(self) -> None:
        """Ends a micro-batch; at the boundary updates every parameter that has a gradient.

        A gradient that is not finite skips the update; nothing is touched but the loss scale.

        Raises:
            UserError: the engine was made without an optimizer.
        """
        self._require_placed()
        if self.optimizer is None:
            raise UserError("engine.step(): initialize() was given no optimizer")
        if not self.is_boundary:
            self._micro_step += 1
            return
        self._micro_step = 0
        self._at_loader_end = False
        self._doing("the update")
        self._agreement.meet("step()")
        self.manager.start_clock()
        self.optimizer.call_step_hooks(before=True)
        self.optimizer.settle()
        self.manager.release_stale()
        self._applied_scale = self._agreement.settle_gradients(self._applied_scale)
        for tensor in self._tensors.values():
            settle_gradient(tensor)
            if not tensor.chunk.layout.trainable and tensor.parameter.requires_grad:
                raise UserError(
                    f"parameter {tensor.name} began to require gradients after zero.initialize(), which took it over as "
                    "frozen; close() the engine and initialize again"
                )
        self._agreement.share_plans(self._planner)
        inverse_scale = 1.0 / self._applied_scale
        statistics = self._agreement.statistics(inverse_scale)
        self.grad_norm = statistics.norm
        # A norm beyond fp32 without an element that is: clipping makes zeros of it, squares of it would be infinite.
        finite = statistics.finite and (math.isfinite(statistics.norm) or self.max_grad_norm is not None)
        self.skipped_last_step = not finite
        if finite:
            self._update(inverse_scale * clip_coefficient(statistics.norm, self.max_grad_norm))
            self.num_steps += 1
            self.optimizer.call_step_hooks(before=False)
        else:
            self.optimizer.updater.early.discard()
            self.num_skipped_steps += 1
        if self._applied_scale == self.scaler.scale:
            self.scaler.update(overflow=not finite)
        self._applied_scale = 1.0
        self.optimizer.mark_stepped()
        self._keep_counters()

    def skip_step(self) -> None:
        """Ends the window without an update: its gradients are dropped, and it counts as skipped."""
        self._require_placed()
        self._agreement.meet("skip_step()")
        self.manager.start_clock()
        self._micro_step = 0
        self._at_loader_end = False
        self._agreement.settle_gradients()
        self.zero_grad()
        self.grad_norm, self.skipped_last_step = math.nan, True
        self.num_skipped_steps += 1
        self._applied_scale = 1.0
        self._keep_counters()

    def _update(self, factor: float) -> None:
        if self.optimizer is None:
            return
        if self.optimizer.updater.makes_states_on_device(self.manager.chunks):
            self._planner.offload_everything()  # no plan knows of states that were reset
        if any(chunk.placement.companion_numel for chunk in self.manager.chunks):
            self.manager.make_room_for_step()
        self.device.reset_peaks()
        self.optimizer.updater.update((c for c in self.manager.chunks if c.layout.trainable), factor)
        for chunk in self.manager.chunks:
            chunk.step = self.num_steps + 1
        if self.manager.trace is not None:
            trace = self.manager.trace
            trace.step_peak_bytes = max(trace.step_peak_bytes, self.device.memory().non_model_peak_bytes)

    def _doing(self, what: str) -> None:
        self._agreement.doing(what, self.num_steps + self.num_skipped_steps + 1)

    def _keep_counters(self) -> None:
        self._doing("between steps")
        self.last_step_peak_bytes = self.device.take_step_peak_bytes()
        transfer = self.manager.transfer
        self._last_counters = (self.manager.counters, transfer.h2d_bytes, transfer.d2h_bytes)
        self.manager.reset_counters()

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forgets gradients, unless an accumulation window is open.

        Args:
            set_to_none: False sets the gradients there are to zero instead: a parameter that the next pass does not use
                is then updated all the same.
        """
        self._require_open()
        if self._micro_step != 0:
            return
        self._applied_scale = 1.0
        self._hooks.settle_failed_pass()
        had_any = any(tensor.has_gradient for tensor in self._tensors.values())
        if had_any:
            self.exchange.before_forgetting()
        if set_to_none and (had_any or self._agreement.is_alone):
            self.manager.drop_gradients()
        for parameter in self._ordered:
            if not isinstance(parameter, ChunkTensor):
                parameter.grad = None
            elif set_to_none:
                forget_gradient(parameter)
            else:
                zero_gradient(parameter)

    def train(self, mode: bool = True) -> Engine:
        """Sets the model's mode."""
        self.module.train(mode)
        return self

    def eval(self) -> Engine:
        """Sets the model to evaluation."""
        return self.train(False)

    @property
    def loss_scale(self) -> float:
        """The scale of the next backward pass; 1 unless the dtype is fp16."""
        return self.scaler.scale

    def meet(self, what: str) -> None:
        """Waits until all ranks have come to the same place; a process by itself goes on at once.

        Whoever waits here serves the others' fetches. Call it where ranks may arrive after different numbers of
        forward passes, and do something that all take part in.

        Raises:
            UserError: another rank has come to another place.
        """
        self._agreement.meet(what)

    def end_of_loader(self, at_end: bool = True) -> None:
        """The current micro-batch is the loader's last: its ``step()`` acts even if the window is not full."""
        self._at_loader_end = at_end

    def _backward_refusal(self, error: torch.OutOfMemoryError) -> Exception:
        """The same for a backward pass, which cannot be run again without the user's loss."""
        if not self._planner.offload_everything() or not self._agreement.is_alone:
            return self._refusal(error)
        self._micro_step = 0
        self.zero_grad()
        return torch.OutOfMemoryError(
            f"{error}. This batch needed more than those before it. Everything has been taken off the device now and "
            "the gradients of this accumulation window are dropped: run its micro-batches again, they may well fit"
        )

    def _refusal(self, error: torch.OutOfMemoryError) -> Exception:
        """An out-of-memory error of the device as a table of who needs what."""
        trace = None
        if self._blueprint is not None and torch.is_grad_enabled():
            # The pass broke off before its worst moment: only a dry run knows how much would have been enough.
            trace = self._blueprint.trace(self.config, *self._last_batch, exchange=self.exchange.rehearsal())
        return self._planner.refusal(error, trace)

    @property
    def plan(self) -> Plan:
        """Where everything lives at present."""
        plan = self.manager.plan
        if plan is None:
            raise RuntimeError("the engine has no plan yet")
        return plan

    # -- looking in --------------------------------------------------------------------------------------------------

    def synchronize(self) -> None:
        """Finishes everything pending: copies, updates, and a save in the background, whose error it raises."""
        self.manager.settle_updates()
        self.device.synchronize()
        self._saves.wait()

    @contextlib.contextmanager
    def gathered_parameters(self) -> Iterator[nn.Module]:
        """Full parameters, readable and writable; what was written is taken over on exit.

        Inside, every parameter is a host tensor with its authoritative values (the fp32 master where there is one is
        updated from what you write). The model cannot run, nor be updated, inside. May be nested. With several ranks all
        must enter; of a parameter that several have written, what the lowest rank wrote counts.
        """
        self._require_open()
        if self.manager.all_shown:  # inside another: the parameters are whole already
            yield self.module
            return
        self._hooks.settle_failed_pass()
        with gathered(self.manager, self._tensors.values(), self._agreement):
            yield self.module

    def memory_report(self) -> MemoryReport:
        """Bytes and counters; see :class:`MemoryReport`."""
        return report_of(self.manager, self._host, self.plan, *self._last_counters)

    def check_integrity(self) -> None:
        """Raises RuntimeError if the manager's books do not balance."""
        self._require_open()
        self.manager.check_integrity()

    # -- out and over ------------------------------------------------------------------------------------------------

    def save_checkpoint(self, directory: str | Path, **options: Any) -> Path:
        """Writes everything a resume needs; see :func:`zero.checkpoint.save_checkpoint`."""
        self._settle()
        return checkpoint.save_checkpoint(self, directory, **options)

    def load_checkpoint(self, directory: str | Path, **options: Any) -> checkpoint.LoadedState:
        """Goes on from a checkpoint, bit for bit; see :func:`zero.checkpoint.load_checkpoint`."""
        self._settle()
        return checkpoint.load_checkpoint(self, directory, **options)

    def save_pretrained(self, directory: str | Path) -> None:
        """Writes a Hugging Face folder that loads without this project, chunk by chunk; the first rank does."""
        self._require_placed()
        if self._agreement.is_first:
            export.save_pretrained(self.module, self._tensors, Path(directory))
        self.meet("save_pretrained()")

    def close(self, keep_values: bool = True) -> None:
        """Gives all memory back; leaves an ordinary module, with its trained values on the host, and optimizer.

        Plain PyTorch, or another engine, can go on from there; in bf16 and fp16 without the fp32 master. With several
        ranks all must call it, and each gets the whole model.

        Args:
            keep_values: False leaves module and optimizer without values, and needs no other rank.
        """
        if self._closed:
            return
        if self.manager.all_shown:
            raise UserError("engine.close() inside gathered_parameters(): leave it first")
        self._hooks.settle_failed_pass()
        if self.manager.phase is not Phase.IDLE:
            self.manager.abort_pass()  # a forward that nobody took backward
        self.manager.settle_idle_reads()
        self._keeps_values = keep_values
        if keep_values:
            self.meet("close()")
        self._closed = True
        self._undo.close()
        self._agreement.end()

    def _dissolve(self) -> None:
        """Chunk by chunk, so that nothing is held twice but one chunk."""
        for chunk in self.manager.chunks:
            if self.optimizer is not None and self._keeps_values:
                self.optimizer.hand_back(chunk.tensors)
            chunk.dissolve(self._keeps_values)
            for tensor in chunk.tensors:
                unmanage(tensor.parameter)  # type: ignore[arg-type]
        self.manager.streamed.close()
        if self.optimizer is not None:
            self.optimizer.updater.early.close()
        self.manager.store.disk.close()

    def _require_open(self) -> None:
        if self._closed:
            raise UserError("the engine was closed; make a new one with zero.initialize()")

    def _settle(self) -> None:
        """What failed is cleared up, and what the user has changed is taken over."""
        self._require_placed()
        self._hooks.settle_failed_pass()
        if self.optimizer is not None:
            self.optimizer.settle()

    def _require_placed(self) -> None:
        self._require_open()
        if self.manager.all_shown:
            raise UserError(
                "inside gathered_parameters() parameters can be read and written, but the model cannot run, be updated, "
                "saved or loaded: leave it first"
            )
