"""The figures of a job with what they rest on: protocols, students, seeds, machine and versions. Light."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field

from pydantic import JsonValue

from ncfm_core.ranking import LabelRobustScore, label_robust_score
from ncfm_core.spec import CORESETS, CoresetName, EvaluationSpec, JobSpec
from worker.plan import Plan
from worker.records import Accuracy, Figures, Shortened, StageResult

Results = Mapping[str, StageResult]
"""By key."""

RELEVANT = ("dataset", "ipc", "preset", "method", "model", "teachers", "evaluate", "full_data", "baselines", "seed")
"""Parts of a spec that its results depend on."""

BASELINE_WORDS = {
    "random_real": "random real images",
    "herding": "real images chosen by herding",
    "k_center": "real images chosen by k-center",
}
SCORE_NOTE = (
    "DD-Ranking (arXiv 2505.13300): alpha = w IOR - (1 - w) HLR of accuracies as fractions, (e^alpha - e^-1) / (e - e^-1); "
    "the full data stands under its own recipe"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Evidence:
    """The results that a job's figures are read from, in the order of `spec.evaluate`."""

    distilled: StageResult
    evaluations: Sequence[StageResult]
    random_real: Sequence[StageResult]
    full_data: StageResult
    coresets: Mapping[CoresetName, Sequence[StageResult]] = field(default_factory=dict)
    """Herding and k-center, as far as they were asked for."""

    def figures(self, spec: JobSpec) -> Figures:
        """The headline: the first evaluation."""
        coresets = {name: accuracy_in(results[0]) for name, results in self.coresets.items()}
        score = self.scores(spec)[0]
        return Figures(
            distilled=accuracy_in(self.evaluations[0]),
            random_real=accuracy_in(self.random_real[0]),
            full=accuracy_in(self.full_data),
            herding=coresets.get("herding"),
            k_center=coresets.get("k_center"),
            label_robust_score=score.score if score else None,
        )

    @property
    def shortened(self) -> Shortened | None:
        """How far the distillation came, where it ended early."""
        return shortened_in(self.distilled)

    def baselines(self, index: int) -> dict[str, StageResult]:
        """Those of one evaluation, by name."""
        return {"random_real": self.random_real[index]} | {name: each[index] for name, each in self.coresets.items()}

    def scores(self, spec: JobSpec) -> tuple[LabelRobustScore | None, ...]:
        """The label-robust score of every evaluation.

        None where it would compare unlike things: students of another network than that of the full data, or students on soft
        labels without an evaluation of the same network on hard ones.
        """
        return tuple(self._score(spec, index) for index in range(len(spec.evaluate)))

    def _score(self, spec: JobSpec, index: int) -> LabelRobustScore | None:
        entry = spec.evaluate[index]
        alike = [other for other, each in enumerate(spec.evaluate) if each.model == entry.model]
        hard = [other for other in alike if not spec.evaluate[other].training.needs_soft_labels]
        if entry.model != spec.evaluate[0].model or not hard:
            return None
        own = index if index in hard else hard[0]
        return label_robust_score(
            full=_fraction(self.full_data),
            hard=_fraction(self.evaluations[own]),
            own=_fraction(self.evaluations[index]),
            random=_fraction(self.random_real[index]),
        )

    def entries(self, spec: JobSpec) -> tuple[dict[str, JsonValue], ...]:
        """Every evaluation with its protocol, its model, its accuracies and its score."""
        return tuple(
            {
                "protocol": entry.protocol,
                "model": entry.model.model_dump(mode="json"),
                "students": entry.students,
                "distilled": accuracy_in(distilled).model_dump(mode="json"),
                **{name: accuracy_in(each).model_dump(mode="json") for name, each in self.baselines(index).items()},
                "lr": {
                    name: each.figures.get("lr")
                    for name, each in ({"distilled": distilled} | self.baselines(index)).items()
                },
                "label_robust_score": None if score is None else asdict(score),
            }
            for index, (entry, distilled, score) in enumerate(
                zip(spec.evaluate, self.evaluations, self.scores(spec), strict=True)
            )
        )

    def as_trained(self, entry: EvaluationSpec) -> EvaluationSpec:
        """The first evaluation's entry with the rate that its students had."""
        rate = self.evaluations[0].figures["lr"]
        return entry.model_copy(update={"training": entry.training.model_copy(update={"lr": rate})})

    def document(self, spec: JobSpec) -> bytes:
        """`evaluation.json`."""
        value = {
            "unit": "percent of the test images, at the last epoch; std over students (ddof 1), null for one",
            "label_robust_score": SCORE_NOTE,
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
            **{name: [result.key for result in results] for name, results in self.coresets.items()},
            "full_data": self.full_data.key,
        }
        shortened = self.shortened
        return {
            **({} if shortened is None else {"shortened": shortened.model_dump(mode="json")}),
            "spec": {name: document[name] for name in RELEVANT},
            "results": keys,
            "environment": {"distill": self.distilled.environment, "evaluate": self.evaluations[0].environment},
        }

    def card_rows(self, spec: JobSpec) -> str:
        """Lines of the accuracy table in the published card."""
        rows, scores = [], self.scores(spec)
        for index, entry in enumerate(spec.evaluate):
            network = f"{entry.model.label}, protocol {entry.protocol}"
            rows.append(f"| this set ({network}) | {in_words(accuracy_in(self.evaluations[index]))} |")
            for name, result in self.baselines(index).items():
                rows.append(f"| as many {BASELINE_WORDS[name]} ({network}) | {in_words(accuracy_in(result))} |")
            if (score := scores[index]) is not None:
                rows.append(f"| label-robust score of DD-Ranking ({network}), 0 to 1 | {score.score:.3f} |")
        rows.append(f"| the full training set, under its own recipe | {in_words(accuracy_in(self.full_data))} |")
        return "\n".join(rows)


def evidence(plan: Plan, results: Results) -> Evidence:
    """The results that the figures are read from."""
    return Evidence(
        distilled=results[str(plan.distill.key)],
        evaluations=[results[str(build.key)] for build in plan.evaluations],
        random_real=[results[str(build.key)] for build in plan.random_real],
        coresets={
            name: [results[str(build.key)] for build in plan.coresets if build.kind == name]
            for name in CORESETS
            if any(build.kind == name for build in plan.coresets)
        },
        full_data=results[str(plan.full_data.key)],
    )


def accuracy_in(result: StageResult) -> Accuracy:
    """The accuracy that an evaluation or a baseline found."""
    return Accuracy.model_validate(result.figures["accuracy"])


def _fraction(result: StageResult) -> float:
    return accuracy_in(result).mean / 100


def shortened_in(distilled: StageResult) -> Shortened | None:
    """How far a distillation came that ended early; None for a whole one."""
    found = distilled.figures.get("shortened")
    return None if found is None else Shortened.model_validate(found)


def shortened_in_words(shortened: Shortened) -> str:
    """One sentence for a person."""
    return (
        f"The distillation ended at step {shortened.step} of {shortened.steps}, when the job's wall time "
        f"of {shortened.wall_seconds:g} s was over."
    )


def in_words(accuracy: Accuracy) -> str:
    """Such as `87.0 +- 0.5 % (n=5)`; one student has no spread."""
    spread = "" if accuracy.std is None else f" +- {accuracy.std:.1f}"
    return f"{accuracy.mean:.1f}{spread} % (n={accuracy.n})"
