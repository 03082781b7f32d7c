"""What a search is: the space over fields of the method, and how its trials are judged. Torch-free."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, field_validator

from ncfm_core.parts import Epochs, Part, UnfitError


class Uniform(Part):
    uniform: tuple[float, float]
    """Lower and upper bound."""


class LogUniform(Part):
    loguniform: tuple[float, float]
    """Lower and upper bound, both positive."""


class RandInt(Part):
    randint: tuple[int, int]
    """Lower bound and upper bound, the upper one excluded."""


Choice = Annotated[tuple[bool | int | float | str, ...], Field(min_length=1, max_length=100)]


class SearchSpec(Part):
    """Ray Tune over fields of `method`, judged on a part of the training data held out; the test set is never looked at."""

    trials: Annotated[int, Field(ge=1, le=10_000)]
    """Samples drawn from the space."""
    space: Annotated[dict[str, Uniform | LogUniform | RandInt | Choice], Field(min_length=1, max_length=32)]
    """Field of `method` to what it may be: a list of values, `uniform`, `loguniform` or `randint`."""
    scheduler: Literal["asha", "random"]
    """`asha` stops trials that fall behind at the rungs; `random` runs all to their end."""
    steps: Annotated[int, Field(ge=1, le=10_000_000)]
    """Updates of the images in a trial."""
    rungs: Annotated[int, Field(ge=1, le=10)]
    """Evaluations along a trial, evenly spaced, the last at its end."""
    students: Annotated[int, Field(ge=1, le=100)]
    """Students per evaluation."""
    epochs: Epochs
    """Of each student."""
    validation_fraction: Annotated[float, Field(ge=0.01, le=0.5)]
    """Share of each class's training images that is held out for judging."""

    @field_validator("space")
    @classmethod
    def _ordered_bounds(
        cls, space: dict[str, Uniform | LogUniform | RandInt | Choice]
    ) -> dict[str, Uniform | LogUniform | RandInt | Choice]:
        for name, entry in space.items():
            if isinstance(entry, tuple):
                continue
            (low, high), *_ = entry.model_dump().values()
            if not low < high:
                message = "the lower bound is not below the upper one"
                raise UnfitError(message, f"Swap or spread [{low}, {high}].", field=name)
            if isinstance(entry, LogUniform) and low <= 0:
                hint = f"Choose uniform for [{low}, {high}], or bounds above 0."
                raise UnfitError("loguniform needs positive bounds", hint, field=name)
        return space
