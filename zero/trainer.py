"""``zero train``: a run from a config, start to folder."""

from __future__ import annotations

import contextlib
import json
import logging
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from gemini.manager import Phase
from gemini.plan import DoesNotFitError
from gemini.units import format_bytes
from zero.config.describe import to_toml
from zero.config.schema import Config
from zero.data.loaders import DataBundle, build_dataloaders
from zero.data.preview import describe_sample
from zero.dryrun import CannotWalkError
from zero.engine import Engine
from zero.errors import UserError
from zero.evaluate import evaluate, num_loss_tokens, perplexity
from zero.initializer import initialize
from zero.models.build import build_model, build_tokenizer, max_positions, model_config
from zero.optimizers import build_optimizer, build_scheduler, set_rates
from zero.planning import PlannedRun, plan_run
from zero.report.console import Reporter, make_reporter
from zero.report.memory_map import draw_memory_map
from zero.report.metrics import MetricsWriter
from zero.report.record import StepRecord
from zero.report.recorder import StepRecorder
from zero.report.trackers import check_trackers
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
from zero.setup import make_device

logger = logging.getLogger("zero")

_PICTURED_STEP = 3
"""The step whose memory map is kept: the first two warm up and settle."""


class TrainingStopped(RuntimeError):
    """The run cannot go on; says why and what to do."""


@dataclass
class RunResult:
    """What a run achieved, as written to ``summary.json``."""

    num_steps: int = 0
    num_skipped_steps: int = 0
    eval_perplexity_before: float | None = None
    eval_perplexity_after: float | None = None
    num_eval_tokens: int = 0
    train_loss_first: float | None = None
    train_loss_last: float | None = None
    tokens_per_s: float = 0.0
    device_capacity_bytes: int = 0
    device_peak_bytes: int = 0
    predicted_device_peak_bytes: int = 0
    dry_run_device_peak_bytes: int | None = None
    host_bytes: int = 0
    pinned_bytes: int = 0
    model_data_bytes: int = 0
    wall_s: float = 0.0


@dataclass
class _Progress:
    step: int = 0
    consecutive_skips: int = 0
    seen_tokens: int = 0
    training_s: float = 0.0
    losses: list[float] = field(default_factory=list)


class Trainer:
    """One run of a config.

    Everything that can be refused is refused in the constructor, before a byte is written: the config, the data, the
    trackers, and a model that cannot fit.

    Raises:
        UserError, DataError, DoesNotFitError: with what to do.
    """

    def __init__(self, config: Config) -> None:
        config.require_model()
        config.require_data()
        check_trackers(config.train.report_to)
        if config.parallel.world_size > 1:
            raise UserError("parallel: this version trains in one process; remove [parallel] or set its sizes to 1")
        self.config = config
        self.output_dir = Path(config.run_folder)
        check_run_folder(self.output_dir)
        check_own_files(self.output_dir, config.source, config.model.name_or_path)
        self._device = make_device(config)
        self.tokenizer = build_tokenizer(config)
        transformers_config = model_config(config, self.tokenizer)
        vocab_size = getattr(transformers_config.get_text_config(), "vocab_size", None)
        self.data: DataBundle = build_dataloaders(
            config, self.tokenizer, max_positions(transformers_config), vocab_size
        )
        self.planned = self._plan()
        self._result = RunResult()
        self._progress = _Progress()

    def _plan(self) -> PlannedRun | None:
        """The plan, if the model can be walked through."""
        evaluated, evaluation_shape = self.data.eval_dataset, None
        if evaluated is not None:
            rows = min(self.config.train.per_device_eval_batch_size, len(evaluated))
            evaluation_shape = (rows, evaluated.longest)
        try:
            planned = plan_run(self.config, self._device, self.tokenizer, evaluation_shape=evaluation_shape)
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
        engine, *_ = initialize(model, optimizer, lr_scheduler=scheduler, config=config, device=self._device)
        torch.manual_seed(config.train.seed)
        resumed_from = self._resume(engine, scheduler)
        with held_run_folder(self.output_dir), self._begun():
            self._run_in_folder(engine, scheduler, num_steps, resumed_from, started_s)
        engine.close()
        return self._result

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
        config = self.config
        self._open_folder(resumed_from)
        with (
            make_reporter(logging_steps=config.train.logging_steps) as reporter,
            MetricsWriter(
                self.output_dir,
                trackers=config.train.report_to,
                run_name=self.output_dir.name,
                config=config.model_dump(mode="json"),
            ) as metrics,
        ):
            self._announce(reporter, engine, num_steps)
            if config.train.resume_from_checkpoint:
                where = f"resumed from {resumed_from} at step {self._progress.step}"
                reporter.message(where if resumed_from else "no checkpoint to resume from: starting anew")
            if self._progress.step >= num_steps:
                reporter.message(f"nothing is left to train: step {self._progress.step} of {num_steps}")
            self._loop(engine, scheduler, num_steps, reporter, metrics)
            self._finish(engine, reporter, started_s)

    def _open_folder(self, resumed_from: Path | None) -> None:
        """The first thing that is written; everything that can be refused has been by now."""
        if resumed_from is not None and resumed_from.resolve().is_relative_to(self.output_dir.resolve()):
            forget_metrics_after(self.output_dir, self._progress.step)
        else:
            aside = set_aside_earlier_run(self.output_dir)
            if aside is not None:
                logger.info("%s held an earlier run, which is now in %s", self.output_dir, aside)
        (self.output_dir / CONFIG_FILE).write_text(to_toml(self.config), encoding="utf-8")

    def _checkpoints(self) -> Path | None:
        """The checkpoint to resume from, or the folder that holds some; None to start anew."""
        from zero.checkpoint import find_latest

        wish = self.config.train.resume_from_checkpoint
        if not wish:
            return None
        if isinstance(wish, str):
            return Path(wish)
        folder = self.output_dir / CHECKPOINTS_FOLDER
        return folder if find_latest(folder) is not None else None

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
        rows = {
            "model": f"{sum(f.numel for f in facts):,} parameters in {len(facts)} chunks, {config.precision.dtype}",
            "device": f"{manager.device.name}, {format_bytes(manager.device.capacity_bytes)}",
            "model data": f"{format_bytes(self._result.model_data_bytes)} (parameters, gradients, optimizer states)",
            "policy": config.memory.policy,
            "steps": f"{num_steps}, micro-batch {config.train.per_device_train_batch_size} x "
            f"{config.train.gradient_accumulation_steps}",
            "run folder": str(self.output_dir),
        }
        if self.planned is not None and self.planned.plan is not None:
            predicted_bytes = self.planned.plan.predicted_device_peak_bytes
            self._result.dry_run_device_peak_bytes = predicted_bytes
            rows["predicted"] = f"device peak {format_bytes(predicted_bytes)}, before anything ran"
        reporter.header(rows)
        for line in self.data.summary:
            reporter.message(line)
        reporter.message("one training sample (what is masked is not learnt):")
        reporter.message(describe_sample(self.data.train_dataset[0], self.tokenizer).plain)

    def _resume(self, engine: Engine, scheduler: Any) -> Path | None:
        """Goes to where a checkpoint was taken, if one is wanted and there; returns its folder."""
        folder = self._checkpoints()
        if folder is None:
            return None
        from zero.checkpoint import load_checkpoint

        loaded = load_checkpoint(engine, folder, lr_scheduler=scheduler)
        if loaded.extra is None or "data" not in loaded.extra:
            raise UserError(f"{loaded.path}: not written by `zero train`, so it does not say where in the data it was")
        set_rates(scheduler)
        self._progress.step = int(loaded.extra["step"])
        self.data.train_loader.load_state_dict(loaded.extra["data"])
        self._result.eval_perplexity_before = loaded.extra.get("eval_perplexity_before")
        return loaded.path

    # -- the loop ----------------------------------------------------------------------------------------------------

    def _loop(self, engine: Engine, scheduler: Any, num_steps: int, reporter: Reporter, metrics: MetricsWriter) -> None:
        train = self.config.train
        recorder = StepRecorder(engine.manager)
        if self._result.eval_perplexity_before is None:
            self._result.eval_perplexity_before = self._evaluate(engine, reporter, metrics, "before")
        engine.train()
        windows = self._windows()
        # Asked before a window is drawn: what is drawn counts as delivered in the checkpoint, so a run that is
        # extended later would leave it out.
        while self._progress.step < num_steps:
            window = next(windows)
            pictured = self._progress.step + 1 == min(_PICTURED_STEP, num_steps)
            if pictured:
                recorder.start()
            record = self._step(engine, scheduler, window, num_steps)
            if pictured:
                recorder.step_ended()
                recorder.stop()
                self._draw(recorder, engine)
            reporter.step(record)
            metrics.log_step(record)
            if self._progress.step % train.save_steps == 0 and self._progress.step < num_steps:
                self._save(engine, scheduler)
            if train.eval_steps and self._progress.step % train.eval_steps == 0 and self._progress.step < num_steps:
                self._evaluate(engine, reporter, metrics, f"step {self._progress.step}")
        if self._progress.losses and self._progress.consecutive_skips == len(self._progress.losses):
            self._stop_if_hopeless(engine)
        self._save(engine, scheduler)
        self._result.eval_perplexity_after = self._evaluate(engine, reporter, metrics, "after")

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
        """One optimizer step: each micro-batch weighs as many tokens as its loss counts."""
        started_s = time.perf_counter()
        counts = [num_loss_tokens(batch["labels"]) for batch in window]
        lr = float(engine.optimizer.param_groups[0]["lr"]) if engine.optimizer is not None else 0.0
        loss_scale = engine.loss_scale
        loss_sum = 0.0
        engine.zero_grad()
        for position, (batch, count) in enumerate(zip(window, counts, strict=True)):
            if position == len(window) - 1:
                engine.end_of_loader()  # the window is complete, however many micro-batches it has
            if count:
                loss = engine(**batch).loss
                loss_sum += float(loss.detach()) * count
                engine.backward(loss * (count / sum(counts)), scale_by_accumulation=False)
            engine.step()
        if not engine.skipped_last_step:
            scheduler.step()
        step_s = time.perf_counter() - started_s
        loss_value = loss_sum / max(1, sum(counts))
        self._note(engine, loss_value, sum(int(batch["input_ids"].numel()) for batch in window), step_s)
        return self._record(engine, loss_value, lr, loss_scale, step_s, window, num_steps)

    def _note(self, engine: Engine, loss: float, num_tokens: int, step_s: float) -> None:
        progress = self._progress
        progress.step += 1
        progress.seen_tokens += num_tokens
        progress.training_s += step_s
        progress.losses.append(loss)
        progress.consecutive_skips = progress.consecutive_skips + 1 if engine.skipped_last_step else 0
        if progress.consecutive_skips >= self.config.train.max_skipped_steps:
            self._stop_if_hopeless(engine)

    def _stop_if_hopeless(self, engine: Engine) -> None:
        """Steps were skipped for long enough: goes on only where a lower loss scale may still mend it."""
        progress = self._progress
        if engine.scaler.at_floor:
            raise TrainingStopped(
                f"{progress.consecutive_skips} steps in a row had a loss or gradient that is not finite (step "
                f"{progress.step}, loss {progress.losses[-1]}); no update was made in them. Lower optimizer.lr, set "
                "train.max_grad_norm, use precision.dtype = bf16, or see whether the model's weights are finite"
            )

    def _record(
        self,
        engine: Engine,
        loss: float,
        lr: float,
        loss_scale: float,
        step_s: float,
        window: list[dict[str, torch.Tensor]],
        num_steps: int,
    ) -> StepRecord:
        report = engine.memory_report()
        if report.predicted_device_peak_bytes:  # 0 while an evaluation, say, has set the plan aside
            self._result.predicted_device_peak_bytes = report.predicted_device_peak_bytes
        num_tokens = sum(int(batch["input_ids"].numel()) for batch in window)
        per_epoch = math.ceil(len(self.data.train_loader) / self.config.train.gradient_accumulation_steps)
        return StepRecord(
            step=self._progress.step,
            num_steps=num_steps,
            epoch=self._progress.step / max(1, per_epoch),
            loss=loss,
            lr=lr,
            grad_norm=engine.grad_norm,
            loss_scale=loss_scale if self.config.precision.dtype == "fp16" else None,
            tokens=num_tokens,
            tokens_per_s=num_tokens / step_s,
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

    def _save(self, engine: Engine, scheduler: Any) -> None:
        if engine.manager.phase is not Phase.IDLE:
            raise RuntimeError("a checkpoint can only be taken between passes")
        extra = {
            "data": self.data.train_loader.state_dict(),
            "eval_perplexity_before": self._result.eval_perplexity_before,
            "step": self._progress.step,
        }
        from zero.checkpoint import save_checkpoint

        save_checkpoint(
            engine,
            self.output_dir / CHECKPOINTS_FOLDER,
            extra=extra,
            lr_scheduler=scheduler,
            save_total_limit=self.config.train.save_total_limit,
            tokenizer=self.tokenizer,
        )

    def _finish(self, engine: Engine, reporter: Reporter, started_s: float) -> None:
        folder = self.output_dir / MODEL_FOLDER
        engine.save_pretrained(folder)
        self.tokenizer.save_pretrained(folder)
        report, result, progress = engine.memory_report(), self._result, self._progress
        result.num_steps = progress.step
        result.num_skipped_steps = engine.num_skipped_steps
        result.train_loss_first = progress.losses[0] if progress.losses else None
        result.train_loss_last = progress.losses[-1] if progress.losses else None
        result.tokens_per_s = progress.seen_tokens / progress.training_s if progress.training_s else 0.0
        result.device_capacity_bytes = report.device_capacity_bytes
        result.device_peak_bytes = report.device_peak_bytes
        result.host_bytes = report.host_bytes
        result.pinned_bytes = report.pinned_bytes
        result.wall_s = time.perf_counter() - started_s
        summary = self.output_dir / SUMMARY_FILE
        if progress.losses or not summary.exists():  # a resume that found nothing to do has measured nothing
            summary.write_text(json.dumps(vars(result), indent=2) + "\n", encoding="utf-8")
        reporter.summary(self._summary_rows(folder))

    def _summary_rows(self, folder: Path) -> list[tuple[str, str]]:
        result = self._result
        rows = []
        if result.eval_perplexity_before is not None and result.eval_perplexity_after is not None:
            rows.append(
                (
                    "held-out perplexity",
                    f"{result.eval_perplexity_before:.2f} before, {result.eval_perplexity_after:.2f} after "
                    f"({result.num_eval_tokens:,} tokens)",
                )
            )
        rows += [
            ("model data", f"{format_bytes(result.model_data_bytes)}"),
            ("device capacity", format_bytes(result.device_capacity_bytes)),
        ]
        if result.predicted_device_peak_bytes:  # a plan was made: not where the first step was the last
            rows.append(("device peak, predicted", format_bytes(result.predicted_device_peak_bytes)))
        rows += [
            ("device peak, measured", format_bytes(result.device_peak_bytes)),
            ("host", f"{format_bytes(result.host_bytes)}, of it pinned {format_bytes(result.pinned_bytes)}"),
            ("steps", f"{result.num_steps}, of them skipped {result.num_skipped_steps}"),
            ("speed", f"{result.tokens_per_s:,.0f} tokens/s, {result.wall_s:.0f} s in all"),
            ("model folder", str(folder)),
        ]
        if (self.output_dir / MAP_FILE).is_file():
            rows.append(("memory map", str(self.output_dir / MAP_FILE)))
        return rows
