"""Errors that are a user's to act on. The command line prints them without a traceback and exits with 2."""

from __future__ import annotations


class UserError(ValueError):
    """The user's input is wrong: the message says what was given, what is allowed and what to do."""


class ConfigError(UserError):
    """One or more things are wrong with a config; ``problems`` holds one line for each."""

    def __init__(self, problems: list[str], source: str = "config") -> None:
        self.problems = problems
        self.source = source
        lines = "\n".join(f"  - {problem}" for problem in problems)
        super().__init__(f"{source}: {len(problems)} problem{'s' if len(problems) != 1 else ''}\n{lines}")


class DataError(UserError):
    """Training data cannot be used; the message names file and line."""
