"""What a run tells its user: step lines, the live display, logs and tables."""

from __future__ import annotations

import io
import logging
import os
import re
import sys
from collections.abc import Iterator
from typing import Any

import pytest
from report_samples import GIB, MIB, make_record, render
from rich.console import Console

from zero.report.console import LiveReporter, PlainReporter, Reporter, SilentReporter, make_reporter
from zero.report.live import ProgressView
from zero.report.logs import configure_logging
from zero.report.record import step_line
from zero.report.scale import byte_unit, format_duration, format_used_of
from zero.report.tables import Need, needs_table, needs_text, text_columns, tier_totals, values_table, values_text


class TestScale:
    @pytest.mark.parametrize(
        ("used", "capacity", "text"),
        [
            (int(3.1 * MIB), 4 * MIB, "3.1/4.0 MiB"),
            (300 * MIB, 24 * GIB, "0.3/24.0 GiB"),
            (5, 100, "5/100 B"),
            (3 * GIB, None, "3.0 GiB"),
            (0, None, "0 B"),
            (0, 4 * MIB, "0.0/4.0 MiB"),
        ],
    )
    def test_used_and_capacity_share_the_unit_of_the_capacity(self, used: int, capacity: int | None, text: str) -> None:
        assert format_used_of(used, capacity) == text

    def test_units_start_where_they_are_one(self) -> None:
        assert byte_unit(1023) == (1, "B")
        assert byte_unit(1024) == (1024, "KiB")
        assert byte_unit(5000 * 1024**4) == (1024**4, "TiB")

    def test_durations(self) -> None:
        assert [format_duration(s) for s in (0, 61.4, 3723, 90061)] == ["0:00:00", "0:01:01", "1:02:03", "1d 1:01:01"]


class TestStepLine:
    def test_the_documented_line(self) -> None:
        assert step_line(make_record()) == (
            "step 12/200  loss 3.2145  lr 5.00e-05  grad_norm 1.23  tokens/s 1234  device 3.1/4.0 MiB  host 12.3 MiB  "
            "fetches 24  evictions 3"
        )

    def test_a_skipped_step_says_so_and_shows_the_loss_scale(self) -> None:
        line = step_line(make_record(loss=float("nan"), grad_norm=float("inf"), loss_scale=32768.0, skipped=True))
        assert line.startswith("step 12/200  SKIPPED (non-finite)  loss nan  ")
        assert "  grad_norm inf  loss_scale 32768  " in line

    def test_what_is_unknown_is_not_invented(self) -> None:
        line = step_line(make_record(grad_norm=None, device_capacity_bytes=None, tokens_per_s=0.5))
        assert "  grad_norm -  " in line
        assert "  device 3.1 MiB  " in line
        assert "  tokens/s 0.50  " in line


class TestPlainReporter:
    def run(self, logging_steps: int, num_steps: int = 7, skipped: int = 0) -> list[str]:
        stream = io.StringIO()
        reporter = make_reporter(console=Console(file=stream), logging_steps=logging_steps)
        assert isinstance(reporter, PlainReporter)
        with reporter:
            for step in range(1, num_steps + 1):
                reporter.step(make_record(step, num_steps=num_steps, skipped=step == skipped))
        return stream.getvalue().splitlines()

    def test_one_line_per_logged_step_with_the_first_and_the_last(self) -> None:
        assert [line.split()[1] for line in self.run(logging_steps=3)] == ["1/7", "3/7", "6/7", "7/7"]

    def test_a_skipped_step_always_has_a_line(self) -> None:
        assert "step 2/7  SKIPPED" in "\n".join(self.run(logging_steps=100, skipped=2))

    def test_header_and_summary_are_aligned_names_and_values(self, capsys: pytest.CaptureFixture[str]) -> None:
        reporter = PlainReporter()
        reporter.header({"model": "opt", "learning rate": "1e-5"})
        reporter.summary([("perplexity", "12.3")])
        assert capsys.readouterr().out == "model          opt\nlearning rate  1e-5\n\nperplexity  12.3\n"

    def test_an_ascii_stream_does_not_end_the_run(self) -> None:
        raw = io.BytesIO()
        stream = io.TextIOWrapper(raw, encoding="ascii")
        PlainReporter(stream).message("caf\N{LATIN SMALL LETTER E WITH ACUTE} [/INST]")
        assert raw.getvalue() == b"caf? [/INST]\n"

    def test_lines_are_longer_than_a_terminal_without_being_wrapped(self) -> None:
        assert all(line.startswith("step ") for line in self.run(logging_steps=1))


class TestLiveReporter:
    def reporter(self, **options: Any) -> tuple[LiveReporter, io.StringIO]:
        stream = io.StringIO()
        console = Console(file=stream, width=80, force_terminal=True, color_system=None, legacy_windows=False)
        return LiveReporter(console, **options), stream

    def test_logged_steps_stay_above_the_display(self) -> None:
        reporter, stream = self.reporter(logging_steps=5)
        with reporter:
            reporter.header({"model": "opt [bold]"})
            for step in range(1, 11):
                reporter.step(make_record(step))
            reporter.message("[INST] sample [/INST]")
            reporter.summary([("perplexity", "12.3")])
        text = stream.getvalue()
        assert [int(n) for n in re.findall(r"step (\d+)/200  loss", text)] == [1, 5, 10]
        assert "opt [bold]" in text
        assert "[INST] sample [/INST]" in text
        assert text.rstrip().endswith("perplexity  12.3")

    def test_the_display_is_taken_down_when_training_fails(self) -> None:
        reporter, stream = self.reporter()

        def train() -> None:
            with reporter:
                reporter.step(make_record())
                raise RuntimeError("boom")

        with pytest.raises(RuntimeError, match="boom"):
            train()
        # The last control sequence shows the cursor again.
        assert stream.getvalue().rindex("\x1b[?25h") > stream.getvalue().rindex("\x1b[?25l")
        reporter.close()

    @pytest.mark.parametrize("width", [40, 80, 120])
    def test_the_display_never_wraps(self, width: int) -> None:
        view = ProgressView()
        view.update(make_record(99_999, num_steps=100_000, loss_scale=65536.0, skipped=True, device_bytes=4 * MIB))
        lines = render(view, width).splitlines()
        assert len(lines) == 4
        assert all(len(line) <= width for line in lines)

    def test_the_display_shows_what_matters(self) -> None:
        view = ProgressView()
        view.update(make_record(skipped=True))
        text = render(view)
        for part in (
            "step 12/200",
            "6%",
            "loss 3.2145",
            "lr 5.00e-05",
            "grad norm 1.23",
            "tokens/s 1,234",
            "3.1/4.0 MiB",
            "peak 3.90 MiB",
            "host 12.3 MiB",
            "pinned 2.00 MiB",
            "fetches 24",
            "evictions 3",
            "to device 5.00 MiB",
            "to host 1.00 MiB",
            "skipped 1",
        ):
            assert part in text

    def test_eta_is_the_median_step_times_the_steps_left(self) -> None:
        now_s = 100.0
        view = ProgressView(clock=lambda: now_s)
        assert view.remaining_s is None
        for step, step_s in enumerate([60.0, 2.0, 2.0, 2.0], start=1):
            view.update(make_record(step, step_s=step_s))
        assert view.remaining_s == 196 * 2.0
        now_s += 10.0
        assert view.remaining_s == 196 * 2.0 - 10.0

    def test_a_resumed_run_is_timed_by_its_own_steps(self) -> None:
        view = ProgressView(clock=lambda: 0.0)
        view.update(make_record(150, step_s=3.0))
        assert view.remaining_s == 150.0


class TestMakeReporter:
    def test_other_ranks_are_silent(self, capsys: pytest.CaptureFixture[str]) -> None:
        reporter: Reporter = make_reporter(rank=1)
        assert isinstance(reporter, SilentReporter)
        with reporter:
            reporter.header({"a": "b"})
            reporter.step(make_record(1))
            reporter.message("text")
            reporter.summary([("a", "b")])
        assert capsys.readouterr() == ("", "")

    def test_a_file_gets_plain_lines_whatever_the_colour_variables_say(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("FORCE_COLOR", "1")
        assert isinstance(make_reporter(console=Console(file=io.StringIO())), PlainReporter)

    @pytest.mark.skipif(not hasattr(os, "openpty"), reason="needs a pseudo terminal")
    @pytest.mark.parametrize(("term", "kind"), [("xterm-256color", LiveReporter), ("dumb", PlainReporter)])
    def test_a_terminal_gets_the_live_display_if_it_can(
        self, term: str, kind: type, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("TERM", term)
        master, slave = os.openpty()
        with os.fdopen(master, "rb"), os.fdopen(slave, "w") as terminal:
            monkeypatch.setattr(sys, "stdout", terminal)
            assert isinstance(make_reporter(), kind)

    def test_a_senseless_interval_is_refused(self) -> None:
        with pytest.raises(ValueError, match="logging_steps is 0"):
            make_reporter(logging_steps=0)


class TestLogs:
    @pytest.fixture(autouse=True)
    def _restore(self) -> Iterator[None]:
        saved = {
            name: (logging.getLogger(name).level, list(logging.getLogger(name).handlers)) for name in ("zero", "gemini")
        }
        yield
        for name, (level, handlers) in saved.items():
            logging.getLogger(name).setLevel(level)
            logging.getLogger(name).handlers[:] = handlers

    def test_messages_go_to_stderr_once(self, capsys: pytest.CaptureFixture[str]) -> None:
        configure_logging("INFO")
        configure_logging("INFO")
        logging.getLogger("zero").info("hello")
        logging.getLogger("gemini").debug("hidden")
        assert capsys.readouterr() == ("", "INFO: hello\n")

    def test_messages_follow_a_replaced_stderr(self, monkeypatch: pytest.MonkeyPatch) -> None:
        configure_logging()
        display = io.StringIO()
        monkeypatch.setattr(sys, "stderr", display)
        logging.getLogger("gemini").warning("moved")
        assert display.getvalue() == "WARNING: moved\n"

    def test_other_ranks_only_warn_and_say_who_they_are(self, capsys: pytest.CaptureFixture[str]) -> None:
        configure_logging("INFO", rank=3, world=4)
        logging.getLogger("zero").info("hidden")
        logging.getLogger("zero").warning("shown")
        assert capsys.readouterr().err == "[rank 3] WARNING: shown\n"


class TestTables:
    NEEDS = [
        Need("parameters", "host", 2 * GIB),
        Need("one unit", "device", 3 * MIB, "block [3], gathered"),
        Need("activations", "device", 2 * MIB),
    ]

    def test_totals_per_tier_in_the_order_of_the_tiers(self) -> None:
        assert list(tier_totals(self.NEEDS).items()) == [("device", 5 * MIB), ("host", 2 * GIB)]

    def test_plain_text_is_aligned_and_judges_each_tier(self) -> None:
        text = needs_text(self.NEEDS, {"device": 4 * MIB, "host": 8 * GIB}, title="who needs what")
        assert text.splitlines() == [
            "who needs what",
            "tier    what            bytes  note",
            "device  one unit     3.00 MiB  block [3], gathered",
            "device  activations  2.00 MiB",
            "device  total        5.00 MiB  of 4.00 MiB: 1.00 MiB TOO MANY",
            "host    parameters   2.00 GiB",
            "host    total        2.00 GiB  of 8.00 GiB: 6.00 GiB spare",
        ]

    def test_a_tier_without_a_capacity_is_not_judged(self) -> None:
        text = needs_text(self.NEEDS, {"host": None})
        assert "spare" not in text
        assert "TOO MANY" not in text

    def test_the_table_holds_the_same_words_and_takes_no_markup(self) -> None:
        shown = render(needs_table(self.NEEDS, {"device": 4 * MIB}, title="refused"))
        assert "block [3], gathered" in shown
        assert "1.00 MiB TOO MANY" in shown
        assert "refused" in shown

    def test_values_as_mapping_or_pairs(self) -> None:
        assert values_text({"a": "1", "bcd": "2"}) == values_text([("a", "1"), ("bcd", "2")]) == "a    1\nbcd  2"
        assert "[red]" in render(values_table({"a": "[red]"}, title="summary"))

    def test_no_rows_are_no_text(self) -> None:
        assert text_columns([]) == ""
        assert values_text({}) == ""

    def test_a_line_break_in_a_cell_does_not_break_the_columns(self) -> None:
        assert text_columns([("a", "x\ny"), ("b", "z")]) == "a  x y\nb  z"
