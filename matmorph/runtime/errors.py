"""What can go wrong on a machine that only runs artefacts. Each prints as one plain message; none needs torch."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches


class SessionError(Exception):
    """Base of everything that `matmorph.runtime` raises on purpose."""


class ArtifactError(SessionError, ValueError):
    """The folder is not an artefact, or its manifest and its model do not belong together."""


class InputMismatch(SessionError, ValueError):  # noqa: N818 - it names what happened
    """An array does not fit the model: name, dtype, rank, size or range."""


class ProviderError(SessionError, RuntimeError):
    """An execution provider that was asked for cannot be had on this machine."""


class ExecutionError(SessionError, RuntimeError):
    """ONNX Runtime refused while it ran, for instance a token id outside the vocabulary."""


class AdapterError(SessionError, ValueError):
    """An adapter file cannot be written or read, or belongs to another base or another matmul."""


class TrainingError(SessionError, RuntimeError):
    """Training cannot go on: a loss or gradient that is not finite. The state is that of the last good update."""


class CheckpointError(SessionError, ValueError):
    """A checkpoint cannot be written or read, or belongs to another model."""


def nearest(word: str, choices: Iterable[str]) -> str:
    """`"; did you mean input_ids?"`, or an empty string when nothing is near. The word itself is no suggestion."""
    near = get_close_matches(word, [choice for choice in choices if choice != word], n=1, cutoff=0.5)
    return f"; did you mean {near[0]}?" if near else ""


def first_line(error: BaseException) -> str:
    """ONNX Runtime's messages go on for lines; the first one says what is wrong."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
