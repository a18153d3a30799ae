"""Laws of the layout: imports run one way, so that code reads from the bottom up.

Each test lists every offender.
"""

import ast
from pathlib import Path

from emu_jax.stages import STAGES

# From the bottom up. A module may import from rows above its own here, and from its own folder.
ORDER = (
    ("types", "tree", "config", "files", "hlo", "html", "batching"),
    ("cli",),
    ("hardware",),
    ("sharding",),
    ("processes", "models/*", "data/*"),
    (
        "losses",
        "optim",
        "weights/convert",
        "weights/pickles",
        "weights/files",
        "weights/family",
        "weights/llama",
        "weights/eva_clip",
        "weights/t5",
        "weights/emu1",
        "weights/peft",
        "weights/stable_diffusion",
        "weights/inception",
        "weights/clip",
        "weights/families",
    ),
    ("stages",),
    ("step", "checkpoint/*"),
    ("metric_writer", "watchdog", "profiler", "initial", "throughput", "workdir"),
    ("plan",),
    ("generate/*", "weights/transfer"),
    ("loop", "checks", "evaluate/*"),
    ("hooks",),
    # Nothing imports the demo except its own command.
    ("demo/*",),
    ("verify/*",),
    ("train",),
    ("fit/*", "__init__", "*/__main__"),
)
# Modules that serve every stage alike, so they name none of them.
LOOP = ("step.py", "throughput.py", "loop.py")
# Packages that nothing imports.
ABSENT = {"torch", "tensorflow", "keras", "haiku"}
# Packages that only functions import, when they are called.
LATE = {"transformers"}
# What data code, which uses NumPy and not JAX, may import of emu_jax.
DATA_MAY_IMPORT = {"data", "config", "types", "files", "cli", "html"}
MODULES = sorted(path for path in Path("emu_jax").rglob("*.py") if path.read_text())
OTHERS = sorted(
    path for folder in ("configs", "tests", "benchmarks") for path in Path(folder).rglob("*.py")
)


def imports(path, at_import=False):
    """Names of all that a file imports: "jax.numpy", "emu_jax.models.emu".

    at_import: only what Python imports with the module, not inside functions.
    """
    nodes = [ast.parse(path.read_text())]
    while nodes:
        node = nodes.pop()
        if at_import and isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        nodes.extend(ast.iter_child_nodes(node))
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative imports hide where they lead"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def roots(path, at_import=False):
    """Names of the packages that a file imports: "jax"."""
    return {name.split(".")[0] for name in imports(path, at_import)}


def ours(path):
    """The modules of the package that a file imports, as paths within it: "models/emu"."""
    for name in imports(path):
        parts = name.split(".")
        if parts[0] == "emu_jax":
            # Names imported from a module are not modules: drop them.
            while len(parts) > 1 and not is_module(parts):
                parts.pop()
            if len(parts) > 1:
                yield "/".join(parts[1:])


def is_module(parts):
    """Whether the parts of a dotted name lead to a file of Python."""
    return Path(*parts).with_suffix(".py").is_file() or Path(*parts, "__init__.py").is_file()


def own(path):
    """A file's path within the package: "models/emu"."""
    return "/".join(path.relative_to("emu_jax").with_suffix("").parts).removesuffix("/__init__")


def height(module):
    """Number of the row of ORDER that names the module or all of its folder."""
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


def test_imports_run_one_way():
    wrong = []
    for path in MODULES:
        module = own(path)
        for imported in ours(path):
            same_folder = imported.split("/")[0] == module.split("/")[0]
            below = height(imported) < height(module)
            if not below and not (same_folder and height(imported) <= height(module)):
                wrong.append(f"{module} imports {imported}")
    assert not wrong, "\n".join(wrong)


def test_data_is_numpy():
    wrong = []
    for path in MODULES:
        if own(path).startswith("data"):
            foreign = {name.split("/")[0] for name in ours(path)} - DATA_MAY_IMPORT
            foreign |= roots(path) & {"jax", "flax", "optax"}
            wrong += [f"{path} imports {name}" for name in sorted(foreign)]
    assert not wrong, "\n".join(wrong)


def test_nothing_imports_the_demo():
    wrong = []
    for path in MODULES:
        if own(path).split("/")[0] != "demo":
            guests = [name for name in ours(path) if name.split("/")[0] == "demo"]
            wrong += [f"{path} imports {name}" for name in guests]
    assert not wrong, "\n".join(wrong)


def test_configs_import_no_code():
    configs = [path for path in OTHERS if path.parts[0] == "configs"]
    wrong = [f"{path} imports {name}" for path in configs for name in ours(path)]
    assert configs and not wrong, "\n".join(wrong)


def test_absent_and_late_packages():
    assert len(MODULES) > 30 and len(OTHERS) > 10
    wrong = []
    for path in (*MODULES, *OTHERS):
        wrong += [f"{path} imports {name}" for name in sorted(ABSENT & roots(path))]
        early = LATE & roots(path, at_import=True)
        wrong += [f"{path} imports {name} outside a function" for name in sorted(early)]
    assert not wrong, "\n".join(wrong)


def test_the_loop_names_no_stage():
    wrong = []
    for path in (Path("emu_jax", name) for name in LOOP):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Constant) and node.value in STAGES:
                wrong.append(f"{path}:{node.lineno}: {node.value!r}")
    assert STAGES and not wrong, "\n".join(wrong)


def test_module_docstrings():
    """Every module says what it is, in at most 8 lines."""
    wrong = []
    for path in MODULES:
        docstring = ast.get_docstring(ast.parse(path.read_text())) or ""
        lines = len(docstring.splitlines())
        if not 1 <= lines <= 8:
            wrong.append(f"{path}: {lines} lines")
    assert not wrong, "\n".join(wrong)
