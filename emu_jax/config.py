"""Configs: a Python file returns a ConfigDict, and the command line overrides its fields.

The result is locked: an unknown field is an error that names the nearest known one. Read next:
configs/base.py.
"""

import ast
import difflib
import importlib.util
import sys
import textwrap
import traceback
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

from ml_collections import ConfigDict

# The configs of this project: inside the package if a wheel is installed, else in the checkout.
_INSTALLED = Path(__file__).parent / "configs"
CONFIGS = _INSTALLED if _INSTALLED.is_dir() else Path(__file__).parent.parent / "configs"

# The lowest and the highest random seed: JAX takes integers of 64 bits.
SEEDS = (-(2**63), 2**63 - 1)


class UserError(Exception):
    """A mistake that the user can correct. One line: what is wrong, where, and what to do."""


class Field(NamedTuple):
    """A documented field or group of a config."""

    # Path from the root, such as "optim.steps".
    path: str
    # The default value; for a group, the ConfigDict of its fields.
    default: Any
    # The comment above the field in the source, joined into one line.
    comment: str


def load(arguments: list[str]) -> ConfigDict:
    """The locked config of `--config=FILE[:ARGUMENT]` and `--config.a.b=value` overrides.

    FILE is looked for in the current folder, then, if it begins with "configs/", among this
    project's configs. `--config.a.b value` works, too. Raises UserError for a missing file, an
    unknown field (naming the nearest known one) and a value of the wrong type.
    """
    pairs = list(_pairs(arguments))
    files = [value for key, value in pairs if key == "config"]
    if len(files) != 1:
        raise UserError("give one config file, for example --config=configs/pretrain.py")
    config = _from_file(files[0])
    for key, text in pairs:
        if key.startswith("config."):
            override(config, key.removeprefix("config."), text)
        elif key != "config":
            raise UserError(
                f"unknown flag --{key}; a field of the config is set by --config.FIELD=VALUE"
            )
    return config


def override(config: ConfigDict, key: str, text: str) -> None:
    """Set the field `key` ("a.b.c") of config, in place, from the text of a command line."""
    *groups, name = key.split(".")
    owner = config
    for group in groups:
        owner = _member(config, key, owner, group)
    owner[name] = _value(key, text, _member(config, key, owner, name))


def _member(config: ConfigDict, key: str, owner: Any, name: str) -> Any:
    """Return owner[name], or raise a UserError that names the field nearest to `key`."""
    if isinstance(owner, ConfigDict) and name in owner:
        return owner[name]
    raise UserError(f"the config has no field {key!r}{_nearest(set(_paths(config)), key)}")


def _nearest(known: set[str], key: str) -> str:
    """ "; did you mean 'a.b.c'?" with the known field nearest to `key`; "" if none is near."""
    near = difflib.get_close_matches(key, sorted(known), 1, 0.5)
    # The user may have left out the group of the field.
    near += [path for path in sorted(known) if path.split(".")[-1] == key.split(".")[-1]]
    return f"; did you mean {near[0]!r}?" if near else ""


def to_dict(config: ConfigDict) -> dict[str, Any]:
    """The config as plain JSON-able values (tuples become lists)."""

    def plain(value):
        if isinstance(value, dict):
            return {key: plain(item) for key, item in value.items()}
        return [plain(item) for item in value] if isinstance(value, (tuple, list)) else value

    return plain(config.to_dict())


def from_dict(values: dict[str, Any]) -> ConfigDict:
    """Inverse of `to_dict`: lists become tuples; the result is locked."""

    def rich(value):
        if isinstance(value, dict):
            return {key: rich(item) for key, item in value.items()}
        return tuple(rich(item) for item in value) if isinstance(value, list) else value

    return ConfigDict(rich(values)).lock()


def fields(file: str = "configs/base.py") -> list[Field]:
    """Every group and field that a config file defines, in order, with its comment.

    For a file other than base.py, only the fields that it adds to those of base.py are listed.
    Comments are read from the source; the comment of a field without one is "".
    """
    path = _find(file)
    config = load([f"--config={file}"])
    known = set(_paths(load(["--config=configs/base.py"])))
    found = []
    for name, comment in _Source(path).function("get_config"):
        default = config
        for part in name.split("."):
            default = default[part]
        if path.name == "base.py" or name not in known:
            found.append(Field(name, default, comment))
    return found


def help_text(usage: str, file: str = "configs/base.py") -> str:
    """The usage, then every field of a config file with its default and comment."""
    lines = [usage.strip()]
    for field in fields(file):
        comment = textwrap.wrap(field.comment, 100, initial_indent="    ", subsequent_indent="    ")
        if isinstance(field.default, ConfigDict):
            lines += ["", f"{field.path}:", *comment]
        else:
            default = textwrap.shorten(str(field.default) or '""', 70, placeholder=" ...")
            lines += [f"  --config.{field.path}={default}", *comment]
    return "\n".join(lines)


class _Source:
    """The source of a config file, searched for fields and the comments above them."""

    def __init__(self, path: Path):
        self.path = path
        self.lines = path.read_text().splitlines()
        # The module's names: its functions, the values of its constants, and its imports.
        self.functions = {}
        self.constants = {}
        self.imports = {}
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.FunctionDef):
                self.functions[node.name] = node
            elif isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
                self.constants[node.targets[0].id] = node.value
            elif isinstance(node, ast.ImportFrom) and node.module and "configs." in node.module:
                source = path.with_name(f"{node.module.removeprefix('configs.')}.py")
                for alias in node.names:
                    self.imports[alias.asname or alias.name] = (source, alias.name)

    def function(self, name: str) -> Iterator[tuple[str, str]]:
        """Yield (path, comment) of every field of the config that a function returns."""
        if name in self.imports:
            source, original = self.imports[name]
            yield from _Source(source).function(original)
        for node in self.functions[name].body if name in self.functions else ():
            if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Attribute):
                # The statement is c.GROUP.FIELD = value.
                path = ast.unparse(node.targets[0]).partition(".")[2]
                yield from self.field(path, node.lineno, node.value)
            elif isinstance(node, ast.Return) and node.value:
                yield from self.expression(node.value)

    def expression(self, node: ast.expr) -> Iterator[tuple[str, str]]:
        """Yield (path, comment) of every field in the group that an expression builds, if any."""
        if isinstance(node, ast.Name) and node.id in self.constants:
            yield from self.expression(self.constants[node.id])
        # The expression is DEFAULTS | changes.
        elif isinstance(node, ast.BinOp):
            yield from self.expression(node.left)
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            if node.func.id == "ConfigDict":
                for argument in node.args:
                    yield from self.expression(argument)
            elif node.func.id == "dict":
                for keyword in node.keywords:
                    if keyword.arg:
                        yield from self.field(keyword.arg, keyword.lineno, keyword.value)
                    else:
                        # The argument is **defaults.
                        yield from self.expression(keyword.value)
            else:
                yield from self.function(node.func.id)

    def field(self, path: str, line: int, value: ast.expr) -> Iterator[tuple[str, str]]:
        """Yield (path, comment) of the field that is set on `line`, and of the fields in it."""
        first = line - 1
        while self.lines[first - 1].lstrip().startswith("#"):
            first -= 1
        block = self.lines[first : line - 1]
        yield path, " ".join(text.strip().lstrip("# ") for text in block)
        for inner, comment in self.expression(value):
            yield f"{path}.{inner}", comment


def _pairs(arguments: list[str]) -> Iterator[tuple[str, str]]:
    """(key, value) of each `--key=value` and `--key value`."""
    rest = iter(arguments)
    for argument in rest:
        if not argument.startswith("--"):
            raise UserError(
                f"unexpected argument {argument!r}; flags look like --config.optim.steps=100"
            )
        key, equals, value = argument[2:].partition("=")
        if not equals:
            value = next(rest, None)
            if value is None:
                raise UserError(f"--{key} needs a value: --{key}=...")
        yield key, value


def _from_file(text: str) -> ConfigDict:
    """The locked config of FILE[:ARGUMENT]."""
    name, _, argument = text.partition(":")
    path = _find(name)
    config = _run_file(path, text, argument)
    _check_fields(config, text)
    return config.lock()


def _run_file(path: Path, text: str, argument: str) -> ConfigDict:
    """The config that a file returns. Raises a UserError that names the line of any failure."""
    if path.suffix != ".py":
        raise UserError(f"config {text!r} is not a Python file: its name must end in .py")
    with _importable_configs(path.resolve().parent):
        try:
            config = _run_module(path).get_config(*([argument] if argument else []))
        # A config is a program, so it may raise anything.
        except Exception as error:
            raise UserError(f"config {text!r}{_what_failed(path, error)}") from error
    if not isinstance(config, ConfigDict):
        raise UserError(
            f"config {text!r}: get_config returned {type(config).__name__}, not a ConfigDict; "
            "let it start from configs.base.get_config(), change fields, and return the result"
        )
    return config


def _what_failed(path: Path, error: Exception) -> str:
    """The line, class and message of an exception that a config file has raised."""
    frames = traceback.extract_tb(error.__traceback__)
    if isinstance(error, ValueError) and Path(frames[-1].filename).parent == CONFIGS:
        # This project's configs raise ValueError for an unknown ARGUMENT.
        return f": {error}"
    lines = [frame.lineno for frame in frames if Path(frame.filename) == path.resolve()]
    if isinstance(error, SyntaxError):
        lines = [error.lineno]
    place = f", line {lines[-1]}" if lines else ""
    return f"{place}: {type(error).__name__}: {error}".splitlines()[0]


def _check_fields(config: ConfigDict, text: str) -> None:
    """Raise UserError for a field that base.py does not have, or that only base.py has.

    A config file may add groups with fields of their own, but a new field in a group of base.py is
    a misspelt one, which nothing would read.
    """
    base = _run_file(_find("configs/base.py"), "configs/base.py", "")
    known = set(_paths(base))
    given = set(_paths(config))
    for path in sorted(given - known):
        group, _, name = path.rpartition(".")
        value = config[group][name] if group else config[name]
        if group in known | {""} and not isinstance(value, ConfigDict):
            hint = _nearest(known, path)
            raise UserError(f"config {text!r} sets {path!r}, which is not a field{hint}")
    if missing := sorted(known - given):
        raise UserError(
            f"config {text!r} lacks {missing[0]!r}: let get_config start from "
            "configs.base.get_config(), which has every field"
        )


def _find(name: str) -> Path:
    """Path of a config file. Raises UserError, listing the existing ones, if it is missing."""
    path = Path(name)
    if path.is_file():
        return path
    if path.parts[:1] == ("configs",) and (ours := CONFIGS.joinpath(*path.parts[1:])).is_file():
        return ours
    there = {
        file.name
        for folder in (Path("configs"), CONFIGS)
        for file in folder.glob("*.py")
        if "def get_config" in file.read_text()
    }
    names = ", ".join(f"configs/{file}" for file in sorted(there))
    raise UserError(f"no config file {name!r}; there are {names}")


def _run_module(path: Path) -> ModuleType:
    """The module of a config file, run under the name `configs.NAME`."""
    spec = importlib.util.spec_from_file_location(f"configs.{path.stem}", path)
    # A file whose name ends with .py always has a spec and a loader.
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@contextmanager
def _importable_configs(folder: Path) -> Generator[None]:
    """Let a config in `folder` run `from configs.base import ...` inside this context.

    Modules of `configs` are looked up in `folder` if that folder is named configs, then in
    ./configs, then in this project. If `folder` has a different name, files in it can also be
    imported as `from FOLDER.NAME import ...`.
    """
    before = dict(sys.modules)
    own = [folder] if folder.name == "configs" else []
    packages = {"configs": [*own, Path("configs").resolve(), CONFIGS]}
    if folder.name not in before:
        packages.setdefault(folder.name, [folder])

    def forget() -> None:
        for name in list(sys.modules):
            if name.split(".")[0] in packages:
                del sys.modules[name]

    forget()
    for name, folders in packages.items():
        sys.modules[name] = ModuleType(name)
        sys.modules[name].__path__ = [str(each) for each in folders]
    try:
        yield
    finally:
        forget()
        sys.modules.update(
            {name: module for name, module in before.items() if name.split(".")[0] in packages}
        )


def _paths(config: ConfigDict, prefix: str = "") -> Iterator[str]:
    """Paths of all groups and fields."""
    for key, value in config.items():
        yield prefix + key
        if isinstance(value, ConfigDict):
            yield from _paths(value, f"{prefix}{key}.")


def _value(key: str, text: str, old: Any) -> Any:
    """`text` as a value of the type of `old`, the field's default. Raises UserError."""
    if isinstance(old, ConfigDict):
        raise UserError(
            f"{key!r} is a group of fields ({', '.join(old)}); "
            f"set one of them: --config.{key}.{next(iter(old))}=..."
        )
    if isinstance(old, str):
        return text
    kind = type(old)
    if kind is bool:
        new = {"true": True, "false": False}.get(text.lower())
    else:
        try:
            new = ast.literal_eval(text)
        except (ValueError, SyntaxError):
            new = None
    if kind is float and type(new) is int:
        new = float(new)
    if kind is tuple and type(new) is list:
        new = tuple(new)
    if type(new) is not kind:
        raise UserError(
            f"{key!r} must be of type {kind.__name__}, like {old!r}; it was given {text!r}"
        )
    return new
