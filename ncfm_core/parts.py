"""What every part of a spec is made of: the base model and the kinds of numbers. Torch-free."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

Seed = Annotated[int, Field(ge=0, le=2**31 - 1)]
Rate = Annotated[float, Field(gt=0, le=1000)]
Fraction = Annotated[float, Field(ge=0, le=1)]
Weight = Annotated[float, Field(ge=0, le=1e6)]
Epochs = Annotated[int, Field(ge=1, le=100_000)]
BatchSize = Annotated[int, Field(ge=1, le=100_000)]


class Part(BaseModel):
    """Base of every part: frozen, closed, finite numbers, no silent conversions."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", allow_inf_nan=False, strict=True, use_attribute_docstrings=True
    )


class UnfitError(ValueError):
    """A value that is legal as such but not beside the fields before it; raised by validators."""

    def __init__(self, message: str, hint: str, *, field: str = "") -> None:
        """
        Args:
            message: what is wrong.
            hint: the way out.
            field: the one below the validated part or mapping that is at fault; empty for what was validated itself.
        """
        super().__init__(message)
        self.hint, self.field = hint, field
