"""The OpenAPI document: the framework's, with our submission schema and our problem documents in place of its own."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi

from ncfm_core.submission import submission_schema
from service.api.envelope import ENVELOPE_SCHEMA
from service.api.errors import ProblemDocument
from service.jobs import moves_table

SUBMISSION = {
    "requestBody": {
        "required": True,
        "content": {
            "application/json": {
                "schema": {"$ref": "#/components/schemas/Submission"},
                "examples": {
                    "smallest": {"value": {"dataset": "digits", "ipc": 1}},
                    "quick": {"value": {"dataset": "cifar10", "ipc": 10, "preset": "quick", "seed": 1}},
                    "labelled": {"value": {"dataset": "digits", "ipc": 1, "priority": 60, "labels": {"paper": "dm"}}},
                },
            }
        },
    }
}
"""Of a route that reads the body itself."""

DESCRIPTION = f"""Dataset distillation as a service: post a data set and a number of images per class, get back a tiny
synthetic set that trains a network almost as well as the full data, and the evidence.

Errors are `application/problem+json` and name the field, its value and the way out. A parameter that a route does not have is
refused with 422. Times are UTC, sizes bytes, accuracies percent.

### States of a job

{moves_table()}
"""


def problems(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """The `responses` of a route that may answer with a problem."""
    schema = {"$ref": "#/components/schemas/ProblemDocument"}
    return {
        status: {"description": "Problem", "content": {"application/problem+json": {"schema": schema}}}
        for status in (*statuses, 401, 403, 429, 431, 500)
    }


def install(app: FastAPI) -> None:
    """Make the app serve our document."""

    def openapi() -> dict[str, Any]:
        if app.openapi_schema is None:
            app.openapi_schema = _document(app)
        return app.openapi_schema

    # The framework's documented way to change its document.
    app.openapi = openapi  # type: ignore[method-assign]


def _document(app: FastAPI) -> dict[str, Any]:
    document = get_openapi(
        title=app.title, version=app.version, description=DESCRIPTION, routes=app.routes, tags=app.openapi_tags
    )
    components = document.setdefault("components", {})
    components["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer", "bearerFormat": "ncfm_<id>_<secret>"}}
    # Either a key or none: where no key exists yet, none is needed on this machine.
    document["security"] = [{"key": []}, {}]
    schemas = components.setdefault("schemas", {})
    for name in ("HTTPValidationError", "ValidationError"):
        schemas.pop(name, None)
    template = "#/components/schemas/{model}"
    submission = _moved(submission_schema())
    submission["properties"] |= ENVELOPE_SCHEMA
    problem = ProblemDocument.model_json_schema(ref_template=template)
    for name, schema in (("Submission", submission), ("ProblemDocument", problem)):
        schemas.update(schema.pop("$defs", {}))
        schemas[name] = schema
    for operations in document["paths"].values():
        for operation in operations.values():
            for parameter in operation.get("parameters", ()):
                _unwrap_optional(parameter["schema"])
            # Every route may refuse a parameter, also one that has none.
            operation["responses"].setdefault("422", problems(422)[422])
            for status, response in operation["responses"].items():
                if "HTTPValidationError" in str(response):
                    operation["responses"][status] = problems(422)[422]
    return document


def _unwrap_optional(schema: dict[str, Any]) -> None:
    """Take the null out of an optional parameter's schema: a query and a header have no way to say it."""
    kinds = [kind for kind in schema.get("anyOf", ()) if kind != {"type": "null"}]
    if len(kinds) == 1:
        del schema["anyOf"]
        # What is said of the parameter as a whole, such as the length of a text, comes second.
        schema.update(kinds[0] | schema)


def _moved(schema: Any) -> Any:
    """References into a schema's own definitions, turned into references into the document's components."""
    if isinstance(schema, dict):
        return {
            key: value.replace("#/$defs/", "#/components/schemas/") if key in ("$ref",) else _moved(value)
            for key, value in schema.items()
        }
    return [_moved(item) for item in schema] if isinstance(schema, list) else schema
