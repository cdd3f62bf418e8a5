"""Import rules: launch -> isofast -> isofast_kernels, one file each for DeepSpeed and DALI, Triton
only in the kernels."""

import ast
import functools
import graphlib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("isofast", "kernels", "launch", "bench", "tests")
FILES = [path for package in PACKAGES for path in sorted((ROOT / package).rglob("*.py"))]


@functools.cache
def _imports(path: Path) -> set[str]:
    """Return every module imported anywhere in a file."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            found.add(node.module)
            found.update(f"{node.module}.{alias.name}" for alias in node.names)
    return found


def _importers(module: str, within: tuple[str, ...]) -> set[str]:
    return {
        str(path.relative_to(ROOT))
        for path in FILES
        if path.relative_to(ROOT).parts[0] in within
        and any(name == module or name.startswith(f"{module}.") for name in _imports(path))
    }


ALL = ("isofast", "kernels", "launch", "bench")
NOT_FOR_KERNELS = ("isofast", "pydantic", "torchvision", "sklearn", "numpy")


@pytest.mark.parametrize(
    ("module", "within", "allowed"),
    [
        ("deepspeed", ALL, {"isofast/training/parallel.py"}),
        ("nvidia", ALL, {"isofast/data/dali.py"}),
        ("isofast.training.loop", ALL, {"isofast/cli.py", "isofast/__init__.py"}),
        *((package, ALL, set()) for package in ("launch", "bench", "tests")),
        ("triton", ("isofast", "launch"), set()),
        *((package, ("kernels",), set()) for package in NOT_FOR_KERNELS),
    ],
)
def test_who_imports(module, within, allowed):
    importers = _importers(module, within)
    # the scripts in bench/ share a harness
    assert {path for path in importers if not path.startswith(f"{module}/")} == allowed


# a package imports only itself and lower levels; methods and run are independent of each other
LEVELS = {
    **{"errors": 0, "distributed": 1, "config": 2, "data": 3, "methods": 4, "run": 4},
    **{"training": 5, "evaluation": 6, "paper": 7, "cli": 8},
}


@pytest.mark.parametrize("path", sorted((ROOT / "isofast").rglob("*.py")), ids=lambda p: p.stem)
def test_packages_import_downwards(path):
    own = path.relative_to(ROOT / "isofast").parts[0].removesuffix(".py")
    if own == "__init__":
        return
    for name in _imports(path):
        if name.startswith("isofast."):
            other = name.split(".")[1]
            assert other == own or LEVELS[other] < LEVELS[own], name


def test_no_modules_import_in_a_circle():
    modules = {
        ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
        for path in sorted((ROOT / "isofast").rglob("*.py"))
    }
    graph = {
        # `from isofast.data import dali` inside isofast/data/ imports only the module
        name: {other for other in _imports(path) & {*modules} if not name.startswith(other)}
        for name, path in modules.items()
    }
    # raises CycleError
    assert len([*graphlib.TopologicalSorter(graph).static_order()]) == len(modules)


def test_few_modules_stand_beside_the_packages():
    beside = {path.name for path in (ROOT / "isofast").glob("*.py")} - {"__init__.py"}
    assert beside == {"cli.py", "distributed.py", "errors.py"}
