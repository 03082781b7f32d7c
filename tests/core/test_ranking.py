from __future__ import annotations

import pytest

from ncfm_core.ranking import label_robust_score


def test_score_equals_the_formula_by_hand() -> None:
    # HLR = .848 - .489 = .359, IOR = .489 - .260 = .229, alpha = .5 * .229 - .5 * .359 = -.065
    # (e^-.065 - e^-1) / (e - e^-1) = (.937067 - .367879) / 2.350402
    found = label_robust_score(full=0.848, hard=0.489, own=0.489, random=0.260)
    assert found.hard_label_recovery == pytest.approx(0.359)
    assert found.improvement_over_random == pytest.approx(0.229)
    assert found.score == pytest.approx(0.242166, abs=1e-6)


def test_soft_labels_count_for_the_improvement_alone() -> None:
    # alpha = .5 * (.75 - .70) - .5 * (.85 - .50) = -.15; (.860708 - .367879) / 2.350402
    found = label_robust_score(full=0.85, hard=0.5, own=0.75, random=0.7)
    assert found.score == pytest.approx(0.209678, abs=1e-6)


@pytest.mark.parametrize(
    ("accuracies", "weight", "score"),
    [((0.0, 1.0, 1.0, 0.0), 0.5, 1.0), ((1.0, 0.0, 0.0, 1.0), 0.5, 0.0), ((0.9, 0.1, 0.6, 0.6), 1.0, 0.268941)],
)
def test_score_runs_from_0_to_1(accuracies: tuple[float, float, float, float], weight: float, score: float) -> None:
    full, hard, own, random = accuracies
    found = label_robust_score(full=full, hard=hard, own=own, random=random, weight=weight)
    assert found.score == pytest.approx(score, abs=1e-6)
