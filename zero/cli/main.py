"""The command line: ``zero train CONFIG``, and the rest of the verbs.

Exit codes: 0 done, 1 the run failed, 2 the user's input is wrong.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import logging
import os
import sys
from collections.abc import Callable, Sequence

from zero.cli import commands
from zero.cli.parser import make_parser
from zero.cli.processes import place_of_rank
from zero.config.words import nearest
from zero.errors import UserError
from zero.launching.rank import Explained, run_as_rank
from zero.report.logs import configure_logging

logger = logging.getLogger("zero")

EXIT_FAILED, EXIT_WRONG_INPUT, EXIT_INTERRUPTED = 1, 2, 130


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command; the entry point of ``zero``.

    Args:
        argv: words after the program's name; by default this process's.

    Returns:
        The exit code.
    """
    if sys.stdout is None:  # closed by whoever started us: what is said goes nowhere
        sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115 - for as long as the process lives
    # Before torch is loaded: threads that wait for one another by spinning take the core that the other would run on.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    _tame_progress_bars()
    words = list(sys.argv[1:] if argv is None else argv)
    try:
        place = place_of_rank(words)
    except UserError as error:
        sys.stderr.write(f"zero: {error}\n")
        return EXIT_WRONG_INPUT
    configure_logging(rank=0 if place is None else place.rank)
    if place is not None:
        return run_as_rank(place, lambda: _perform(words, place.rank), _explain)
    try:
        return _perform(words)
    except BaseException as error:
        explained = _explain(error)
        if explained is None:
            raise
        sys.stderr.write(f"zero: {explained.message}\n")
        return explained.exit_code


def _tame_progress_bars() -> None:
    """Libraries' progress bars are for a terminal, and gone when they are done; a log file gets none.

    tqdm reads this when it is imported. What the user has set stands.
    """
    if sys.stderr is not None and sys.stderr.isatty():
        os.environ.setdefault("TQDM_LEAVE", "")
    else:
        os.environ.setdefault("TQDM_DISABLE", "1")


def _perform(words: list[str], rank: int = 0) -> int:
    """Runs one command; returns its exit code."""
    usage = io.StringIO()
    try:
        # What is wrong with the words is the same on every rank, and said by the first.
        with contextlib.redirect_stderr(usage) if rank else contextlib.nullcontext():
            arguments, rest = _parse(words)
    except SystemExit as stop:  # argparse's way to end: after --help, or with a usage line on stderr
        if rank and stop.code:
            raise UserError(usage.getvalue().strip()) from None
        return int(stop.code or 0)
    run: Callable[[argparse.Namespace, list[str]], int] = arguments.run
    return run(arguments, rest)


def _explain(error: BaseException) -> Explained | None:
    """Words for what needs no traceback."""
    if isinstance(error, ValueError) and _is_the_users(error):
        return Explained(str(error), EXIT_WRONG_INPUT)
    if isinstance(error, commands.RunFailed) or _has_no_room(error):
        return Explained(str(error), EXIT_FAILED)
    if isinstance(error, KeyboardInterrupt):
        return Explained("interrupted", EXIT_INTERRUPTED)
    return None


def _has_no_room(error: BaseException) -> bool:
    """Whether host or disk could not hold one more buffer."""
    kinds = (("gemini.arena", "HostMemoryError"), ("gemini.disk", "DiskError"))
    return any(isinstance(error, getattr(sys.modules[name], kind)) for name, kind in kinds if name in sys.modules)


def _is_the_users(error: ValueError) -> bool:
    # Not imported here: that would bring torch, and `zero validate` shall answer at once. What was never imported was
    # never raised.
    plan = sys.modules.get("gemini.plan")
    return isinstance(error, UserError) or (plan is not None and isinstance(error, plan.DoesNotFitError))


def _parse(words: list[str]) -> tuple[argparse.Namespace, list[str]]:
    """The command's arguments and what is left over; raises SystemExit as argparse does."""
    parser, verbs = make_parser()
    if not words:
        parser.print_help(sys.stderr)
        raise SystemExit(EXIT_WRONG_INPUT)
    if not words[0].startswith("-") and words[0] not in verbs:
        meant = nearest(words[0], verbs)
        hint = f"did you mean {meant}?" if meant else f"commands: {', '.join(verbs)}"
        sys.stderr.write(f"zero: {words[0]}: no such command; {hint}\n")
        raise SystemExit(EXIT_WRONG_INPUT)
    arguments, rest = parser.parse_known_args(words)
    arguments.words = words
    return arguments, rest


if __name__ == "__main__":
    sys.exit(main())
