"""The command that measures: what it counts and prints, and a pipeline cut into calls."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ncfm_core.bench import step
from ncfm_core.bench.__main__ import main
from ncfm_core.bench.folder import MIB, Folder
from ncfm_core.bench.keeping import CHOICES, SLACK_BYTES, content_of
from ncfm_core.bench.parts import OTHER, PARTS, shares
from ncfm_core.bench.pipeline import GOING, SETS, TEACHERS, Pipeline
from ncfm_core.bench.step import bench_step, grouping, image_forwards
from ncfm_core.bench.work import RELEASED, Work, prepare
from ncfm_core.datasets import Dataset
from ncfm_core.distill import Distillation
from ncfm_core.errors import CheckpointError
from ncfm_core.pools import TeacherPool
from ncfm_core.spec import JobSpec
from ncfm_core.submission import resolve

CPU = torch.device("cpu")
SMALL = {
    "model.width": 8,
    "method.steps": 9,
    "method.factor": 2,
    "method.reuse": 2,
    "method.num_frequencies": 64,
    "method.num_components": 8,
    "method.real_batch": 16,
    "teachers.training.epochs": 1,
    "evaluate": [{"students": 2, "tests": 2, "training": {"epochs": 5}}],
}
CHANGES = tuple(f"{name}={json.dumps(value)}" for name, value in SMALL.items())
COMMAND = ["--dataset", "digits", "--ipc", "1", "--teachers", "2", "--device", "cpu", "--eager"]
COMMAND += [word for change in CHANGES for word in ("--set", change)]
SAY_NOTHING = list[str]().append


def printed(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, Any]:
    assert main(arguments) == 0
    (line,) = capsys.readouterr().out.splitlines()
    document: dict[str, Any] = json.loads(line)
    return document


def complaint(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert main(arguments) == 2
    said = capsys.readouterr()
    assert not said.out
    (line,) = said.err.splitlines()
    return line


def test_step_tells_time_memory_and_parts_in_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    line = printed(capsys, "step", *COMMAND, "--steps", "3", "--warmup", "1")

    assert line["bench"] == "step" and line["data"] == "real" and line["networks"] == "freshly initialised"
    assert line["device"] == "cpu" and line["torch"] == torch.__version__ and line["threads"] == torch.get_num_threads()
    assert line["config"]["dataset"] == "digits" and line["config"]["model"]["width"] == 8
    assert line["config"]["method"]["num_frequencies"] == 64 and not line["equal_work"]
    assert line["image_steps"] == 4, "whole windows of two"
    assert 0 < line["ms_min"] <= line["ms_per_image_step"] <= line["ms_max"]
    assert line["image_forwards"] == (160 + 40) / 2 + 2 * 40
    assert line["images_per_second"] == pytest.approx(
        1e3 * line["image_forwards"] / line["ms_per_image_step"], rel=0.01
    )
    assert line["frequencies"] == 64
    assert line["peak_mib"] >= line["baseline_mib"] > 50
    assert line["parts"].keys() == {*PARTS, OTHER} and line["parts_clock"] == "wall"
    assert sum(line["parts"].values()) == pytest.approx(1, abs=0.01)
    assert all(line["parts"][name] > 0 for name in PARTS)
    assert not line["compiled"] and line["compile_seconds"] == 0
    assert line["tf32"] == {"convolutions": False, "products": False} and line["channels_last"] is False


@pytest.mark.parametrize(
    ("kind", "reuse", "steps", "expected"),
    [
        ("cpu", 1, None, (1, 3)),
        ("cpu", 5, None, (1, 3)),
        ("cpu", 2, 3, (1, 2)),
        ("cuda", 1, None, (20, 5)),
        ("cuda", 5, None, (4, 5)),
        ("cuda", 3, None, (7, 5)),
        ("cuda", 50, None, (1, 5)),
        ("cuda", 1, 41, (20, 3)),
        ("cuda", 5, 1, (4, 1)),
    ],
)
def test_a_gpu_is_waited_for_after_groups_of_windows_and_a_cpu_after_each(
    kind: str, reuse: int, steps: int | None, expected: tuple[int, int]
) -> None:
    assert grouping(kind, reuse=reuse, steps=steps) == expected


def test_profiler_says_nothing_on_a_cpu() -> None:
    """Kineto reads its level once a process, so this one is of its own."""
    words = [sys.executable, "-m", "ncfm_core.bench", "step", *COMMAND, "--steps", "1", "--warmup", "1"]
    plain = {name: value for name, value in os.environ.items() if name != "KINETO_LOG_LEVEL"}
    ended = subprocess.run(words, capture_output=True, text=True, check=True, env=plain)
    assert json.loads(ended.stdout)["parts_clock"] == "wall"
    assert not [line for line in ended.stderr.splitlines() if line.partition(":")[0].isupper()]


def test_nothing_is_reported_or_waited_for_inside_a_group(monkeypatch: pytest.MonkeyPatch) -> None:
    """Groups as on a GPU, on the CPU, across the places where a run reports, and beyond the last step of the recipe."""
    monkeypatch.setitem(step.STEPS_IN_GROUP, "cpu", 20)
    at, waits, runs = list[int](), list[int](), list[Distillation]()
    advance = Distillation.run

    def run(self: Distillation, *arguments: Any, **options: Any) -> Any:
        runs.append(self)
        for report in advance(self, *arguments, **options):
            at.append(report.completed)
            yield report

    monkeypatch.setattr(Distillation, "run", run)
    monkeypatch.setattr(step, "synchronise", lambda _: waits.append(runs[-1].step if runs else 0))
    work = prepare(dataset="digits", ipc=1, teachers=1, changes=CHANGES, device="cpu", compiled=False)
    line = bench_step(work, steps=40, warmup=4)
    assert at == [2, 4, 24, 44, 46]
    assert waits == [0, 2, 2, 4, 4, 24, 24, 44, 46]
    assert line["image_steps"] == 40 and work.spec.method.steps == 9


@pytest.mark.parametrize("option", ["--matmul-tf32", "--channels-last"])
def test_choices_for_a_gpu_are_refused_on_a_cpu(capsys: pytest.CaptureFixture[str], option: str) -> None:
    assert complaint(capsys, "step", *COMMAND, option).startswith(f"error: {option}: is a choice for a GPU")


def test_eager_steps_never_look_for_a_compiler(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def looked(_: str) -> bool:
        raise AssertionError("the compiler was started")

    monkeypatch.setattr("ncfm_core.execution.compiler_works", looked)
    monkeypatch.setattr("ncfm_core.execution.COMPILE_OPERATIONS", {"cpu": 0.0})
    assert not printed(capsys, "step", *COMMAND, "--steps", "1")["compiled"]


def test_equal_work_is_the_released_configuration(tmp_path: Path) -> None:
    work = prepare(dataset="cifar10", ipc=10, equal_work=True, made=True, data=tmp_path, device="cpu")

    method, model = work.spec.method.model_dump(mode="json"), work.spec.model
    assert {name: method[name] for name in ("real_batch", "num_frequencies", "factor", "reuse", "steps")} == {
        "real_batch": 1024,
        "num_frequencies": 4096,
        "factor": 2,
        "reuse": 1,
        "steps": 20_000,
    }
    assert (method["sampler"], method["discrepancy"], method["precision"]) == ("gaussian", "characteristic", "float32")
    assert (method["discrepancy_weight"], method["calibration_weight"], method["amplitude_weight"]) == (300, 1, 0.5)
    assert (method["schedule"], method["image_weight_decay"]) == ("plateau", 5e-4)
    assert (method["init"], method["real_sampling"], method["labels"]) == ("tiled", "prefix", "hard")
    assert method["augment"] == {"policy": "stack", "ops": ["color", "crop", "cutout"]}
    assert (model.name, model.depth, model.width, model.norm) == ("convnet", 3, 128, "instance")
    assert work.spec.teachers.count == 20
    described = work.describe()
    assert described["equal_work"] is True and described["data"] == "made"
    assert work.dataset.train_images.shape == (50_000, 3, 32, 32)
    assert image_forwards(work.spec.method, decoded=400, real=10_240) == 11_040
    assert set(RELEASED) == {"method", "model", "teachers"}


def test_equal_work_is_not_claimed_once_it_was_changed() -> None:
    work = prepare(dataset="digits", ipc=1, equal_work=True, changes=["model.width=64"])
    assert work.describe()["equal_work"] is False


@pytest.mark.parametrize(
    "change",
    [
        {"reuse": 1, "sampler": "gaussian"},
        {"reuse": 4, "sampler": "scale_mixture"},
        {"reuse": 4, "sampler": "scale_mixture", "calibration_weight": 0.0},
        {"reuse": 2, "discrepancy": "mean"},
    ],
)
def test_image_forwards_are_those_that_happen(
    digits: Dataset, pool: TeacherPool, spec: JobSpec, change: dict[str, Any]
) -> None:
    document = spec.document()
    assert isinstance(document["method"], dict)
    method = resolve(document | {"method": document["method"] | {"factor": 2} | change}).method
    run = Distillation(digits, pool, method, ipc=2, seed=0, device=CPU, compiled=False)
    seen: list[int] = []

    def note(_module: nn.Module, images: tuple[Tensor, ...]) -> None:
        seen.append(len(images[0]))

    hook = pool.network.register_forward_pre_hook(note)
    for _ in run.run(until=8):
        pass
    hook.remove()
    assert sum(seen) / 8 == image_forwards(method, decoded=80, real=640)


def event(category: str, name: str, start: float, length: float, correlation: int | None = None) -> dict[str, Any]:
    arguments = {} if correlation is None else {"correlation": correlation}
    return {"ph": "X", "cat": category, "name": name, "ts": start, "dur": length, "args": arguments}


HOST = [
    event("user_annotation", "bench", 0, 100),
    event("user_annotation", "draw", 5, 10),
    event("user_annotation", "match", 20, 40),
    event("user_annotation", "Optimizer.step#AdamW.step", 70, 5),
    event("user_annotation", "optimizer", 70, 10),
    {"ph": "i", "name": "mark", "ts": 1},
]


def test_shares_are_of_wall_time_on_a_cpu() -> None:
    parts, clock = shares(HOST)
    assert clock == "wall"
    assert {name: share for name, share in parts.items() if share} == {
        "draw": 0.1,
        "match": 0.4,
        "optimizer": 0.1,
        "other": 0.4,
    }


def test_shares_are_of_device_time_on_a_gpu_by_the_moment_of_the_launch() -> None:
    device = [
        event("cuda_runtime", "cudaLaunchKernel", 21, 1, 1),
        event("kernel", "conv", 25, 30, 1),
        # Launched from the thread of the backward pass, computed after the region was left.
        event("cuda_driver", "cuLaunchKernel", 59, 1, 2),
        event("kernel", "conv_backward", 90, 60, 2),
        event("cuda_runtime", "cudaMemcpyAsync", 65, 1, 3),
        event("gpu_memcpy", "Memcpy DtoH", 150, 4, 3),
        event("gpu_memset", "Memset", 154, 6, 99),
    ]
    parts, clock = shares(HOST + device)
    assert clock == "device"
    assert {name: share for name, share in parts.items() if share} == {"match": 0.9, "other": 0.1}


class Turns:
    """A clock that lets so many things happen."""

    def __init__(self, turns: int) -> None:
        self.turns = turns

    def allows(self, expected: float | None = 0.0) -> bool:
        self.turns -= 1
        return self.turns >= 0


@pytest.fixture(scope="module")
def work() -> Work:
    return prepare(dataset="digits", ipc=1, teachers=2, changes=CHANGES, device="cpu", compiled=False)


def call(
    work: Work, folder: Path, turns: int, *, seeds: tuple[int, ...] = (0, 1), room: int = 64 * MIB
) -> dict[str, Any]:
    pipeline = Pipeline(
        work, seeds=seeds, clock=Turns(turns), say=SAY_NOTHING, folder=Folder(folder), folder_bytes=room
    )
    finished = pipeline.run()
    document: dict[str, Any] = pipeline.document()
    assert document["done"] is finished
    return document


@pytest.fixture(scope="module")
def whole(work: Work, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("whole")
    return folder, call(work, folder, 10**9)


@pytest.mark.parametrize("turns", [0, 1, 3])
def test_pipeline_cut_into_calls_gives_the_same_bits(
    work: Work, whole: tuple[Path, dict[str, Any]], tmp_path: Path, turns: int
) -> None:
    stops: list[tuple[str, bool]] = []
    while not (document := call(work, tmp_path, turns))["done"]:
        stops.append((document["stopped"]["part"], "step" in document["stopped"]))
        assert len(stops) < 100
    assert {part for part, _ in stops} == {"teachers", "distill", "evaluate"}
    assert turns == 3 or {("teachers", True), ("distill", True)} <= set(stops), "cut in the middle of both"
    assert document["calls"] == len(stops) + 1
    folder, expected = whole
    for group in (TEACHERS, SETS):
        ours, theirs = Folder(tmp_path).load(group), Folder(folder).load(group)
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert not Folder(tmp_path).load(GOING)
    for name in ("accuracy", "evaluations", "teacher_accuracy", "exact", "moments", "folder"):
        assert document[name] == expected[name] or name == "folder"
    assert expected["exact"] and expected["moments"] and expected["accuracy"]["n"] == 4
    assert document["folder"]["mib"] == pytest.approx(expected["folder"]["mib"], abs=0.01)


def test_pipeline_without_a_folder_gives_the_same_accuracies(work: Work, whole: tuple[Path, dict[str, Any]]) -> None:
    pipeline = Pipeline(work, seeds=(0, 1), clock=Turns(10**9), say=SAY_NOTHING, group=1)
    assert pipeline.run()
    document = pipeline.document()
    assert document["evaluations"] == whole[1]["evaluations"]
    assert "folder" not in document and isinstance(document["seconds"], dict)
    assert document["seconds"].keys() == {"teachers", "distill", "evaluate", "total"}


def test_seeds_can_be_added_to_a_finished_run(work: Work, whole: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    assert call(work, tmp_path, 10**9, seeds=(0,))["accuracy"]["n"] == 2
    assert call(work, tmp_path, 10**9, seeds=(0, 1))["evaluations"] == whole[1]["evaluations"]
    with pytest.raises(CheckpointError, match="differs in seeds"):
        call(work, tmp_path, 0, seeds=(1,))


def test_pipeline_that_does_not_fit_with_all_its_bits_goes_on_with_fewer_and_says_so(tmp_path: Path) -> None:
    work = prepare(dataset="digits", ipc=20, teachers=2, changes=CHANGES, device="cpu", compiled=False)
    least = CHOICES[-1].peak_bytes(content_of(work, 1)) + SLACK_BYTES
    documents: list[dict[str, Any]] = []
    while not documents or not documents[-1]["done"]:
        documents.append(call(work, tmp_path, 1, seeds=(0,), room=least))
        assert len(documents) < 50
    assert any(document.get("stopped", {}).get("part") == "distill" for document in documents)
    assert documents[-1]["stored"] == {"images": "uint16", "moments": "none", "teachers": "float16"}
    assert documents[-1]["moments"] is False and documents[-1]["exact"] is False
    assert documents[-1]["accuracy"]["n"] == 2


def test_command_stops_by_itself_and_goes_on(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    arguments = ("pipeline", *COMMAND, "--folder", str(tmp_path / "run"), "--seconds", "0.01")
    first, second = (printed(capsys, *arguments) for _ in range(2))
    assert not first["done"] and first["stopped"] == {"part": "teachers", "index": 0, "step": 1, "total": 11}
    assert second["stopped"]["step"] == 2 and second["calls"] == 2
    assert second["seconds"]["teachers"] > 0 and second["accuracy"]["mean"] is None
    assert second["folder"]["files"] == 2

    other = complaint(capsys, *arguments, "--set", "method.steps=10")
    assert "holds a run that differs in spec" in other and "name an empty folder" in other


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (("step", "--dataset", "digit", "--ipc", "1"), "unknown data set (got 'digit'). Did you mean 'digits'?"),
        (
            ("step", "--dataset", "cifar10", "--ipc", "1", "--data", "nowhere"),
            "random pixels of the same shape with --made",
        ),
        (("step", "--dataset", "digits", "--ipc", "1", "--set", "method.steps"), "not of the form dotted.key=value"),
        (("step", "--dataset", "digits", "--ipc", "1", "--set", "method.stesp=1"), "Did you mean 'steps'?"),
        (("step", "--dataset", "digits", "--ipc", "1", "--preset", "paper"), "Use preset: quick"),
        (("pipeline", "--dataset", "digits", "--ipc", "1", "--seconds", "5"), "Name one with --folder"),
        (
            (
                "pipeline",
                "--dataset",
                "digits",
                "--ipc",
                "1",
                "--folder",
                "nowhere/run",
                "--folder-mib",
                "1",
                "--teachers",
                "99",
            ),
            "the run needs",
        ),
    ],
)
def test_bad_input_is_told_in_one_line(
    capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...], expected: str
) -> None:
    assert expected in complaint(capsys, *arguments)
    assert not Path("nowhere").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_cuda_is_refused_where_there_is_none(capsys: pytest.CaptureFixture[str]) -> None:
    said = complaint(capsys, "step", "--dataset", "digits", "--ipc", "1", "--device", "cuda")
    assert said.startswith("error: --device: ") and "Use --device cpu" in said
