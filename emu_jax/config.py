"""Configs are values: a file, loaded by path, that returns a locked ConfigDict; overrides on the
command line.

Every key is known: a wrong one is an error that names the nearest right one. Read next:
configs/base.py.
"""

import ast
import difflib
import importlib.util
import sys
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict


class UserError(Exception):
    """Something the user can put right. Its message is one line: what is wrong, where, and what
    would be right.
    """


def load(arguments: list[str]) -> ConfigDict:
    """The locked config of `--config=FILE[:ARGUMENT]` and its overrides `--config.a.b=value` (or
    `--config.a.b value`).

    Raises UserError for a missing file, an unknown key (naming the nearest right one) and a value
    of another type.
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
    """Sets config's field `a.b.c` from the text of a command line, in place."""
    node, *rest = key.split(".")
    parent = config
    path = []
    for name in (node, *rest):
        if not isinstance(parent, ConfigDict) or name not in parent:
            known = sorted(_fields(config))
            near = (
                difflib.get_close_matches(key, known, 1, 0.5)
                or [k for k in known if k.split(".")[-1] == key.split(".")[-1]][:1]
            )
            raise UserError(
                f"the config has no field {key!r}"
                + (f"; did you mean {near[0]!r}?" if near else "")
            )
        path.append((parent, name))
        parent = parent[name]
    owner, name = path[-1]
    owner[name] = _value(key, text, owner[name])


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


def _pairs(arguments: list[str]):
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
    name, _, argument = text.partition(":")
    path = Path(name)
    if not path.is_file():
        raise UserError(
            f"no config file {name!r}; there are configs/pretrain.py, configs/demo.py, ..."
        )
    # so that a config may say `from configs.base import ...`
    root = str(path.resolve().parent.parent)
    spec = importlib.util.spec_from_file_location(f"_config_{path.stem}", path)
    module = importlib.util.module_from_spec(spec)
    sys.path.insert(0, root)
    try:
        spec.loader.exec_module(module)
        return module.get_config(*([argument] if argument else [])).lock()
    # a config is a program: anything may be wrong with it
    except Exception as error:
        raise UserError(f"config {text!r}: {error}".splitlines()[0]) from error
    finally:
        sys.path.remove(root)


def _fields(config: ConfigDict, prefix: str = ""):
    for key, value in config.items():
        yield prefix + key
        if isinstance(value, ConfigDict):
            yield from _fields(value, f"{prefix}{key}.")


def _value(key: str, text: str, old: Any) -> Any:
    if isinstance(old, ConfigDict):
        raise UserError(
            f"{key!r} is a group of fields ({', '.join(old)}); set one of them: --config.{key}.{next(iter(old))}=..."
        )
    if isinstance(old, str):
        return text
    kind = type(old)
    try:
        new = (
            {"true": True, "false": False}.get(text.lower(), None)
            if kind is bool
            else ast.literal_eval(text)
        )
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
