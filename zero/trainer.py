"""``zero train``: a run from a config, start to folder."""

from __future__ import annotations

import contextlib
import json
import logging
import math
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from gemini.plan import DoesNotFitError
from gemini.units import format_bytes
from zero.config.describe import to_toml
from zero.config.loading import for_trainer
from zero.config.schema import Config
from zero.data.loaders import DataBundle, build_dataloaders
from zero.data.preview import describe_sample
from zero.dryrun import CannotWalkError
from zero.engine import Engine
from zero.errors import UserError
from zero.evaluate import evaluate, perplexity
from zero.health import HealthWatch
from zero.initializer import initialize
from zero.models.build import build_model, build_tokenizer, max_positions, model_config
from zero.optimizers import build_optimizer, build_scheduler
from zero.planning import PlannedRun, plan_run
from zero.progress import Progress, TrainingStopped
from zero.ranks import Ranks, join_ranks
from zero.recovery import RunCheckpoints
from zero.report.codecarbon import check_codecarbon
from zero.report.console import Reporter, make_reporter
from zero.report.memory_map import draw_memory_map
from zero.report.metrics import MetricsWriter
from zero.report.record import StepRecord
from zero.report.recorder import StepRecorder
from zero.report.tables import values_text
from zero.report.trackers import check_trackers
from zero.run_cost import RunCost
from zero.run_folder import (
    CHECKPOINTS_FOLDER,
    CONFIG_FILE,
    MAP_FILE,
    MODEL_FOLDER,
    SUMMARY_FILE,
    check_own_files,
    check_run_folder,
    forget_metrics_after,
    held_run_folder,
    set_aside_earlier_run,
)
from zero.run_result import RunResult
from zero.setup import make_device
from zero.stopping import StopRequest
from zero.train_step import StepResult, train_step
from zero.updating import share_cores

logger = logging.getLogger("zero")

_PICTURED_STEP = 3
"""The step whose memory map is kept: the first two warm up and settle."""


class Trainer:
    """One run of a config.

    Everything that can be refused is refused in the constructor, before a byte is written: the config, the data, the
    trackers, and a model that cannot fit.

    Args:
        config: of the run.
        stop: whether a signal has asked the run to stop, if somebody listens already.

    Raises:
        UserError, DataError, DoesNotFitError: with what to do.
    """

    def __init__(self, config: Config, stop: StopRequest | None = None) -> None:
        config.require_model()
        config.require_data()
        check_trackers(config.train.report_to)
        self.config = config
        self._ranks = Ranks(join_ranks(config))
        self.output_dir = Path(config.run_folder)
        check_run_folder(self.output_dir)
        check_own_files(self.output_dir, config.source, config.model.name_or_path)
        check_codecarbon(config.cost.energy)
        self._device = make_device(config)
        self._cost = RunCost(config.cost, self._ranks, self._device.torch_device)
        self.tokenizer = build_tokenizer(config)
        transformers_config = model_config(config, self.tokenizer)
        vocab_size = getattr(transformers_config.get_text_config(), "vocab_size", None)
        self.data: DataBundle = build_dataloaders(
            config, self.tokenizer, max_positions(transformers_config), vocab_size, self._ranks.rank, self._ranks.size
        )
        self._health = HealthWatch(config.train.spike_factor, config.train.max_skipped_steps)
        self._stop = stop or StopRequest()
        self.planned = self._plan()
        self._result = RunResult()
        self._progress = Progress()
        self._checkpoints = RunCheckpoints(
            config,
            self.output_dir / CHECKPOINTS_FOLDER,
            self._ranks,
            self.data,
            self._health,
            self._progress,
            self.tokenizer,
        )

    def _plan(self) -> PlannedRun | None:
        """The plan, if the model can be walked through."""
        evaluated, evaluation_shape = self.data.eval_dataset, None
        if evaluated is not None:
            rows = min(self.config.train.per_device_eval_batch_size, len(evaluated))
            evaluation_shape = (rows, evaluated.longest)
        try:
            planned = plan_run(
                self.config,
                self._device,
                self.tokenizer,
                evaluation_shape=evaluation_shape,
                num_ranks=self._ranks.size,
                num_local_ranks=self._ranks.num_local,
            )
        except CannotWalkError as error:
            logger.info("this model cannot be walked through without data (%s); its warm-up will tell", error)
            return None
        planned.require()
        return planned

    # -- the run -----------------------------------------------------------------------------------------------------

    def run(self) -> RunResult:
        """Trains, evaluates before and after, writes the run folder."""
        started_s = time.perf_counter()
        config = self.config
        if config.train.deterministic:
            torch.use_deterministic_algorithms(True)
        model = build_model(config, self.tokenizer)
        optimizer = build_optimizer(model, config)
        num_steps = self._num_steps()
        scheduler = build_scheduler(optimizer, config, num_steps)
        engine, *_ = initialize(
            model, optimizer, lr_scheduler=scheduler, config=for_trainer(config), device=self._device
        )
        share_cores(engine.optimizer, config.data)
        torch.manual_seed(config.train.seed + self._ranks.rank)  # each rank drops out other elements
        resumed_from = self._checkpoints.resume(engine, scheduler)
        folder = held_run_folder(self.output_dir) if self._ranks.is_first else contextlib.nullcontext()
        with folder, self._cost, self._begun(), self._stop.listening(), self._finishing_saves(engine):
            self._run_in_folder(engine, scheduler, num_steps, resumed_from, started_s)
        engine.close(keep_values=False)
        return self._result

    @contextlib.contextmanager
    def _finishing_saves(self, engine: Engine) -> Iterator[None]:
        """A run that breaks off leaves the checkpoint that is being written complete; the first error is the one said."""
        try:
            yield
        except BaseException as error:
            if isinstance(error, KeyboardInterrupt) and self._ranks.is_first:
                logger.warning(
                    "interrupted at step %d: nothing since the last checkpoint is kept (SIGTERM would have saved first)",
                    self._progress.step,
                )
            if self._ranks.size == 1:  # with others the save may wait for the one that failed
                with contextlib.suppress(Exception):
                    engine.synchronize()
            raise

    @contextlib.contextmanager
    def _begun(self) -> Iterator[None]:
        """From here on something is written: what goes wrong is no refusal any more, but a run that failed."""
        try:
            yield
        except (UserError, DoesNotFitError) as error:
            raise TrainingStopped(str(error)) from error
        except OSError as error:
            raise TrainingStopped(
                f"stopped at step {self._progress.step}: {error}. Checkpoints in {self.output_dir / CHECKPOINTS_FOLDER} "
                "still stand: see to the cause and go on with train.resume_from_checkpoint = true"
            ) from error

    def _run_in_folder(
        self, engine: Engine, scheduler: Any, num_steps: int, resumed_from: Path | None, started_s: float
    ) -> None:
        train, rank = self.config.train, self._ranks.rank
        if self._ranks.is_first:
            self._open_folder(resumed_from)
        engine.meet("the run folder")
        with (
            make_reporter(logging_steps=train.logging_steps, rank=rank) as reporter,
            MetricsWriter(
                self.output_dir,
                rank=rank,
                trackers=train.report_to,
                run_name=self.output_dir.name,
                config=self.config.model_dump(mode="json"),
            ) as metrics,
        ):
            self._announce(reporter, engine, num_steps)
            if self._checkpoints.are_wanted:
                where = f"resumed from {resumed_from} at step {self._progress.step}"
                reporter.message(where if resumed_from else "no checkpoint to resume from: starting anew")
            if self._progress.step >= num_steps:
                reporter.message(f"nothing is left to train: step {self._progress.step} of {num_steps}")
            self._loop(engine, scheduler, num_steps, reporter, metrics)
            self._finish(engine, reporter, started_s)

    def _open_folder(self, resumed_from: Path | None) -> None:
        """The first thing that is written; everything that can be refused has been by now."""
        if resumed_from is not None and resumed_from.resolve().is_relative_to(self.output_dir.resolve()):
            self._cost.open(self.output_dir)
            forget_metrics_after(self.output_dir, self._progress.step)
        else:
            aside = set_aside_earlier_run(self.output_dir)
            if aside is not None:
                logger.info("%s held an earlier run, which is now in %s", self.output_dir, aside)
            self._cost.open(self.output_dir)
        (self.output_dir / CONFIG_FILE).write_text(to_toml(self.config), encoding="utf-8")

    def _num_steps(self) -> int:
        train = self.config.train
        if train.max_steps > 0:
            return train.max_steps
        per_epoch = math.ceil(len(self.data.train_loader) / train.gradient_accumulation_steps)
        return max(1, math.ceil(per_epoch * train.num_train_epochs))

    def _announce(self, reporter: Reporter, engine: Engine, num_steps: int) -> None:
        config, manager = self.config, engine.manager
        facts = engine.facts
        self._result.model_data_bytes = sum(f.value_bytes + f.companion_bytes for f in facts)
        num_parameters = sum(chunk.numel for chunk in manager.chunks)
        num_trained = sum(
            chunk.numel for chunk, fact in zip(manager.chunks, facts, strict=True) if fact.companion_bytes_per_numel
        )
        trained = "" if num_trained == num_parameters else f", {num_trained:,} of them trained,"
        rows = {
            "model": f"{num_parameters:,} parameters{trained} in {len(facts)} chunks, {config.precision.dtype}",
            "device": f"{manager.device.name}, {format_bytes(manager.device.capacity_bytes)}",
            "model data": f"{format_bytes(self._result.model_data_bytes)} (parameters, gradients, optimizer states)",
            "policy": config.memory.policy,
            "steps": f"{num_steps}, micro-batch {config.train.per_device_train_batch_size} x "
            f"{config.train.gradient_accumulation_steps}",
            "run folder": str(self.output_dir),
        }
        if self._ranks.size > 1:
            rows["ranks"] = f"{self._ranks.size}; figures of memory are rank 0's"
        if self.planned is not None and self.planned.plan is not None:
            predicted_bytes = self.planned.plan.predicted_device_peak_bytes
            self._result.dry_run_device_peak_bytes = predicted_bytes
            rows["predicted"] = f"device peak {format_bytes(predicted_bytes)}, before anything ran"
        reporter.header(rows)
        for line in self.data.summary:
            reporter.message(line)
        reporter.message("one training sample (what is masked is not learnt):")
        reporter.message(describe_sample(self.data.train_dataset[0], self.tokenizer).plain)

    # -- the loop ----------------------------------------------------------------------------------------------------

    def _loop(self, engine: Engine, scheduler: Any, num_steps: int, reporter: Reporter, metrics: MetricsWriter) -> None:
        train, progress = self.config.train, self._progress
        recorder = StepRecorder(engine.manager)
        progress.stopped_by = self._asked_to_stop()
        if progress.eval_perplexity_before is None and progress.stopped_by is None:
            progress.eval_perplexity_before = self._evaluate(engine, reporter, metrics, "before")
            progress.stopped_by = self._asked_to_stop()
        engine.train()
        windows = self._windows()
        # Asked before a window is drawn: what is drawn counts as delivered in the checkpoint, so a run that is
        # extended later would leave it out.
        while progress.step < num_steps and progress.stopped_by is None:
            window = next(windows)
            pictured = progress.step + 1 == min(_PICTURED_STEP, num_steps) and self._ranks.is_first
            if pictured:
                recorder.start()
            record = self._step(engine, scheduler, window, num_steps)
            if pictured:
                recorder.step_ended()
                recorder.stop()
                self._draw(recorder, engine)
            reporter.step(record)
            metrics.log_step(record)
            if self._health.is_hopeless:
                left_at = progress.step
                reporter.message(self._checkpoints.go_back(engine, scheduler))
                self._cost.ledger.go_back(progress.step)
                metrics.log({"rollback_from": left_at, "lr_factor": progress.lr_factor}, step=progress.step)
                windows = self._windows()
                continue
            if progress.step % train.save_steps == 0 and progress.step < num_steps and progress.stopped_by is None:
                self._checkpoints.save(engine, scheduler, asynchronous=True)
            if train.eval_steps and progress.step % train.eval_steps == 0 and progress.step < num_steps:
                self._evaluate(engine, reporter, metrics, f"step {progress.step}")
        if progress.step >= num_steps:
            progress.stopped_by = None  # it is done all the same
        if progress.step and self._health.num_bad >= progress.step and progress.stopped_by is None:
            raise self._checkpoints.stopped("every step was skipped")
        self._checkpoints.save(engine, scheduler)
        if progress.stopped_by is None:
            self._result.eval_perplexity_after = self._evaluate(engine, reporter, metrics, "after")

    def _asked_to_stop(self) -> str | None:
        """The signal that has asked some rank to stop before a step was made; each step asks by itself."""
        signals = self._ranks.gather(self._stop.signal_name, "looking for signals")
        return next((name for name in signals if name is not None), None)

    def _windows(self) -> Iterator[list[dict[str, torch.Tensor]]]:
        """Micro-batches of one optimizer step each, epoch after epoch; an epoch's last window may be shorter."""
        while True:
            window: list[dict[str, torch.Tensor]] = []
            delivered = False
            for batch in self.data.train_loader:
                delivered = True
                window.append(batch)
                if len(window) == self.config.train.gradient_accumulation_steps:
                    yield window
                    window = []
            if window:
                yield window
            if not delivered:
                raise UserError("data: the training data gave no batch")

    def _step(
        self, engine: Engine, scheduler: Any, window: list[dict[str, torch.Tensor]], num_steps: int
    ) -> StepRecord:
        """One optimizer step, on all ranks together."""
        started_s = time.perf_counter()
        lr = float(engine.optimizer.param_groups[0]["lr"]) if engine.optimizer is not None else 0.0
        loss_scale = engine.loss_scale
        done = train_step(engine, window, self._ranks, self._health, self._stop)
        if not engine.skipped_last_step:
            scheduler.step()
        step_s = time.perf_counter() - started_s
        self._note(engine, done, step_s)
        return self._record(engine, done, lr, loss_scale, step_s, num_steps)

    def _note(self, engine: Engine, done: StepResult, step_s: float) -> None:
        progress = self._progress
        progress.step += 1
        progress.seen_tokens += done.num_tokens
        progress.training_s += step_s
        self._cost.note(progress.step, step_s, engine.skipped_last_step)
        progress.losses.append(done.loss)
        progress.stopped_by = done.stop_signal
        if done.problem is not None:
            logger.warning("step %d skipped: %s", progress.step, done.problem)
        # An overflow of fp16 is mended by a lower loss scale, as long as there is one.
        beyond_repair = engine.skipped_last_step and (done.problem is not None or engine.scaler.at_floor)
        if beyond_repair or not engine.skipped_last_step:
            self._health.note(progress.step, done.loss, bad=beyond_repair)

    def _record(
        self,
        engine: Engine,
        done: StepResult,
        lr: float,
        loss_scale: float,
        step_s: float,
        num_steps: int,
    ) -> StepRecord:
        report = engine.memory_report()
        if report.predicted_device_peak_bytes:  # 0 while an evaluation, say, has set the plan aside
            self._result.predicted_device_peak_bytes = report.predicted_device_peak_bytes
        return StepRecord(
            step=self._progress.step,
            num_steps=num_steps,
            epoch=self.data.train_loader.epochs_done,
            loss=done.loss,
            lr=lr,
            grad_norm=engine.grad_norm,
            loss_scale=loss_scale if self.config.precision.dtype == "fp16" else None,
            tokens=done.num_tokens,
            tokens_per_s=done.num_tokens / step_s,
            step_s=step_s,
            device_bytes=engine.last_step_peak_bytes,
            device_peak_bytes=report.device_peak_bytes,
            device_capacity_bytes=report.device_capacity_bytes,
            host_bytes=report.host_bytes,
            pinned_bytes=report.pinned_bytes,
            num_fetches=report.num_fetches,
            num_evictions=report.num_evictions,
            h2d_bytes=report.h2d_bytes,
            d2h_bytes=report.d2h_bytes,
            skipped=engine.skipped_last_step,
        )

    # -- beside the loop ---------------------------------------------------------------------------------------------

    def _evaluate(self, engine: Engine, reporter: Reporter, metrics: MetricsWriter, when: str) -> float | None:
        if self.data.eval_loader is None:
            return None
        try:
            loss, num_tokens = evaluate(engine, self.data.eval_loader)
        except torch.OutOfMemoryError as error:
            batch_size = self.config.train.per_device_eval_batch_size
            raise TrainingStopped(
                f"an evaluation batch does not fit the device ({error}). Lower train.per_device_eval_batch_size = "
                f"{batch_size}, or data.seq_length, or raise device.memory"
            ) from error
        engine.manager.reset_counters()  # they are those of a training step
        value = perplexity(loss)
        self._result.num_eval_tokens = num_tokens
        reporter.message(f"held-out perplexity {when}: {value:.3f} (loss {loss:.4f}, {num_tokens:,} tokens)")
        metrics.log({"eval_loss": loss, "eval_perplexity": value}, step=self._progress.step)
        return value

    def _draw(self, recorder: StepRecorder, engine: Engine) -> None:
        try:
            draw_memory_map(
                recorder.samples,
                self.output_dir / MAP_FILE,
                capacity_bytes=engine.device.capacity_bytes,
                predicted_peak_bytes=engine.plan.predicted_device_peak_bytes or None,
                title=f"Step {self._progress.step}: policy {engine.plan.policy}",
            )
        except OSError as error:  # a picture is not worth a run
            logger.warning("no memory map: %s", error)

    def _finish(self, engine: Engine, reporter: Reporter, started_s: float) -> None:
        cost = self._cost.finish()
        if self._progress.stopped_by is not None:
            reporter.message(
                f"stopped by {self._progress.stopped_by} at step {self._progress.step}, saved in "
                f"{self.output_dir / CHECKPOINTS_FOLDER}; go on with train.resume_from_checkpoint = true"
            )
            if cost is not None:
                reporter.message(values_text(cost.rows()))
            return
        folder = self.output_dir / MODEL_FOLDER
        engine.save_pretrained(folder)
        if not self._ranks.is_first:
            return
        self.tokenizer.save_pretrained(folder)
        report, result, progress = engine.memory_report(), self._result, self._progress
        result.num_steps = progress.step
        result.eval_perplexity_before = progress.eval_perplexity_before
        result.num_skipped_steps = engine.num_skipped_steps
        result.train_loss_first = progress.losses[0] if progress.losses else None
        result.train_loss_last = progress.losses[-1] if progress.losses else None
        result.tokens_per_s = progress.seen_tokens / progress.training_s if progress.training_s else 0.0
        result.device_capacity_bytes = report.device_capacity_bytes
        result.device_peak_bytes = report.device_peak_bytes
        result.host_bytes = report.host_bytes
        result.pinned_bytes = report.pinned_bytes
        result.wall_s = time.perf_counter() - started_s
        result.cost = None if cost is None else cost.as_json()
        summary = self.output_dir / SUMMARY_FILE
        if progress.losses or not summary.exists():  # a resume that found nothing to do has measured nothing
            summary.write_text(json.dumps(vars(result), indent=2) + "\n", encoding="utf-8")
        rows = result.rows(folder, self.output_dir / MAP_FILE)
        reporter.summary(rows if cost is None else [*rows, *cost.rows()])
