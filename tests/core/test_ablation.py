"""The example that compares settings: what it looks at on the way changes nothing."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from examples import ablation
from ncfm_core.datasets import Dataset
from ncfm_core.distill import Distillation
from ncfm_core.pools import TeacherPool
from ncfm_core.spec import JobSpec


def test_judgement_is_of_legal_images_and_leaves_the_run_as_it_is(
    digits: Dataset, pool: TeacherPool, spec: JobSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    method = spec.method.model_copy(update={"image_lr": 0.1})
    task = Distillation(digits, pool, method, ipc=1, seed=0, device=torch.device("cpu"))
    list(task.run(until=5))
    before, shown = task.synthetic.images.detach().clone(), list[Tensor]()
    assert ((before < 0) | (before > 1)).any()

    def judged(dataset: Dataset, spec: JobSpec, images: Tensor, labels: Tensor) -> tuple[float, ...]:
        shown.append(images)
        return (50.0, 60.0)

    monkeypatch.setattr(ablation, "judged", judged)
    assert ablation.judgement(digits, spec, task) == {"step": 5, "accuracy": 55.0, "students": (50.0, 60.0)}
    assert 0 <= float(shown[0].min()) <= float(shown[0].max()) <= 1
    assert torch.equal(task.synthetic.images, before)
