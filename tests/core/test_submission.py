from __future__ import annotations

import json
import math
from typing import Any

import pytest
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from ncfm_core import spec as spec_module
from ncfm_core.catalog import DATASETS
from ncfm_core.errors import SpecError
from ncfm_core.parts import Part
from ncfm_core.spec import JobSpec, NcfmSpec
from ncfm_core.submission import check_counts, resolve, submission_schema

FOLDER: dict[str, Any] = {"name": "imagefolder", "uri": "/data/birds.tar.gz", "image_size": 64}


@pytest.mark.parametrize("dataset", DATASETS)
@pytest.mark.parametrize("ipc", [1, 10, 50])
def test_resolve_of_a_resolved_spec_gives_it_again(dataset: str, ipc: int) -> None:
    for preset in DATASETS[dataset].presets:
        spec = resolve({"dataset": FOLDER if dataset == "imagefolder" else dataset, "ipc": ipc, "preset": preset})
        assert resolve(spec.document()) == spec
        assert resolve(json.loads(spec.model_dump_json())).digest() == spec.digest()


def test_paper_preset_has_the_published_values() -> None:
    spec = resolve({"dataset": "cifar10", "ipc": 10})
    assert spec.preset == "paper"
    assert (spec.method.steps, spec.method.num_frequencies, spec.method.num_components) == (20_000, 1024, 64)
    assert (spec.method.real_batch, spec.method.factor, spec.method.init) == (1024, 2, "tiled")
    assert (spec.teachers.count, spec.teachers.training.epochs, spec.model.width) == (20, 60, 128)
    assert (spec.evaluate[0].training.epochs, spec.evaluate[0].students) == (2000, 10)


@pytest.mark.parametrize(
    ("dataset", "ipc", "scale", "weight"),
    [
        ("digits", 1, 1.0, 10.0),
        ("digits", 5, 3.0, 1.0),
        ("fashion-mnist", 1, 1.0, 10.0),
        ("cifar10", 1, 1.0, 30.0),
        ("cifar10", 10, 1.0, 10.0),
    ],
)
def test_quick_preset_weighs_by_images_per_class(dataset: str, ipc: int, scale: float, weight: float) -> None:
    method = resolve({"dataset": dataset, "ipc": ipc, "preset": "quick"}).method
    assert (method.frequency_scale, method.calibration_weight) == (scale, weight)
    named = resolve({"dataset": dataset, "ipc": ipc, "preset": "quick", "method": {"calibration_weight": 2}}).method
    assert (named.frequency_scale, named.calibration_weight) == (scale, 2)


def test_minmax_is_the_default_everywhere() -> None:
    for name, facts in DATASETS.items():
        for preset in facts.presets:
            dataset = FOLDER if name == "imagefolder" else name
            assert resolve({"dataset": dataset, "ipc": 1, "preset": preset}).method.sampler == "scale_mixture"


@pytest.mark.parametrize(
    ("image_size", "depth"), [(8, 2), (16, 3), (28, 3), (32, 3), (50, 4), (64, 4), (128, 5), (224, 6), (256, 6)]
)
def test_network_is_as_deep_as_the_images_allow(image_size: int, depth: int) -> None:
    spec = resolve({"dataset": FOLDER | {"image_size": image_size}, "ipc": 1})
    assert spec.model.depth == depth
    resolve({"dataset": FOLDER | {"image_size": 28}, "ipc": 1, "model": {"depth": 5}})


def test_counts_that_are_assumed_bound_nothing_until_the_data_are_counted() -> None:
    spec = resolve({"dataset": FOLDER, "ipc": 5000})
    assert spec.dataset.facts.title == "birds, 64x64 colour"
    check_counts(spec, (9000, 5000))
    with pytest.raises(SpecError, match=r"smallest class of imagefolder has .4999.*Choose 1 to 4999") as caught:
        check_counts(spec, (9000, 4999))
    assert (caught.value.problems[0].field, caught.value.problems[0].value) == ("ipc", "5000")


def test_spec_without_own_data_says_nothing_of_them() -> None:
    assert resolve({"dataset": "digits", "ipc": 1}).document()["dataset"] == {"name": "digits"}
    assert resolve({"dataset": FOLDER, "ipc": 1}).document()["dataset"] == FOLDER


def test_digits_never_flip() -> None:
    for name in ("digits", "mnist", "svhn"):
        text = json.dumps(resolve({"dataset": name, "ipc": 1}).document())
        assert '"flip"' not in text


def test_a_changed_evaluation_is_no_longer_the_protocol() -> None:
    submission: dict[str, Any] = {"dataset": "digits", "ipc": 1}
    assert resolve(submission).evaluate[0].protocol == "quick"
    assert resolve(submission | {"evaluate": [{"students": 9}]}).evaluate[0].protocol == "quick"
    assert resolve(submission | {"evaluate": [{"training": {"epochs": 7}}]}).evaluate[0].protocol == "custom"


def test_evaluation_takes_the_jobs_model_unless_it_names_its_own() -> None:
    spec = resolve({"dataset": "digits", "ipc": 1, "model": {"width": 16}, "evaluate": [{}, {"model": {"width": 64}}]})
    assert [entry.model.width for entry in spec.evaluate] == [16, 64]


@pytest.mark.parametrize(
    ("dataset", "preset", "model", "expected"),
    [
        ("cifar10", "paper", "resnet18", ("resnet18", None, 64, "instance")),
        ("cifar10", "quick", "resnet18", ("resnet18", None, 16, "instance")),
        ("cifar10", "paper", {"name": "resnet18", "norm": "batch"}, ("resnet18", None, 64, "batch")),
        ("cifar10", "paper", "resnet18_ap", ("resnet18_ap", None, 64, "instance")),
        ("cifar10", "paper", "alexnet", ("alexnet", None, 64, "none")),
        ("fashion-mnist", "quick", "vgg11", ("vgg11", None, 16, "instance")),
        ("cifar10", "paper", {"name": "convnet", "depth": 4}, ("convnet", 4, 128, "instance")),
        ("cifar10", "paper", {"depth": 4, "norm": "batch"}, ("convnet", 4, 128, "batch")),
        ("cifar10", "paper", "convnet", ("convnet", 3, 128, "instance")),
        ("fashion-mnist", "paper", {"depth": 5}, ("convnet", 5, 128, "instance")),
        ("digits", "quick", "resnet18", ("resnet18", None, 16, "group")),
        ("digits", "quick", "alexnet", ("alexnet", None, 16, "none")),
    ],
)
def test_network_may_be_given_by_name_or_by_some_of_its_fields(
    dataset: str, preset: str, model: Any, expected: tuple[Any, ...]
) -> None:
    spec = resolve({"dataset": dataset, "ipc": 1, "preset": preset, "model": model})
    assert (spec.model.name, spec.model.depth, spec.model.width, spec.model.norm) == expected
    assert spec.evaluate[0].model == spec.model
    assert resolve(spec.document()) == spec


def test_evaluation_on_another_network_takes_that_networks_defaults() -> None:
    evaluate: Any = [{}, {"model": "alexnet"}, {"model": {"norm": "batch"}}, {"model": "convnet"}]
    spec = resolve({"dataset": "cifar10", "ipc": 1, "model": {"width": 16}, "evaluate": evaluate})
    labels = ["convnet-3, width 16", "alexnet, width 64", "convnet-3, width 16, norm batch", "convnet-3, width 16"]
    assert [entry.model.label for entry in spec.evaluate] == labels
    assert [entry.model.batch_statistics for entry in spec.evaluate] == [False, False, True, False]
    assert resolve(spec.document()) == spec


BAD: list[tuple[Any, str, str]] = [
    ({}, "dataset", "required"),
    ({"dataset": "digits"}, "ipc", "required"),
    ({"dataset": "digit", "ipc": 1}, "dataset.name", "Did you mean 'digits'?"),
    ({"dataset": {"nme": "digits"}, "ipc": 1}, "dataset", "object with a name"),
    ({"dataset": 5, "ipc": 1}, "dataset", "must be a name"),
    ({"dataset": "digits", "ipc": 0}, "ipc", "greater than or equal to 1"),
    ({"dataset": "digits", "ipc": -3}, "ipc", "greater than or equal to 1"),
    ({"dataset": "digits", "ipc": 1.5}, "ipc", "valid integer"),
    ({"dataset": "digits", "ipc": 1.0}, "ipc", "valid integer"),
    ({"dataset": "digits", "ipc": "1"}, "ipc", "valid integer"),
    ({"dataset": "digits", "ipc": True}, "ipc", "valid integer"),
    ({"dataset": "digits", "ipc": None}, "ipc", "valid integer"),
    ({"dataset": "digits", "ipc": 119}, "ipc", "smallest class"),
    ({"dataset": "digits", "ipc": 10**400}, "ipc", ""),
    ({"dataset": "digits", "ipc": 1, "method": {"image_lr": math.nan}}, "method.image_lr", "finite"),
    ({"dataset": "digits", "ipc": 1, "method": {"image_lr": math.inf}}, "method.image_lr", "finite"),
    ({"dataset": "digits", "ipc": 1, "method": {"stps": 3}}, "method.stps", "Did you mean 'steps'?"),
    ({"dataset": "digits", "ipc": 1, "sed": 3}, "sed", "Did you mean 'seed'?"),
    ({"dataset": "digits", "ipc": 1, "evaluate": [{"model": {"dept": 3}}]}, "evaluate.0.model.dept", "'depth'"),
    ({"dataset": "digits", "ipc": 1, "method": {"sampler": "gausian"}}, "method.sampler", "'gaussian'"),
    ({"dataset": "digits", "ipc": 1, "method": {"num_frequencies": 100}}, "method.num_frequencies", "(got 100)"),
    (
        {"dataset": "digits", "ipc": 1, "method": {"num_frequencies": 100}},
        "method.num_frequencies",
        "not a multiple of num_components, which is 64 (got 100). Choose 64, say",
    ),
    ({"dataset": "digits", "ipc": 1, "model": {"depth": 4}}, "model.depth", "at most 3"),
    ({"dataset": "digits", "ipc": 1, "model": "resnet"}, "model.name", "Did you mean 'resnet18'?"),
    ({"dataset": "digits", "ipc": 1, "model": "convnet4"}, "model.name", "Did you mean 'convnet'?"),
    ({"dataset": "digits", "ipc": 1, "model": {"name": 3}}, "model.name", "Known: convnet"),
    ({"dataset": "digits", "ipc": 1, "model": {"name": ["resnet18"]}}, "model.name", "Did you mean"),
    ({"dataset": "digits", "ipc": 1, "model": {"name": "resnet18", "depth": 4}}, "model.depth", "Leave it out"),
    ({"dataset": "digits", "ipc": 1, "model": {"depth": None}}, "model.depth", "Choose 1 to 6"),
    ({"dataset": "digits", "ipc": 1, "model": {"depth": 7}}, "model.depth", "Choose 6 or less"),
    ({"dataset": "digits", "ipc": 1, "model": {"name": "resnet18", "norm": "none"}}, "model.norm", "instance, group"),
    ({"dataset": "digits", "ipc": 1, "model": {"norm": "layer"}}, "model.norm", "Known: instance"),
    (
        {"dataset": "digits", "ipc": 1, "model": {"name": "resnet18", "norm": "instance"}},
        "model.norm",
        "group or batch",
    ),
    ({"dataset": "digits", "ipc": 1, "model": "vgg11"}, "model.name", "at least 32 pixels"),
    ({"dataset": "digits", "ipc": 1, "evaluate": [{"model": "vgg11"}]}, "evaluate.0.model.name", "convnet, alexnet"),
    ({"dataset": "digits", "ipc": 1, "model": {"name": "alexnet", "witdh": 8}}, "model.witdh", "'width'"),
    ({"dataset": "digits", "ipc": 1, "preset": "paper"}, "preset", "preset: quick"),
    ({"dataset": "digits", "ipc": 1, "preset": []}, "preset", "unknown preset"),
    ({"dataset": "digits", "ipc": 1, "method": 3}, "method", "object"),
    ({"dataset": "digits", "ipc": 1, "preset": "fast"}, "preset", "Use quick, the only one that digits has"),
    ({"dataset": "cifar10", "ipc": 1, "preset": "fast"}, "preset", "paper"),
    ({"dataset": "digits", "ipc": 1, "evaluate": []}, "evaluate", "has 0 entries, which are too few (got []). Give 1"),
    ({"dataset": "digits", "ipc": 1, "evaluate": [{}] * 17}, "evaluate", "has 17 entries, which are too many"),
    ({"dataset": "digits", "ipc": 1, "evaluate": 3}, "evaluate", "not a list (got 3). Write a list."),
    ({"dataset": "digits", "ipc": 1, "evaluate": [3]}, "evaluate.0", "not an object (got 3). Write an object"),
    ({"dataset": "digits", "ipc": 1, "search": {"space": {}}}, "search.space", "has 0 entries, which are too few"),
    ({"dataset": "digits", "ipc": 1, "search": {"space": 3}}, "search.space", "not an object"),
    ({"dataset": "digits", "ipc": 1, "resources": {"gpus": "x"}}, "resources.gpus", ""),
    ({"dataset": "digits", "ipc": 1, "resources": {"gpus": 1.5}}, "resources.gpus", ""),
    ({"dataset": "digits", "ipc": 1, "search": {}}, "search.space", "required"),
    (
        {"dataset": "digits", "ipc": 1, "search": {"space": {"image_lrr": [1.0]}}},
        "search.space.image_lrr",
        "'image_lr'",
    ),
    (
        {"dataset": "digits", "ipc": 1, "search": {"space": {"lr": {"uniform": [1, 2]}}}},
        "search.space.lr",
        "[1.0, 2.0]",
    ),
    (
        {"dataset": "digits", "ipc": 1, "search": {"space": {"image_lr": [0.1, "abc"]}}},
        "search.space.image_lr",
        "input should be a valid number (got 'abc'). Write a number without quotes, such as 0.01.",
    ),
    (
        {"dataset": "digits", "ipc": 1, "search": {"space": {"image_lr": {"uniform": [1, 2000]}}}},
        "search.space.image_lr",
        "(got 2000.0). Choose 1000 or less.",
    ),
    (
        {"dataset": "digits", "ipc": 1, "search": {"space": {"sampler": ["gausian"]}}},
        "search.space.sampler",
        "'gaussian'",
    ),
    (
        {"dataset": "digits", "ipc": 1, "search": {"space": {"num_components": [64, 7]}}},
        "search.space.num_components",
        "not a multiple of num_components, which is 7 (got 7). Leave out what does not go together.",
    ),
    (
        {"dataset": "digits", "ipc": 1, "search": {"space": {"image_lr": [0.1, -1.0]}}},
        "search.space.image_lr",
        "greater",
    ),
    (
        {"dataset": "digits", "ipc": 1, "search": {"space": {"image_lr": {"uniform": [2, 1]}}}},
        "search.space.image_lr",
        "below",
    ),
    (
        {"dataset": "digits", "ipc": 1, "search": {"space": {"reuse": {"loguniform": [-1, 1]}}}},
        "search.space.reuse",
        "-1",
    ),
    ([1], "", "object"),
    ({"dataset": "imagefolder", "ipc": 1}, "dataset.uri", "needs uri."),
    ({"dataset": FOLDER | {"image_size": 65}, "ipc": 1}, "method.factor", "does not divide images of 65 pixels"),
    ({"dataset": {"name": "imagefolder", "uri": "/x"}, "ipc": 1}, "dataset.image_size", "needs image_size."),
    ({"dataset": {"name": "digits", "uri": "/x"}, "ipc": 1}, "dataset.uri", "uri belongs to imagefolder"),
    ({"dataset": {"name": "digits", "image_size": 64}, "ipc": 1}, "dataset.image_size", "has its own (got 64)"),
    ({"dataset": FOLDER | {"uri": "http://host/birds.tar"}, "ipc": 1}, "dataset.uri", "http:// cannot be read"),
    ({"dataset": FOLDER | {"uri": ""}, "ipc": 1}, "dataset.uri", "at least 1"),
    ({"dataset": FOLDER | {"uri": "a\n"}, "ipc": 1}, "dataset.uri", ""),
    ({"dataset": FOLDER | {"image_size": 7}, "ipc": 1}, "dataset.image_size", "8 or more"),
    ({"dataset": FOLDER | {"image_sise": 7}, "ipc": 1}, "dataset.image_sise", "'image_size'"),
    ({"dataset": FOLDER | {"image_size": 20}, "ipc": 1, "model": {"depth": 5}}, "model.depth", "at most 4"),
]


@pytest.mark.parametrize(("submission", "field", "says"), BAD, ids=[str(i) for i in range(len(BAD))])
def test_resolve_refuses_and_names_the_field(submission: Any, field: str, says: str) -> None:
    with pytest.raises(SpecError) as caught:
        resolve(submission)
    assert field in [problem.field for problem in caught.value.problems]
    assert says in str(caught.value)


def test_resolve_refuses_deep_nesting_without_recursion() -> None:
    deep: Any = 1
    for _ in range(100_000):
        deep = [deep]
    with pytest.raises(SpecError, match="nested deeper"):
        resolve({"dataset": "digits", "ipc": 1, "method": deep})


def test_every_number_of_the_spec_is_bounded_and_every_field_described() -> None:
    parts = [part for part in vars(spec_module).values() if isinstance(part, type) and issubclass(part, BaseModel)]
    fields: list[tuple[str, FieldInfo]] = [
        (f"{part.__name__}.{name}", field)
        for part in parts
        if part is not Part
        for name, field in part.model_fields.items()
    ]
    plain = [name for name, field in fields if field.annotation in (int, float) and not field.metadata]
    assert plain == []
    assert [name for name, field in fields if not field.description] == ["DatasetSpec.name"][:0]


def test_submission_schema_asks_for_data_set_and_ipc_alone() -> None:
    schema = submission_schema()
    assert schema["required"] == ["dataset", "ipc"]
    assert set(schema["properties"]) == set(JobSpec.model_fields)


def test_search_space_accepts_every_numeric_and_categorical_field_of_the_method() -> None:
    for name, field in NcfmSpec.model_fields.items():
        if name in ("name", "augment", "num_components", "num_frequencies"):
            continue
        value = resolve({"dataset": "digits", "ipc": 1}).method.model_dump()[name]
        resolve({"dataset": "digits", "ipc": 1, "search": {"space": {name: [value]}}})
        assert field.description


@pytest.mark.parametrize("seconds", [9, 10_000_001, float("inf"), -1, "60"])
def test_wall_time_has_bounds(seconds: float | str) -> None:
    with pytest.raises(SpecError, match=r"limits\.wall_seconds"):
        resolve({"dataset": "digits", "ipc": 1, "limits": {"wall_seconds": seconds}})


def test_wall_time_is_not_limited_by_itself() -> None:
    assert resolve({"dataset": "digits", "ipc": 1}).limits.wall_seconds is None
    assert resolve({"dataset": "digits", "ipc": 1, "limits": {"wall_seconds": 60}}).limits.wall_seconds == 60
