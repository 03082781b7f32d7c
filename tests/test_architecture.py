"""Who may import whom: the table of docs/architecture.md, held against the code."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("ncfm_core", "worker", "service")
STDLIB = frozenset(sys.stdlib_module_names)

TORCH_FREE = frozenset(
    {
        "spec",
        "parts",
        "space",
        "catalog",
        "networks",
        "geometry",
        "imagenet",
        "presets",
        "protocols",
        "submission",
        "ranking",
        "errors",
        "cost",
        "progress",
        "__init__",
    }
)
"""Modules of ncfm_core that the service may use."""
LIGHT = frozenset(
    {
        "plan",
        "storage",
        "records",
        "resuming",
        "logs",
        "redaction",
        "locations",
        "buckets",
        "settings",
        "spec_file",
        "__init__",
    }
)
"""Modules of worker that the service may use."""

HEAVY = frozenset({"torch", "torchvision", "ray", "mlflow", "sklearn", "numpy", "safetensors", "pyarrow", "PIL"})
CORE_MAY = STDLIB | {"numpy", "torch", "torchvision", "pydantic", "safetensors", "ncfm_core"}
FORBIDDEN_NAMES = frozenset({"utils", "helpers", "common", "misc", "util", "helper"})


def sources(package: str) -> Iterator[Path]:
    yield from sorted((ROOT / package).rglob("*.py"))


def imports(path: Path, *, top_level_only: bool = False) -> set[str]:
    """Dotted names that a file imports; `from a import b` counts as `a.b`."""
    tree = ast.parse(path.read_text())
    found: set[str] = set()
    for node in tree.body if top_level_only else ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def roots(names: set[str]) -> set[str]:
    return {name.split(".")[0] for name in names}


def inside(names: set[str], package: str) -> set[str]:
    """First-level modules of a package among dotted names."""
    return {name.split(".")[1] if "." in name else "__init__" for name in names if name.split(".")[0] == package}


def test_core_imports_only_numbers() -> None:
    for path in sources("ncfm_core"):
        inside_datasets = path.parent.name == "datasets"
        assert roots(imports(path)) <= CORE_MAY | ({"sklearn", "PIL"} if inside_datasets else set()), path
        # They are for some data sets alone, and take their time to import.
        assert not roots(imports(path, top_level_only=True)) & {"sklearn", "PIL", "torchvision"}, path


def test_only_the_command_line_knows_of_the_benchmark() -> None:
    for package in PACKAGES:
        for path in sources(package):
            if path.parent.name != "bench":
                assert "bench" not in inside(imports(path), "ncfm_core"), path


def test_torch_free_modules_stay_torch_free() -> None:
    for name in TORCH_FREE:
        found = imports(ROOT / "ncfm_core" / f"{name}.py")
        assert roots(found) <= STDLIB | {"pydantic", "ncfm_core"}, name
        assert inside(found, "ncfm_core") <= TORCH_FREE, name


def test_worker_never_imports_the_service_and_light_modules_stay_light() -> None:
    for path in sources("worker"):
        assert "service" not in roots(imports(path)), path
    for name in LIGHT:
        found = imports(ROOT / "worker" / f"{name}.py")
        assert not roots(found) & HEAVY, name
        assert inside(found, "worker") <= LIGHT, name
        assert inside(found, "ncfm_core") <= TORCH_FREE, name


def test_only_tracking_imports_mlflow_and_only_tasks_and_search_import_ray() -> None:
    for path in sources("worker"):
        found = roots(imports(path))
        assert "mlflow" not in found or path.name == "tracking.py", path
        assert "ray" not in found or path.name in ("tasks.py", "search.py"), path


def test_only_data_sets_know_of_pickles() -> None:
    for package in PACKAGES:
        for path in sources(package):
            found = imports(path)
            knows = any({"pickle", "cloudpickle", "dill", "joblib"} & set(name.split(".")) for name in found)
            assert not knows or path.parent.name == "datasets", path


def test_service_uses_light_modules_alone() -> None:
    for path in sources("service"):
        found = imports(path, top_level_only=True)
        assert not roots(found) & HEAVY, path
        assert inside(found, "ncfm_core") <= TORCH_FREE, path
        assert inside(found, "worker") <= LIGHT, path
        assert not roots(imports(path)) & {"ray", "mlflow"}, path


PASSES_IT_ON = frozenset({"service/local/supervisor.py", "service/cli/demo.py", "ncfm_core/bench/parts.py"})
"""What hands the environment to a process that it starts, or sets what a library reads there, and reads nothing for itself."""


def test_environment_is_read_in_settings_alone() -> None:
    names, found = {"environ", "environb", "getenv", "getenvb"}, set[str]()
    for package in PACKAGES:
        for path in sources(package):
            if path.name == "settings.py":
                continue
            is_read = bool({f"os.{name}" for name in names} & imports(path))
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "os":
                    is_read |= node.attr in names
            found |= {str(path.relative_to(ROOT))} if is_read else set()
    assert found == PASSES_IT_ON


def graph() -> dict[str, set[str]]:
    modules = {
        ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
        for package in PACKAGES
        for path in sources(package)
    }
    edges: dict[str, set[str]] = {}
    for name, path in modules.items():
        targets = {t for t in imports(path, top_level_only=True)}
        edges[name] = {
            target if target in modules else target.rpartition(".")[0]
            for target in targets
            if target in modules or target.rpartition(".")[0] in modules
        } - {name}
    return edges


def test_there_are_no_import_cycles() -> None:
    edges = graph()
    done: set[str] = set()

    def visit(name: str, path: tuple[str, ...]) -> None:
        assert name not in path, f"cycle: {' -> '.join([*path[path.index(name) :], name])}"
        if name not in done:
            for target in edges.get(name, ()):
                visit(target, (*path, name))
            done.add(name)

    for module in edges:
        # A package's __init__ re-exports its modules; the cycle that makes with them is none at run time.
        if not (ROOT / module.replace(".", "/") / "__init__.py").exists():
            visit(module, ())


@pytest.mark.parametrize("package", PACKAGES)
def test_files_have_one_purpose_each(package: str) -> None:
    for path in sources(package):
        assert path.stem not in FORBIDDEN_NAMES, path
        assert len(path.read_text().splitlines()) <= 400, f"{path} is long: does it hold two ideas?"
