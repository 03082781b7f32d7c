"""The figures of a job with what they rest on: protocols, students, seeds, machine and versions. Light."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass

from pydantic import JsonValue

from ncfm_core.spec import JobSpec
from worker.records import Accuracy, Figures, StageResult

RELEVANT = ("dataset", "ipc", "preset", "method", "model", "teachers", "evaluate", "full_data", "seed")
"""Parts of a spec that its results depend on."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Evidence:
    """The results that a job's figures are read from, in the order of `spec.evaluate`."""

    distilled: StageResult
    evaluations: Sequence[StageResult]
    random_real: Sequence[StageResult]
    full_data: StageResult

    def figures(self) -> Figures:
        """The headline: the first evaluation."""
        return Figures(
            distilled=accuracy_in(self.evaluations[0]),
            random_real=accuracy_in(self.random_real[0]),
            full=accuracy_in(self.full_data),
        )

    def entries(self, spec: JobSpec) -> tuple[dict[str, JsonValue], ...]:
        """Every evaluation with its protocol, its model and its accuracies."""
        return tuple(
            {
                "protocol": entry.protocol,
                "model": entry.model.model_dump(mode="json"),
                "students": entry.students,
                "distilled": accuracy_in(distilled).model_dump(mode="json"),
                "random_real": accuracy_in(random_real).model_dump(mode="json"),
            }
            for entry, distilled, random_real in zip(spec.evaluate, self.evaluations, self.random_real, strict=True)
        )

    def document(self, spec: JobSpec) -> bytes:
        """`evaluation.json`."""
        value = {
            "unit": "percent of the test images, at the last epoch; std over students (ddof 1)",
            "dataset": spec.dataset.name,
            "ipc": spec.ipc,
            "seed": spec.seed,
            "evaluations": list(self.entries(spec)),
            "full_data": accuracy_in(self.full_data).model_dump(mode="json") | {"seed": spec.teachers.seed},
            **self.provenance(spec),
        }
        return json.dumps(value, indent=1, sort_keys=True).encode() + b"\n"

    def provenance(self, spec: JobSpec) -> dict[str, JsonValue]:
        """What the set and its figures were made from, and where."""
        document = spec.document()
        keys: dict[str, JsonValue] = {
            "distill": self.distilled.key,
            "evaluations": [result.key for result in self.evaluations],
            "random_real": [result.key for result in self.random_real],
            "full_data": self.full_data.key,
        }
        return {
            "spec": {name: document[name] for name in RELEVANT},
            "results": keys,
            "environment": {"distill": self.distilled.environment, "evaluate": self.evaluations[0].environment},
        }

    def card_rows(self, spec: JobSpec) -> str:
        """Lines of the accuracy table in the published card."""
        rows = []
        for entry, distilled, random_real in zip(spec.evaluate, self.evaluations, self.random_real, strict=True):
            network = f"{entry.model.label}, protocol {entry.protocol}"
            rows.append(f"| this set ({network}) | {in_words(accuracy_in(distilled))} |")
            rows.append(f"| as many random real images ({network}) | {in_words(accuracy_in(random_real))} |")
        rows.append(f"| the full training set, under its own recipe | {in_words(accuracy_in(self.full_data))} |")
        return "\n".join(rows)


def accuracy_in(result: StageResult) -> Accuracy:
    """The accuracy that an evaluation or a baseline found."""
    return Accuracy.model_validate(result.figures["accuracy"])


def in_words(accuracy: Accuracy) -> str:
    return f"{accuracy.mean:.1f} +- {accuracy.std:.1f} % (n={accuracy.n})"
