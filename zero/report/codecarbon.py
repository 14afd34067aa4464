"""codecarbon's figures, for who has the extra ``energy``: offline, so that nothing is sent or asked for."""

from __future__ import annotations

import importlib.util
import logging
import platform
from typing import Any

from zero.errors import UserError

_JOULES_PER_KWH = 3.6e6
_PERIOD_S = 15.0


def check_codecarbon(energy: str) -> None:
    """Refuses ``cost.energy = "codecarbon"`` where the package is not installed.

    Raises:
        UserError: with the command that installs it.
    """
    if energy == "codecarbon" and importlib.util.find_spec("codecarbon") is None:
        raise UserError(
            'cost.energy = "codecarbon" needs the package codecarbon: pip install -c constraints.txt -e ".[energy]" in the '
            'folder of this project, or use "auto"'
        )


class CodeCarbon:
    """One tracker, and the two meters that read it.

    Args:
        country: three letters; only codecarbon's own estimate of emissions uses them, which is not taken.
    """

    def __init__(self, country: str | None) -> None:
        from codecarbon import OfflineEmissionsTracker
        from codecarbon.output_methods.base_output import BaseOutput

        class Kept(BaseOutput):  # type: ignore[misc]  # codecarbon is optional, and untyped for the checker
            """Takes the totals at each flush, instead of a file or a service."""

            total: Any = None

            def out(self, total: Any, delta: Any) -> None:
                """As codecarbon calls it."""
                self.total = total

        # Its constructor speaks before it heeds its log_level.
        logging.getLogger("codecarbon").setLevel(logging.ERROR)
        self._kept = Kept()
        # Said here and not left to codecarbon's own config files, which may name a service to send to.
        self._tracker: Any = OfflineEmissionsTracker(
            country_iso_code=country or "USA",
            measure_power_secs=_PERIOD_S,
            save_to_file=False,
            save_to_api=False,
            save_to_logger=False,
            save_to_prometheus=False,
            save_to_logfire=False,
            emissions_endpoint=None,
            output_handlers=[self._kept],
            allow_multiple_runs=True,
            log_level="error",
        )
        self._tracker.start()
        self.cpu = _Side(self, ("cpu_energy", "ram_energy"), "by codecarbon, memory included")
        self.gpu = _Side(self, ("gpu_energy",), "by codecarbon") if self.total("gpu_count") else None

    def total(self, name: str) -> float:
        """One of the tracker's totals, brought up to now."""
        self._tracker.flush()
        return float(getattr(self._kept.total, name, None) or 0.0)

    def close(self) -> None:
        """Ends the tracker's thread."""
        self._tracker.stop()


class _Side:
    """A meter of some of a tracker's totals."""

    is_measured = False  # it may be; the tracker does not say
    period_s = 3600.0  # codecarbon has its own thread

    def __init__(self, tracker: CodeCarbon, names: tuple[str, ...], method: str) -> None:
        self._tracker = tracker
        self._names = names
        self.method = method
        # It measures the machine; each rank has a tracker of its own.
        self.key: str | None = f"codecarbon {names[0]} {platform.node()}"

    def joules(self) -> float:
        """Since the tracker was made."""
        return sum(self._tracker.total(name) for name in self._names) * _JOULES_PER_KWH

    def close(self) -> None:
        """Ends the tracker."""
        self._tracker.close()
