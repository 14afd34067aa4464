"""The loop's verbs around the user's model and optimizer."""

from __future__ import annotations

import contextlib
import logging
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from gemini.arena import HostArena
from gemini.chunk import ChunkTensor
from gemini.device import Device
from gemini.plan import Plan, offload_all
from gemini.policy import does_not_fit
from gemini.store import Tier
from gemini.trace import Trace
from zero import checkpoint, export
from zero.config.schema import Config
from zero.errors import UserError
from zero.gradient import unmanage
from zero.hooks import ModelHooks
from zero.memory_report import MemoryReport
from zero.optim.chunked import ZeroOptimizer, map_groups
from zero.optim.elementwise import state_bytes_per_numel
from zero.optim.native import NativeKernel
from zero.optim.update import ChunkUpdater
from zero.precision import LossScaler, clip_coefficient, gradient_statistics
from zero.setup import make_policy, take_over

logger = logging.getLogger("zero")


class Engine:
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
    ) -> None:
        self.module = model
        self.criterion = criterion
        self.config = config
        self.device = device
        self.run_id = uuid.uuid4().hex
        self.grad_norm: float | None = None
        self.num_steps = 0
        self.num_skipped_steps = 0
        self.skipped_last_step = False
        self.last_step_peak_bytes = 0
        self._accumulation = config.train.gradient_accumulation_steps
        self._micro_step = 0
        self._at_loader_end = False
        self._needs_plan = False
        self._closed = False
        self._host = arena(device, config.memory.pin, config.memory.host)
        self._policy = make_policy(config, device)
        state_bytes = state_bytes_per_numel(optimizer) if optimizer is not None else 0
        managed = take_over(model, config, device, state_bytes, self._accumulation > 1, self._host)
        self.manager = managed.manager
        self._tensors = managed.tensors
        self.facts = managed.facts
        self._ordered = [managed.tensors[id(p)] for p in model.parameters() if id(p) in managed.tensors]
        self._hooks = ModelHooks(
            model, managed.units, self.manager, self._tensors, self._pass_begins, self._backward_ends
        )
        self._export = export.StateDictHook(model, self._tensors, self.manager)
        self.scaler = _make_scaler(config)
        self.optimizer: ZeroOptimizer | None = None
        if optimizer is not None:
            groups = map_groups(optimizer, self._tensors, managed.names)
            updater = self._make_updater(optimizer, groups, kernel)
            self.optimizer = ZeroOptimizer(optimizer, self.manager, self._tensors, updater, self.step, self.zero_grad)
        self.manager.apply(self._policy.initial(self.facts, device.capacity_bytes))
        self._last_counters = (self.manager.counters, 0, 0)

    def _make_updater(
        self, optimizer: torch.optim.Optimizer, groups: dict[ChunkTensor, dict[str, Any]], kernel: NativeKernel | None
    ) -> ChunkUpdater:
        store, transfer = self.manager.store, self.manager.transfer
        # Temporaries of an update on the device count against its capacity: keep them a small share of it.
        device_piece_numel = min(1 << 24, max(1 << 12, self.device.capacity_bytes // 1024))
        return ChunkUpdater(optimizer, groups, store, transfer, kernel, device_piece_numel=device_piece_numel)

    # -- the loop ----------------------------------------------------------------------------------------------------

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Runs the model.

        Raises:
            gemini.plan.DoesNotFitError: no placement lets this batch run on the device.
        """
        self._require_open()
        state = torch.get_rng_state()
        try:
            return self.module(*args, **kwargs)
        except torch.OutOfMemoryError as error:
            if not self._offload_everything():
                raise self._refusal(error) from error
        # The placement was too greedy for this batch: everything is off the device now, run the same batch again.
        torch.set_rng_state(state)
        try:
            return self.module(*args, **kwargs)
        except torch.OutOfMemoryError as error:
            raise self._refusal(error) from error

    def backward(self, loss: torch.Tensor, scale_by_accumulation: bool = True) -> None:
        """Computes gradients.

        Args:
            loss: scalar; divided by ``gradient_accumulation_steps``, as DeepSpeed and accelerate do.
            scale_by_accumulation: False when the caller has weighted the micro-batches already.
        """
        self._require_open()
        if scale_by_accumulation and self._accumulation > 1:
            loss = loss / self._accumulation
        if self.scaler.scale != 1.0:
            loss = loss * self.scaler.scale
        try:
            with self.device.activity():
                loss.backward()
        except BaseException as error:
            self._hooks.backward_failed()
            self.manager.abort_pass()
            if isinstance(error, torch.OutOfMemoryError):
                raise self._refusal(error) from error
            raise

    @property
    def is_boundary(self) -> bool:
        """Whether the next ``step()`` acts: its micro-batch is the last of the accumulation window, or of the loader."""
        return self._at_loader_end or (self._micro_step + 1) % self._accumulation == 0

    def step(self) -> None:
        """Ends a micro-batch; at the boundary updates every parameter that has a gradient.

        A gradient that is not finite skips the update; nothing is touched but the loss scale.

        Raises:
            UserError: the engine was made without an optimizer.
        """
        self._require_open()
        if self.optimizer is None:
            raise UserError("engine.step(): initialize() was given no optimizer")
        if not self.is_boundary:
            self._micro_step += 1
            return
        self._micro_step = 0
        self._at_loader_end = False
        self.manager.release_stale()
        inverse_scale = 1.0 / self.scaler.scale
        statistics = gradient_statistics(self._ordered, inverse_scale)
        self.grad_norm = statistics.norm
        self.skipped_last_step = not statistics.finite
        if statistics.finite:
            self._update(inverse_scale * clip_coefficient(statistics.norm, self.config.train.max_grad_norm))
            self.num_steps += 1
        else:
            self.num_skipped_steps += 1
        self.scaler.update(overflow=not statistics.finite)
        self.optimizer.mark_stepped()
        self._keep_counters()

    def _update(self, factor: float) -> None:
        if self.optimizer is None:
            return
        if any(s.companion_tier is Tier.DEVICE for c in self.manager.chunks for s in c.segments):
            self.manager.make_room_for_step()
        self.device.reset_peaks()
        for chunk in self.manager.chunks:
            if chunk.layout.trainable:
                self.optimizer.updater.update(chunk, factor)
            chunk.step = self.num_steps + 1
        if self.manager.trace is not None:
            trace = self.manager.trace
            trace.step_peak_bytes = max(trace.step_peak_bytes, self.device.memory().non_model_peak_bytes)

    def _keep_counters(self) -> None:
        self.last_step_peak_bytes = self.device.take_step_peak_bytes()
        transfer = self.manager.transfer
        self._last_counters = (self.manager.counters, transfer.h2d_bytes, transfer.d2h_bytes)
        self.manager.reset_counters()

    def zero_grad(self) -> None:
        """Forgets gradients, unless an accumulation window is open."""
        if self._micro_step == 0:
            for tensor in self._ordered:
                tensor.has_gradient = False

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

    def end_of_loader(self) -> None:
        """The current micro-batch is the loader's last: its ``step()`` acts even if the window is not full."""
        self._at_loader_end = True

    # -- passes and plans --------------------------------------------------------------------------------------------

    def _pass_begins(self, training: bool, batch_numel: int) -> None:
        trace = self.manager.trace
        if training and trace is not None and batch_numel > trace.batch_numel:
            self._offload_everything()  # nobody knows what this longer batch needs: warm up again
        elif training and self._needs_plan:
            self._replan()
        self.manager.begin_pass(training, batch_numel)

    def _backward_ends(self) -> None:
        self._needs_plan |= self.manager.end_backward()

    def _replan(self) -> None:
        self._needs_plan = False
        trace = self.manager.trace
        if trace is None:
            return
        self.manager.apply(self._policy.decide(self.facts, trace, self.device.capacity_bytes))

    def _offload_everything(self) -> bool:
        """Takes all model data off the device, if the policy may; True if anything was there."""
        if self._policy.name != "auto":
            return False
        self._needs_plan = True
        if not any(p.resident_numel or p.companion_numel for p in self.plan.placements):
            return False
        self.manager.apply(offload_all("auto", self.facts))
        return True

    def _refusal(self, error: torch.OutOfMemoryError) -> Exception:
        """An out-of-memory error of the device as a table of who needs what."""
        moments = self.manager.pass_moments
        if not moments:
            return error
        trace = Trace(moments=moments)
        refusal = does_not_fit(self.facts, self.plan, trace, self.device.capacity_bytes)
        refusal.__notes__ = [str(error)]
        return refusal

    @property
    def plan(self) -> Plan:
        """Where everything lives at present."""
        plan = self.manager.plan
        if plan is None:
            raise RuntimeError("the engine has no plan yet")
        return plan

    # -- looking in --------------------------------------------------------------------------------------------------

    def synchronize(self) -> None:
        """Finishes everything pending: copies on all streams, and updates."""
        self.device.synchronize()

    @contextlib.contextmanager
    def gathered_parameters(self) -> Iterator[nn.Module]:
        """Full parameters, readable and writable; what was written is taken over on exit.

        Inside, every parameter is a host tensor with its authoritative values (the fp32 master where there is one is
        updated from what you write). Do not run the model inside.
        """
        self._require_open()
        self.manager.settle_idle_reads()
        bound = {tensor: tensor.parameter.data for tensor in self._tensors.values()}
        for tensor in bound:
            tensor.parameter.data = tensor.chunk.values_of(tensor)
        try:
            with self.manager.shown_whole():
                yield self.module
        finally:
            for tensor, placed in bound.items():
                written, tensor.parameter.data = tensor.parameter.data, placed
                if not torch.equal(written, tensor.chunk.values_of(tensor)):
                    self.manager.write(tensor, written)

    def memory_report(self) -> MemoryReport:
        """Bytes and counters; see :class:`MemoryReport`."""
        peaks = self.device.lifetime_peaks()
        counters, h2d_bytes, d2h_bytes = self._last_counters
        store = self.manager.store
        return MemoryReport(
            device_capacity_bytes=self.device.capacity_bytes,
            device_peak_bytes=peaks.device_bytes,
            predicted_device_peak_bytes=self.plan.predicted_device_peak_bytes,
            model_data_peak_bytes=peaks.model_data_bytes,
            non_model_peak_bytes=peaks.non_model_bytes,
            host_bytes=self._host.host_bytes,
            pinned_bytes=self._host.pinned_bytes,
            disk_bytes=0,
            num_chunks=len(self.manager.chunks),
            num_fetches=counters.num_fetches,
            num_evictions=counters.num_evictions,
            h2d_bytes=h2d_bytes,
            d2h_bytes=d2h_bytes,
            device_bytes_by_kind=store.kinds(Tier.DEVICE),
            host_bytes_by_kind=store.kinds(Tier.HOST),
        )

    def check_integrity(self) -> None:
        """Raises RuntimeError if the manager's books do not balance."""
        self.manager.check_integrity()

    # -- out and over ------------------------------------------------------------------------------------------------

    def save_checkpoint(self, directory: str | Path, **options: Any) -> Path:
        """Writes everything a resume needs; see :func:`zero.checkpoint.save_checkpoint`."""
        return checkpoint.save_checkpoint(self, directory, **options)

    def load_checkpoint(self, directory: str | Path, **options: Any) -> checkpoint.LoadedState:
        """Goes on from a checkpoint, bit for bit; see :func:`zero.checkpoint.load_checkpoint`."""
        return checkpoint.load_checkpoint(self, directory, **options)

    def save_pretrained(self, directory: str | Path) -> None:
        """Writes a Hugging Face folder that loads without this project, chunk by chunk."""
        self._require_open()
        export.save_pretrained(self.module, self._tensors, Path(directory))

    def close(self) -> None:
        """Gives all memory back and leaves the model an ordinary module with its trained values on the host."""
        if self._closed:
            return
        self._closed = True
        self.manager.settle_idle_reads()
        self._hooks.remove()
        self._export.remove()
        for chunk in self.manager.chunks:
            chunk.dissolve()
        for tensor in self._tensors.values():
            unmanage(tensor.parameter)  # type: ignore[arg-type]
        self.device.close()

    def _require_open(self) -> None:
        if self._closed:
            raise UserError("the engine was closed; make a new one with zero.initialize()")


def _make_scaler(config: Config) -> LossScaler:
    precision = config.precision
    return LossScaler(
        enabled=precision.dtype == "fp16",
        scale=precision.initial_scale,
        growth_factor=precision.growth_factor,
        backoff_factor=precision.backoff_factor,
        growth_interval=precision.growth_interval,
        hysteresis=precision.hysteresis,
        min_scale=precision.min_scale,
        max_scale=precision.max_scale,
    )
