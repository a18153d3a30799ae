"""Imports run one way, so that the code can be read from the bottom up; and what the house does
without stays out.
"""

import ast
from pathlib import Path

import pytest

from emu_jax.stages import STAGES

# From the bottom up. A module imports what is below it and what is in its own folder; nothing
# beside it, nothing above.
ORDER = (
    ("types", "tree", "config", "files", "hlo"),
    ("cli",),
    ("hardware",),
    ("sharding",),
    ("processes", "models/*", "data/*"),
    (
        "losses",
        "optim",
        *(
            f"weights/{name}"
            for name in (
                "convert",
                "pickles",
                "files",
                "family",
                "llama",
                "eva_clip",
                "t5",
                "emu1",
                "peft",
                "stable_diffusion",
                "inception",
                "clip",
                "families",
            )
        ),
    ),
    ("stages",),
    ("checkpoint",),
    ("journal", "watch", "initial"),
    ("loop", "generate/*", "weights/transfer"),
    ("evaluate/*",),
    ("verify/*",),
    ("train",),
    ("fit", "*/__main__"),
)
ABSENT = {"torch", "tensorflow", "transformers", "keras", "haiku"}
MODULES = sorted(path for path in Path("emu_jax").rglob("*.py") if path.read_text())
OTHERS = sorted(
    path for folder in ("configs", "tests", "benchmarks") for path in Path(folder).rglob("*.py")
)


def imports(path):
    """Every module that a file imports, wherever in it: "jax.numpy", "emu_jax.models.emu"."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative imports hide where they lead"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def ours(path):
    """The modules of the package that a file imports, as paths within it: "models/emu"."""
    for name in imports(path):
        parts = name.split(".")
        if parts[0] == "emu_jax":
            while len(parts) > 1 and not (
                Path(*parts).with_suffix(".py").is_file() or Path(*parts, "__init__.py").is_file()
            ):
                # what is imported from a module
                parts.pop()
            if len(parts) > 1:
                yield "/".join(parts[1:])


def own(path):
    return "/".join(path.relative_to("emu_jax").with_suffix("").parts).removesuffix("/__init__")


def height(module):
    """Its place in ORDER; that of its whole folder if there is one."""
    if module.endswith("__main__"):
        return len(ORDER) - 1
    found = [
        number
        for number, row in enumerate(ORDER)
        for name in row
        if name in (module, f"{module.split('/')[0]}/*")
    ]
    assert found, f"{module} has no place in the order of imports"
    return found[0]


@pytest.mark.parametrize("path", MODULES, ids=own)
def test_imports_run_one_way(path):
    module = own(path)
    for imported in ours(path):
        same_folder = imported.split("/")[0] == module.split("/")[0]
        assert height(imported) < height(module) or (
            same_folder and height(imported) <= height(module)
        ), f"{module} imports {imported}"


@pytest.mark.parametrize(
    "path", [path for path in MODULES if own(path).startswith("data")], ids=own
)
def test_data_is_numpy(path):
    assert {module.split("/")[0] for module in ours(path)} <= {"data", "config", "types"}
    assert not {name.split(".")[0] for name in imports(path)} & {"jax", "flax", "optax"}


@pytest.mark.parametrize("path", [path for path in OTHERS if path.parts[0] == "configs"], ids=str)
def test_configs_import_no_code(path):
    assert not list(ours(path))


def test_what_the_house_does_without():
    assert len(MODULES) > 30 and len(OTHERS) > 10
    for path in (*MODULES, *OTHERS):
        assert not ABSENT & {name.split(".")[0] for name in imports(path)}, path


def test_the_loop_names_no_stage():
    words = {
        node.value
        for node in ast.walk(ast.parse(Path("emu_jax/loop.py").read_text()))
        if isinstance(node, ast.Constant)
    }
    assert STAGES and not words & set(STAGES)


@pytest.mark.parametrize("path", MODULES, ids=own)
def test_a_module_says_what_it_is(path):
    docstring = ast.get_docstring(ast.parse(path.read_text()))
    assert docstring and len(docstring.splitlines()) <= 8
