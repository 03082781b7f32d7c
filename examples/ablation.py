"""Compare settings of the method on data that none of them has seen: paired seeds, one JSON line a run; goes on where it stopped.

    python examples/ablation.py --dataset digits --ipc 10 --seeds 0,1,2 --out digits.jsonl --held-out \
        '{"sampler": "gaussian", "calibration_weight": 10}' '{"sampler": "scale_mixture", "calibration_weight": 10}'

Each variant is laid over the method of `preset: quick`; `{"baseline": "random_real"}`, `herding`, `k_center` and `full` stand for
themselves. With --held-out a fifth of the training data judges, and the test set is never looked at: choose there, then run the
chosen ones without it. With --at 150,300 a line also holds what a distillation reported on its way, and the accuracy that its
images gave at these steps (`curves.py` draws them). With --fine-tune 50,200 the finished images go on by the calibration term
alone, at a tenth of the rate, and are judged after so many updates too.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import safetensors.torch
import torch

from ncfm_core.coresets import coreset, random_real
from ncfm_core.datasets import Dataset, load_dataset
from ncfm_core.distill import Distillation
from ncfm_core.evaluate import evaluate
from ncfm_core.pools import TeacherPool, TeacherTraining
from ncfm_core.progress import finish
from ncfm_core.spec import JobSpec, digest
from ncfm_core.submission import resolve

CPU = torch.device("cpu")


def teachers(dataset: Dataset, spec: JobSpec, folder: Path) -> TeacherPool:
    """The pool, from the folder where it is there already."""
    weights = []
    for index in range(spec.teachers.count):
        key = digest([dataset.digest, spec.model.model_dump(mode="json"), spec.teachers.model_dump(mode="json"), index])
        path = folder / f"teacher-{key.removeprefix('sha256:')[:24]}.safetensors"
        if not path.exists():
            task = TeacherTraining(dataset, spec.model, spec.teachers.training, seed=0, index=index, device=CPU)
            for _ in task.run():
                pass
            folder.mkdir(parents=True, exist_ok=True)
            partial = path.with_suffix(".partial")
            safetensors.torch.save_file(task.result(), partial)
            partial.rename(path)
        weights.append(safetensors.torch.load_file(path))
    return TeacherPool(spec.model, dataset, weights, CPU)


def judged(dataset: Dataset, spec: JobSpec, images: torch.Tensor, labels: torch.Tensor) -> tuple[float, ...]:
    """Last accuracies of fresh students."""
    entry = spec.evaluate[0]
    steps = evaluate(
        images,
        labels,
        dataset,
        model=entry.model,
        training=entry.training,
        students=entry.students,
        tests=1,
        seed=spec.seed,
        device=CPU,
    )
    return finish(steps).last


def judgement(dataset: Dataset, spec: JobSpec, task: Distillation) -> dict[str, Any]:
    """Of the images as they would be published now; the task, which may go on afterwards, stays as it is."""
    synthetic = task.result()
    accuracies = judged(dataset, spec, *replace(synthetic, images=synthetic.images.clamp(0, 1)).decode())
    return {"step": task.step, "accuracy": statistics.fmean(accuracies), "students": accuracies}


def fine_tuned(
    dataset: Dataset, spec: JobSpec, pool: TeacherPool, images: torch.Tensor, at: Sequence[int]
) -> list[dict[str, Any]]:
    """Judgements of images that go on without the discrepancy."""
    changes = {"discrepancy_weight": 0.0, "steps": max(at), "image_lr": spec.method.image_lr / 10}
    task = Distillation(dataset, pool, spec.method.model_copy(update=changes), ipc=spec.ipc, seed=spec.seed, device=CPU)
    with torch.no_grad():
        task.synthetic.images.copy_(images)
    found = []
    for until in sorted(at):
        for _ in task.run(until):
            pass
        found.append(judgement(dataset, spec, task))
    return found


def run(
    dataset: Dataset, spec: JobSpec, folder: Path, baseline: str | None, at: Sequence[int], fine_tune: Sequence[int]
) -> dict[str, Any]:
    if baseline == "full":
        full = spec.full_data
        entry = spec.evaluate[0].model_copy(update={"training": full.training, "students": full.students})
        spec = spec.model_copy(update={"evaluate": (entry,)})
        accuracies = judged(dataset, spec, dataset.train_images, dataset.train_labels)
        return {"accuracy": statistics.fmean(accuracies), "students": accuracies, "distill_seconds": 0.0}
    if baseline is not None:
        if baseline == "random_real":
            images, labels = random_real(dataset, ipc=spec.ipc, seed=spec.seed)
        else:
            pool = teachers(dataset, spec, folder)
            images, labels = coreset(baseline, dataset, pool, ipc=spec.ipc, device=CPU)  # type: ignore[arg-type]
        accuracies = judged(dataset, spec, images, labels)
        return {"accuracy": statistics.fmean(accuracies), "students": accuracies, "distill_seconds": 0.0}
    pool = teachers(dataset, spec, folder)
    task = Distillation(dataset, pool, spec.method, ipc=spec.ipc, seed=spec.seed, device=CPU)
    reports: list[dict[str, float]] = []
    judgements = []
    seconds = 0.0
    for until in sorted({*at, task.total}):
        started = time.perf_counter()
        reports += [{"step": report.completed} | report.metrics for report in task.run(until)]
        seconds += time.perf_counter() - started
        judgements.append(judgement(dataset, spec, task))
    last = judgements[-1]
    line = {"accuracy": last["accuracy"], "students": last["students"], "distill_seconds": round(seconds, 1)}
    if at:
        line |= {"reports": reports, "judgements": judgements}
    if fine_tune:
        line["fine_tuned"] = fine_tuned(dataset, spec, pool, task.synthetic.images.detach(), fine_tune)
    return line


def steps(text: str) -> list[int]:
    return [int(step) for step in text.split(",")]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset", required=True)
    parser.add_argument("--ipc", type=int, required=True)
    parser.add_argument("--seeds", default="0")
    parser.add_argument("--students", type=int, default=3)
    parser.add_argument("--data", type=Path, default=Path("data"))
    parser.add_argument("--cache", type=Path, default=Path("ablation-cache"))
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--held-out", action="store_true")
    parser.add_argument("--at", type=steps, default=[])
    parser.add_argument("--fine-tune", type=steps, default=[])
    parser.add_argument(
        "--base", type=json.loads, default={}, help="submission that every variant shares; `evaluate` is its one entry"
    )
    parser.add_argument("variants", nargs="+", type=json.loads)
    asked = parser.parse_args()
    torch.set_num_threads(1)
    dataset = load_dataset(asked.dataset, data_dir=asked.data)
    if asked.held_out:
        dataset = dataset.hold_out(0.2, seed=0)
    done = {json.loads(line)["run"] for line in asked.out.read_text().splitlines()} if asked.out.exists() else set()
    for seed in map(int, asked.seeds.split(",")):
        for variant in asked.variants:
            body = {"dataset": asked.dataset, "ipc": asked.ipc, "preset": "quick", "seed": seed} | asked.base
            chosen = dict(variant)
            baseline = chosen.pop("baseline", None)
            body["method"] = asked.base.get("method", {}) | chosen
            body["evaluate"] = [asked.base.get("evaluate", {}) | {"students": asked.students}]
            spec = resolve(body)
            looks = [asked.at, asked.fine_tune] if asked.at or asked.fine_tune else []
            key = digest([spec.document(), asked.held_out, baseline, *looks])
            if key in done:
                continue
            line = {
                "run": key,
                "dataset": asked.dataset,
                "ipc": asked.ipc,
                "seed": seed,
                "variant": asked.base.get("method", {}) | variant,
            }
            shared = {name: value for name, value in asked.base.items() if name != "method"}
            line |= {"base": shared} if shared else {}
            line |= {"held_out": asked.held_out, "torch": torch.__version__} | run(
                dataset, spec, asked.cache, baseline, asked.at, asked.fine_tune
            )
            with asked.out.open("a") as out:
                out.write(json.dumps(line) + "\n")
            sys.stdout.write(f"{seed} {variant} {line['accuracy']:.2f} in {line['distill_seconds']} s\n")
            sys.stdout.flush()


if __name__ == "__main__":
    main()
