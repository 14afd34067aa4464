"""Text from a model that an engine manages, for many requests at a time."""

from zero.generation.generator import Generator
from zero.generation.jobs import Job
from zero.generation.limits import GenerationStatistics, Limits
from zero.generation.opening import open_generator
from zero.generation.pieces import Choice, Piece, TokenLogprob
from zero.generation.sampling import Sampling

__all__ = [
    "Choice",
    "GenerationStatistics",
    "Generator",
    "Job",
    "Limits",
    "Piece",
    "Sampling",
    "TokenLogprob",
    "open_generator",
]
