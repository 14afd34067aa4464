"""The kinds of value a config holds: strict types that also say, in words, what they allow."""

from __future__ import annotations

import math
import os
import types
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field
from pydantic.fields import FieldInfo

from gemini.units import parse_bytes


@dataclass(frozen=True)
class Allowed:
    """What a value may be, in words that fit after "must be"; shown in errors and in the reference."""

    text: str


class Section(BaseModel):
    """Base of every table of the config: no unknown keys, no silent conversions, read-only once built."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True, use_attribute_docstrings=True)


def _number(value: Any) -> Any:
    """Takes text for a number: YAML reads ``1e-5`` as text. Anything else is left to the strict check behind it."""
    if isinstance(value, str):
        try:
            return float(value)
        except ValueError:
            return value
    # Integers beyond the range of a float would otherwise surface as an OverflowError.
    if isinstance(value, int) and not isinstance(value, bool) and abs(value) > 2**1000:
        return math.inf
    return value


def _text(value: Any) -> Any:
    return os.fspath(value) if isinstance(value, os.PathLike) else value


def _texts(value: Any) -> Any:
    """One text or several, as a tuple."""
    if isinstance(value, str | os.PathLike):
        return (_text(value),)
    if isinstance(value, Sequence) and not isinstance(value, bytes):
        return tuple(_text(item) for item in value)
    return value


def _numbers(value: Any) -> Any:
    return tuple(_number(item) for item in value) if isinstance(value, list | tuple) else value


def _not_zero(value: int) -> int:
    if value == 0:
        raise ValueError("must be -1 (as many steps as num_train_epochs say) or a whole number, 1 or more")
    return value


_STRICT_FLOAT = Field(strict=True, allow_inf_nan=False)

PositiveInt = Annotated[int, Field(strict=True, ge=1, le=2**53), Allowed("a whole number, 1 or more")]
SequenceLength = Annotated[int, Field(strict=True, ge=3, le=2**53), Allowed("a whole number, 3 or more")]
NonNegativeInt = Annotated[int, Field(strict=True, ge=0, le=2**53), Allowed("a whole number, 0 or more")]
Seed = Annotated[int, Field(strict=True, ge=0, lt=2**32), Allowed("a whole number from 0 to 4294967295")]
MaxSteps = Annotated[
    int, Field(strict=True, ge=-1, le=2**53), AfterValidator(_not_zero), Allowed("-1 or a whole number, 1 or more")
]
PositiveNumber = Annotated[float, BeforeValidator(_number), _STRICT_FLOAT, Field(gt=0), Allowed("a number above 0")]
NonNegativeNumber = Annotated[
    float, BeforeValidator(_number), _STRICT_FLOAT, Field(ge=0), Allowed("a number, 0 or more")
]
Fraction = Annotated[
    float, BeforeValidator(_number), _STRICT_FLOAT, Field(ge=0, le=1), Allowed("a fraction from 0 to 1")
]
OpenFraction = Annotated[
    float, BeforeValidator(_number), _STRICT_FLOAT, Field(ge=0, lt=1), Allowed("a number from 0 to below 1")
]
Shrink = Annotated[
    float, BeforeValidator(_number), _STRICT_FLOAT, Field(gt=0, lt=1), Allowed("a number between 0 and 1")
]
Growth = Annotated[float, BeforeValidator(_number), _STRICT_FLOAT, Field(gt=1), Allowed("a number above 1")]
Overhead = Annotated[float, BeforeValidator(_number), _STRICT_FLOAT, Field(ge=1), Allowed("a number, 1 or more")]
_Beta = Annotated[float, _STRICT_FLOAT, Field(ge=0, lt=1)]
Betas = Annotated[
    tuple[_Beta, _Beta],
    BeforeValidator(_numbers),
    Allowed("two numbers from 0 to below 1, such as [0.9, 0.999]"),
]
# Kept as an integer number of bytes.
ByteAmount = Annotated[
    int, BeforeValidator(parse_bytes), Field(ge=1), Allowed('an amount of memory such as "6GiB", or a number of bytes')
]
Text = Annotated[str, BeforeValidator(_text), Field(strict=True, min_length=1), Allowed("a text that is not empty")]
Texts = Annotated[
    tuple[Annotated[str, Field(strict=True, min_length=1)], ...],
    BeforeValidator(_texts),
    Field(min_length=1),
    Allowed("a text or a list of texts, none empty"),
]


def section_of(annotation: Any) -> type[Section] | None:
    """The table class that an annotation stands for, also inside ``X | None``; ``None`` for a plain value."""
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return annotation
    if get_origin(annotation) is Annotated:
        return section_of(get_args(annotation)[0])
    if get_origin(annotation) in (Union, types.UnionType):
        return next((found for arg in get_args(annotation) if (found := section_of(arg))), None)
    return None


def is_text(annotation: Any) -> bool:
    """Whether texts, and nothing else but "no value", are allowed by this annotation."""
    if get_origin(annotation) is Annotated:
        return is_text(get_args(annotation)[0])
    if get_origin(annotation) in (Union, types.UnionType):
        return all(is_text(arg) for arg in get_args(annotation) if arg is not type(None))
    if get_origin(annotation) is Literal:
        return all(isinstance(choice, str) for choice in get_args(annotation))
    return annotation is str


def choices_of(annotation: Any) -> list[Any]:
    """The values a ``Literal`` allows, also inside unions; empty for anything else."""
    if get_origin(annotation) is Literal:
        return list(get_args(annotation))
    if get_origin(annotation) in (Annotated, Union, types.UnionType):
        return [choice for arg in get_args(annotation) for choice in choices_of(arg)]
    return []


def allowed_text(field: FieldInfo) -> str:
    """What a key may be set to, in words that fit after "must be"."""
    return _metadata_text(field.metadata) or _allowed(field.annotation)


def _metadata_text(metadata: Sequence[Any]) -> str:
    # The last one: an alias built on another alias refines what that one says.
    return next((item.text for item in reversed(metadata) if isinstance(item, Allowed)), "")


def _allowed(annotation: Any) -> str:
    if get_origin(annotation) is Annotated:
        return _metadata_text(annotation.__metadata__) or _allowed(get_args(annotation)[0])
    if get_origin(annotation) in (Union, types.UnionType):
        return " or ".join(_allowed(arg) for arg in get_args(annotation) if arg is not type(None))
    if get_origin(annotation) is Literal:
        return "one of " + ", ".join(str(choice) for choice in get_args(annotation))
    if annotation is bool:
        return "true or false"
    if section_of(annotation):
        return "a table"
    return {str: "a text", int: "a whole number", float: "a number"}.get(annotation, "a table of keys and values")
