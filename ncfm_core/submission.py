"""From a submission to a spec. Torch-free.

A submission is the spec with anything left out; the smallest one is `{"dataset": "digits", "ipc": 1}`. `resolve` lays it over its
preset, once; the job keeps both, so that a later release never changes it.
"""

from __future__ import annotations

import json
import types
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Annotated, Any, Union, get_args, get_origin

from pydantic import BaseModel, JsonValue, ValidationError

from ncfm_core import presets
from ncfm_core.catalog import DATASETS, DatasetFacts, PresetName, dataset_facts, nearest
from ncfm_core.errors import Problem, SpecError, shorten
from ncfm_core.geometry import size_problem
from ncfm_core.networks import NETWORKS
from ncfm_core.parts import UnfitError
from ncfm_core.presets import overlay
from ncfm_core.protocols import PROTOCOLS, RATE_FRACTION, Document, held_out_count, protocol
from ncfm_core.spec import DatasetSpec, JobSpec

_NAMED = ("dataset", "method", "model")
"""Parts that may be given by their name alone."""
MAX_DEPTH = 32
"""Deepest nesting of a submission."""
HINTS = {
    "greater_than_equal": "Choose {} or more.",
    "greater_than": "Choose more than {}.",
    "less_than_equal": "Choose {} or less.",
    "less_than": "Choose less than {}.",
    "finite_number": "Choose a finite number.",
    "int_type": "Write a whole number without quotes, such as 1.",
    "int_from_float": "Write a whole number, such as 1.",
    "float_type": "Write a number without quotes, such as 0.01.",
    "string_type": "Write text in quotes.",
    "model_type": "Write an object of its fields.",
    "bool_type": "Write true or false.",
    "tuple_type": "Write a list.",
    "dict_type": "Write an object.",
    "too_short": "Give {1} or more, or leave it out.",
    "too_long": "Give {1} or fewer.",
    "string_too_short": "Write {} or more characters.",
    "string_too_long": "Keep to {} characters.",
}
"""The way out for what pydantic calls an error of that type; {} is the bound, or {1} where a name comes before it."""
WORDS = {
    "too_short": "has {2} entries, which are too few",
    "too_long": "has {2} entries, which are too many",
    "tuple_type": "not a list",
    "dict_type": "not an object",
    "model_type": "not an object",
}
"""What is wrong, where pydantic speaks of Python."""
FORMS = {
    r"^[\w .:-]+$": "Use letters, digits, spaces and _ . : -.",
    r"^[^\x00-\x1f\x7f]+$": "Leave out the control characters.",
}
"""The patterns of the spec in words."""


def _named(value: JsonValue) -> JsonValue:
    return {"name": value} if isinstance(value, str) else value


def _dataset(document: Mapping[str, JsonValue]) -> DatasetFacts:
    dataset = _named(document.get("dataset"))
    if dataset is None:
        raise SpecError(Problem("dataset", "", "required", f"Name one of: {', '.join(DATASETS)}."))
    name = dataset.get("name") if isinstance(dataset, dict) else None
    if not isinstance(name, str):
        raise SpecError.of("dataset", dataset, "must be a name or an object with a name", 'Try "dataset": "digits".')
    if dataset_facts(name).name != "imagefolder":
        return dataset_facts(name)
    # What its preset is depends on the size of its images, so this part is checked first.
    try:
        return DatasetSpec.model_validate_json(json.dumps(dataset)).facts
    except ValidationError as error:
        raise _spec_error(error, "dataset") from None


def _preset(document: Mapping[str, JsonValue], facts: DatasetFacts) -> PresetName:
    preset = document.get("preset", facts.default_preset)
    known = [name for name in facts.presets if name == preset]
    if not known:
        if preset == "paper":
            raise SpecError.of("preset", preset, f"no published values exist for {facts.name}", "Use preset: quick.")
        hint = nearest(str(preset), facts.presets)
        if len(facts.presets) == 1:
            hint = f"Use {facts.presets[0]}, the only one that {facts.name} has, or leave it out."
        raise SpecError.of("preset", preset, "unknown preset", hint)
    return known[0]


def _model(given: JsonValue, base: JsonValue, *, preset: PresetName, facts: DatasetFacts) -> JsonValue:
    """Laid over the base where that is the same network, else over the defaults of the network that it names."""
    given = _named(given)
    name = given.get("name") if isinstance(given, dict) else None
    if isinstance(name, str) and name in NETWORKS and isinstance(base, dict) and base.get("name") != name:
        base = presets.network(NETWORKS[name].name, preset, facts)
    model: JsonValue = overlay(base, given)
    return model


def _evaluations(
    given: JsonValue,
    default: Document,
    model: JsonValue,
    *,
    fill: Callable[[JsonValue, JsonValue], JsonValue],
    recipe: Callable[[str], Document],
) -> JsonValue:
    """Each entry laid over its protocol, or the preset's; one whose training was changed by hand is no longer that protocol.

    Args:
        given: `evaluate` as submitted.
        default: the preset's entry.
        model: the job's network.
        fill: a network as submitted, laid over another one.
        recipe: the entry of a protocol.
    """
    if not isinstance(given, list):
        return [default | {"model": model}] if given is None else given
    entries: list[JsonValue] = []
    for entry in given:
        if isinstance(entry, dict):
            network = fill(entry["model"], model) if "model" in entry else model
            named = entry.get("protocol")
            base = recipe(named) if isinstance(named, str) and named in PROTOCOLS else default
            training = entry.get("training")
            if isinstance(training, dict) and "lr" in training and "lr_grid" not in entry:
                entry = entry | {"lr_grid": []}  # a rate set by hand is meant to be used
            entry = overlay(base, entry) | {"model": network}
            changed = any(entry[name] != base[name] for name in ("training", "lr_grid"))
            if changed and entry["protocol"] == base["protocol"]:
                entry["protocol"] = "custom"
        entries.append(entry)
    return entries


def _complete(document: Mapping[str, JsonValue]) -> tuple[Document, DatasetFacts]:
    """The submission laid over its preset, not yet validated."""
    facts = _dataset(document)
    name = _preset(document, facts)
    given: Document = dict(document) | {name: _named(document[name]) for name in _NAMED if name in document}
    evaluations = given.pop("evaluate", None)
    ipc = given.get("ipc")
    base, fill = presets.preset(name, facts, ipc), partial(_model, preset=name, facts=facts)
    complete: Document = overlay(base, given)
    if "model" in given:
        complete["model"] = fill(given["model"], base["model"])
    complete["evaluate"] = _evaluations(
        evaluations,
        presets.evaluation(name, facts, ipc),
        complete["model"],
        fill=fill,
        recipe=lambda named: protocol(named, facts, ipc),
    )
    method, search = complete["method"], complete["search"]
    if isinstance(search, dict) and isinstance(method, dict):
        complete["search"] = presets.SEARCH | {"steps": method.get("steps")} | search
    return complete, facts


def resolve(document: Mapping[str, JsonValue]) -> JobSpec:
    """Fill in everything that a submission leaves out.

    Resolving the document of a resolved spec gives that spec again.

    Args:
        document: the submission, as plain JSON values.

    Raises:
        SpecError: anything is unknown, out of bounds or does not fit together; it has one problem for each field.
    """
    if not isinstance(document, Mapping):
        raise SpecError.of("", document, "a submission is an object", 'Try {"dataset": "digits", "ipc": 1}.')
    if _depth(document) > MAX_DEPTH:
        raise SpecError.of("", None, f"nested deeper than {MAX_DEPTH} levels", "A spec needs five.")
    complete, facts = _complete(document)
    try:
        spec = JobSpec.model_validate_json(json.dumps(complete))
    except ValidationError as error:
        raise _spec_error(error) from None
    _check_fit(spec, facts)
    return spec


def _spec_error(error: ValidationError, *above: str) -> SpecError:
    """The error in our words; `above` are the fields around what was validated."""
    details = error.errors(include_url=False)
    # A list with a bad entry is also reported as too short: only the entry is news.
    cause = [each for each in details if each["type"] != "too_short" or len(details) == 1]
    return SpecError(*(problem_of(each | {"loc": (*above, *each["loc"])}) for each in cause))


def check_counts(spec: JobSpec, class_counts: Sequence[int]) -> None:
    """What a spec asks of the number of images, once the data were counted.

    Args:
        spec: resolved.
        class_counts: training images of each class.

    Raises:
        SpecError: a class is too small for the spec.
    """
    if too_many := _ipc_problem(spec, min(class_counts)):
        raise SpecError(too_many)


def _ipc_problem(spec: JobSpec, smallest_class: int) -> Problem | None:
    if spec.ipc <= smallest_class:
        return None
    message = f"more images per class than the smallest class of {spec.dataset.name} has ({smallest_class})"
    return Problem("ipc", str(spec.ipc), message, f"Choose 1 to {smallest_class}.")


def _check_fit(spec: JobSpec, facts: DatasetFacts) -> None:
    """What no single field can know: that the parts fit the data set and each other."""
    problems = []
    if not facts.assumed and (too_many := _ipc_problem(spec, facts.smallest_class)):
        problems.append(too_many)
    models = {"model": spec.model} | {f"evaluate.{i}.model": entry.model for i, entry in enumerate(spec.evaluate)}
    for where, model in models.items():
        if (too_small := size_problem(where, model, facts.image_size)) is not None:
            problems.append(too_small)
    if facts.image_size % spec.method.factor:
        message = f"does not divide images of {facts.image_size} pixels"
        problems.append(Problem("method.factor", str(spec.method.factor), message, "Choose 1, or an even image_size."))
    problems.extend(_check_space(spec))
    problems.extend(_check_judging(spec, facts))
    if problems:
        raise SpecError(*problems)


def _check_judging(spec: JobSpec, facts: DatasetFacts) -> list[Problem]:
    """Losses need the labels that they compare with, and a rate is chosen on images that are left over."""
    problems = []
    for name, training in (("teachers", spec.teachers.training), ("full_data", spec.full_data.training)):
        if training.needs_soft_labels:
            problem = "real images have classes and no teacher logits"
            problems.append(Problem(f"{name}.training.loss", repr(training.loss), problem, "Use cross_entropy."))
    most = facts.smallest_class - held_out_count(facts.smallest_class, RATE_FRACTION)
    for index, entry in enumerate(spec.evaluate):
        if entry.training.needs_soft_labels and spec.method.labels == "hard":
            field, value = ("protocol", "apm") if entry.protocol == "apm" else ("training.loss", entry.training.loss)
            problem = "needs soft labels (teacher logits), and the set has none"
            hint = "Set method.labels to soft, or judge it by another protocol, such as dc or ncfm."
            problems.append(Problem(f"evaluate.{index}.{field}", repr(value), problem, hint))
        if entry.lr_grid and spec.ipc > most and not facts.assumed:
            problem = f"the rate is chosen on real images apart from the baseline's, of which {most} a class are left"
            hint = f"Leave lr_grid empty, or choose an ipc of 1 to {most}."
            problems.append(Problem(f"evaluate.{index}.lr_grid", str(spec.ipc), problem, hint))
    return problems


def _check_space(spec: JobSpec) -> list[Problem]:
    """Every corner of the search space must be a legal method."""
    problems = []
    method = spec.method.model_dump(mode="json")
    for name, entry in (spec.search.space if spec.search else {}).items():
        where = f"search.space.{name}"
        if name not in method or isinstance(method[name], dict) or name == "name":
            fields = tuple(key for key, value in method.items() if not isinstance(value, dict) and key != "name")
            given = shorten(list(entry) if isinstance(entry, tuple) else entry.model_dump(mode="json"))
            problems.append(Problem(where, given, "not a field of method that can be searched", nearest(name, fields)))
            continue
        if isinstance(entry, tuple):
            candidates = list(entry)
        else:
            low, high = next(iter(entry.model_dump().values()))
            candidates = [low, high - 1 if isinstance(high, int) else high]
        for candidate in candidates:
            try:
                type(spec.method).model_validate_json(json.dumps(method | {name: candidate}))
            except ValidationError as error:
                found = problem_of(error.errors(include_url=False)[0])
                hint = found.hint if found.field == name else "Leave out what does not go together."
                problems.append(Problem(where, shorten(candidate), found.message, hint or "Leave it out."))
    return problems


def _depth(value: object) -> int:
    """Levels of nesting, counted without recursion."""
    deepest, level = 0, [value]
    while level:
        deepest += 1
        if deepest > MAX_DEPTH:
            break
        level = [
            child
            for item in level
            if isinstance(item, dict | list)
            for child in (item.values() if isinstance(item, dict) else item)
        ]
    return deepest


def problem_of(details: Any) -> Problem:
    """A validation error of pydantic in our words."""
    location = [
        part for part in details["loc"] if isinstance(part, int) or (part.replace("_", "").isalpha() and part.islower())
    ]
    kind, context = details["type"], details.get("ctx", {})
    if kind == "extra_forbidden":
        # An unknown key may look like anything, also like the names of unions that are left out above.
        key = str(details["loc"][-1])
        parents = location[:-1] if location[-1:] == [key] else location
        known = _fields_at(parents)
        return Problem(
            ".".join(map(str, [*parents, key])),
            shorten(details["input"]),
            "unknown key",
            nearest(key.lower(), known) if known else "Leave it out.",
        )
    path = ".".join(str(part) for part in location)
    if kind == "missing":
        return Problem(path, "", "required", "Add it.")
    value = shorten(details["input"])
    if kind == "literal_error":
        expected = context.get("expected", "").replace("'", "").replace(" or ", ", ").split(", ")
        return Problem(
            path, value, "not one of the values it may have", nearest(str(details["input"]), tuple(expected))
        )
    if kind == "value_error":
        unfit = context["error"]
        if isinstance(unfit, UnfitError):
            found = details["input"]
            if unfit.field:
                path, found = f"{path}.{unfit.field}".lstrip("."), found.get(unfit.field)
            return Problem(path, "" if found is None else shorten(found), str(unfit), unfit.hint)
        return Problem(path, value, details["msg"].removeprefix("Value error, "), "")
    return Problem(path, value, *in_words(details, FORMS))


def in_words(details: Any, forms: Mapping[str, str]) -> tuple[str, str]:
    """What is wrong by an error of pydantic, and the way out; the way out is empty where none is known.

    Args:
        details: of the error.
        forms: patterns in words.
    """
    kind, context, message = details["type"], details.get("ctx", {}), details["msg"]
    if kind == "string_pattern_mismatch":
        return "not of the form that it must have", forms.get(context["pattern"], "")
    bounds = [f"{value:g}" if isinstance(value, float) else value for value in context.values()]
    message = WORDS[kind].format(*bounds) if kind in WORDS else message[0].lower() + message[1:]
    return message, HINTS.get(kind, "").format(*bounds)


def _fields_at(location: list[str | int]) -> tuple[str, ...]:
    """The legal keys of the object at a location in the spec."""
    model: type[BaseModel] | None = JobSpec
    for part in location:
        if isinstance(part, int) or model is None:
            continue
        model = _model_in(model.model_fields[part].annotation) if part in model.model_fields else None
    return tuple(model.model_fields) if model is not None else ()


def _model_in(annotation: Any) -> type[BaseModel] | None:
    """The first model inside an annotation: through Annotated, unions and tuples."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    if get_origin(annotation) in (Annotated, Union, types.UnionType, tuple):
        return next((found for inner in get_args(annotation) if (found := _model_in(inner))), None)
    return None


def submission_schema() -> dict[str, Any]:
    """JSON Schema of a submission: that of the spec, where only `dataset` and `ipc` are required."""
    schema = JobSpec.model_json_schema()
    for part in (schema, *schema["$defs"].values()):
        part.pop("required", None)
    schema["required"] = ["dataset", "ipc"]
    for name in _NAMED:
        schema["properties"][name] = {"anyOf": [schema["properties"][name], {"type": "string"}]}
    for name in ("Uniform", "LogUniform", "RandInt"):
        schema["$defs"][name]["required"] = list(schema["$defs"][name]["properties"])
    schema["$defs"]["DatasetSpec"]["required"] = ["name"]
    schema["title"] = "Submission"
    return schema
