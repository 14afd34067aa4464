"""The checkpoints of a run: written, gone on from, and gone back to when training has lost its way."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import psutil

from gemini.manager import Phase
from zero.checkpoint import LoadedState, find_latest, load_checkpoint, save_checkpoint, verify
from zero.checkpoint.finding import STATE, list_candidates, read_json
from zero.checkpoint.problems import DamagedError
from zero.config.schema import Config
from zero.data.loaders import DataBundle
from zero.engine import Engine
from zero.errors import UserError
from zero.health import HealthWatch
from zero.optimizers import set_rates
from zero.progress import Progress, TrainingStopped
from zero.ranks import Ranks
from zero.run_folder import CONFIG_FILE

_HEALTHY = "healthy"
"""Key of a checkpoint's ``extra``: whether its last step was good, and the loss scale no lower than 1."""


class RunCheckpoints:
    """Saves and restores everything of a run.

    Args:
        config: of the run.
        folder: that holds its checkpoints.
        ranks: of the run; all call the same methods.
        data: whose place is saved.
        health: of the training.
        progress: of the run, brought to where a checkpoint was.
        tokenizer: for an export of a checkpoint.
    """

    def __init__(
        self,
        config: Config,
        folder: Path,
        ranks: Ranks,
        data: DataBundle,
        health: HealthWatch,
        progress: Progress,
        tokenizer: Any,
    ) -> None:
        self._config = config
        self.folder = folder
        self._ranks = ranks
        self._data = data
        self._health = health
        self._progress = progress
        self._tokenizer = tokenizer

    def save(self, engine: Engine, scheduler: Any, asynchronous: bool = False) -> None:
        """Writes a checkpoint of this moment.

        Raises:
            CheckpointError: it could not be written; older ones stand.
        """
        if engine.manager.phase is not Phase.IDLE:
            raise RuntimeError("a checkpoint can only be taken between passes")
        progress = self._progress
        extra = {
            "data": self._data.train_loader.state_dict(),
            "eval_perplexity_before": progress.eval_perplexity_before,
            "step": progress.step,
            "num_rollbacks": progress.num_rollbacks,
            "lr_factor": progress.lr_factor,
            "health": self._health.state_dict(),
            _HEALTHY: self._health.is_healthy and (not engine.scaler.enabled or engine.scaler.scale >= 1.0),
        }
        save_checkpoint(
            engine,
            self.folder,
            extra=extra,
            lr_scheduler=scheduler,
            save_total_limit=self._config.train.save_total_limit,
            tokenizer=self._tokenizer,
            asynchronous=asynchronous,
        )

    # -- going on ----------------------------------------------------------------------------------------------------

    @property
    def are_wanted(self) -> bool:
        """Whether to go on from one: the user asks for it, or the ranks were started again after a failure."""
        return bool(self._config.train.resume_from_checkpoint) or _num_restarts() > 0

    def resume(self, engine: Engine, scheduler: Any) -> Path | None:
        """Goes to where a checkpoint was taken, if one is wanted and there; returns its folder."""
        source = self._source() if self.are_wanted else None
        if source is None:
            return None
        loaded = load_checkpoint(engine, source, lr_scheduler=scheduler)
        extra = self._take_up(engine, scheduler, loaded)
        self._data.train_loader.load_state_dict(extra["data"])
        self._progress.eval_perplexity_before = extra.get("eval_perplexity_before")
        return loaded.path

    def _source(self) -> Path | None:
        """The checkpoint to resume from, or the folder that holds some; None to start anew."""
        found = self._ranks.gather(self._own_are_there() if self._ranks.is_first else None, "looking for a checkpoint")
        if found[0]:
            return self.folder
        wish = self._config.train.resume_from_checkpoint
        return Path(wish) if isinstance(wish, str) else None

    def _own_are_there(self) -> bool:
        """Whether there is something to go on from that this run has written, and not what the user names instead.

        Ranks that were started again go on with what the same launch has done, and with nothing else that lies in the
        folder: an earlier run there has other settings, as far as anybody knows.
        """
        restarted = _num_restarts() > 0
        is_ours = restarted and _written_since_launch(self.folder.parent / CONFIG_FILE)
        wish = self._config.train.resume_from_checkpoint
        if not is_ours and (isinstance(wish, str) or not wish):
            return False
        return find_latest(self.folder) is not None

    def _take_up(self, engine: Engine, scheduler: Any, loaded: LoadedState) -> dict[str, Any]:
        """What a checkpoint of a run knows beside the engine's state."""
        extra = loaded.extra
        if extra is None or "data" not in extra:
            raise UserError(f"{loaded.path}: not written by `zero train`, so it does not say where in the data it was")
        set_rates(scheduler)
        progress = self._progress
        progress.step, progress.num_rollbacks = int(extra["step"]), int(extra["num_rollbacks"])
        progress.lr_factor = float(extra["lr_factor"])
        self._health.load_state_dict(extra["health"])
        _scale_rates(engine, scheduler, progress.lr_factor)
        self._tighten(engine)
        return extra

    def _tighten(self, engine: Engine) -> None:
        """After going back gradients are clipped to a smaller norm, if that was asked for."""
        tighter = self._config.train.rollback_max_grad_norm
        if self._progress.num_rollbacks and tighter is not None:
            engine.max_grad_norm = min(tighter, engine.max_grad_norm or tighter)

    # -- going back --------------------------------------------------------------------------------------------------

    def go_back(self, engine: Engine, scheduler: Any) -> str:
        """To the newest healthy checkpoint, leaving out the data since, with a lower rate.

        Returns:
            What was done, for a person.

        Raises:
            TrainingStopped: there is none, or the run has gone back often enough.
        """
        train, progress = self._config.train, self._progress
        engine.synchronize()
        found = find_healthy(self.folder, self._health.last_good_step) if self._ranks.is_first else None
        path = self._ranks.gather(None if found is None else str(found), "looking for a healthy checkpoint")[0]
        if progress.num_rollbacks >= train.max_rollbacks:
            raise self.stopped(f"the run has gone back train.max_rollbacks = {train.max_rollbacks} times")
        if path is None:
            raise self.stopped("there is no healthy checkpoint to go back to")
        left_at, num_rollbacks = progress.step, progress.num_rollbacks + 1
        wanted, place = progress.lr_factor * train.rollback_lr_factor, self._data.train_loader.state_dict()
        loaded = load_checkpoint(engine, Path(path), lr_scheduler=scheduler)
        self._take_up(engine, scheduler, loaded)
        # The rate may have been lowered since this checkpoint was written, and is lowered once more now.
        _scale_rates(engine, scheduler, wanted / progress.lr_factor)
        progress.num_rollbacks, progress.lr_factor = num_rollbacks, wanted
        self._tighten(engine)
        self._data.train_loader.load_state_dict(place)
        self._health.start_anew()
        self.save(engine, scheduler)  # a run that is stopped now must not forget that it went back
        return (
            f"step {left_at}: {train.max_skipped_steps} bad steps in a row; back to step {progress.step} ({loaded.path}), "
            f"learning rate x {wanted:g}, the data since then left out ({num_rollbacks} of at most "
            f"{train.max_rollbacks} times)"
        )

    def stopped(self, why: str) -> TrainingStopped:
        """The error of a run that cannot go on."""
        progress = self._progress
        return TrainingStopped(
            f"{self._health.num_bad} steps in a row had a loss or gradient that is not finite, or a spike (step "
            f"{progress.step}, loss {progress.losses[-1]}); no update was made in them, and {why}. Lower optimizer.lr, "
            "set train.max_grad_norm, use precision.dtype = bf16, or see whether the model's weights are finite"
        )


def _num_restarts() -> int:
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))


def _written_since_launch(file: Path) -> bool:
    """Whether the file is younger than the launcher, which stays while ranks are started again."""
    try:
        return file.stat().st_mtime >= psutil.Process(os.getppid()).create_time()
    except (OSError, psutil.Error):
        return False


def find_healthy(folder: Path, before: int) -> Path | None:
    """The newest checkpoint that verifies, was healthy when it was written and proved to be; None if there is none.

    Args:
        folder: that holds checkpoints.
        before: a good step. Its loss speaks for the weights of the step before it: later ones may be ruined already.
    """
    for candidate in list_candidates(folder):
        if candidate.manifest is None:
            continue
        try:
            extra = read_json(candidate.path, STATE).get("extra")
        except (DamagedError, OSError):
            continue
        healthy = isinstance(extra, dict) and extra.get(_HEALTHY) is True and int(extra["step"]) < before
        if healthy and not verify(candidate.path):
            return candidate.path
    return None


def _scale_rates(engine: Engine, scheduler: Any, factor: float) -> None:
    """Multiplies every learning rate, now and in the schedule to come."""
    if engine.optimizer is None or factor == 1.0:
        return
    for group in engine.optimizer.param_groups:
        group["lr"] *= factor
        if "initial_lr" in group:
            group["initial_lr"] *= factor
    scheduler.base_lrs = [rate * factor for rate in scheduler.base_lrs]
    scheduler._last_lr = [group["lr"] for group in engine.optimizer.param_groups]
