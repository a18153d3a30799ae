"""The installed package: its requirements, its commands, and use from an empty folder."""

import importlib
import re
import subprocess
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
# Extras that a plain CPU machine does not install: each has a requirements-NAME.txt of its own.
ELSEWHERE = {"tpu": "tpu", "cuda": "cuda12", "gcs": "gcs", "beam": "beam"}


def requirements(name):
    lines = (ROOT / name).read_text().splitlines()
    stripped = [re.sub(r"\s+#.*", "", line).strip() for line in lines]
    return [line for line in stripped if line and not line.startswith(("#", "-r"))]


def test_requirements_are_those_of_the_package():
    extras = PROJECT["optional-dependencies"]
    here = [row for name, rows in extras.items() if name not in ELSEWHERE for row in rows]
    assert sorted(requirements("requirements.txt")) == sorted(PROJECT["dependencies"] + here)
    for extra, file in ELSEWHERE.items():
        assert requirements(f"requirements-{file}.txt") == extras[extra]


def test_every_console_script_is_a_command():
    for target in PROJECT["scripts"].values():
        module, _, function = target.partition(":")
        assert callable(getattr(importlib.import_module(module), function)), target


def test_public_names_are_there_from_any_folder(tmp_path):
    """Of `Session` too: test_cli.py imports it, with the commands, from another folder."""
    command = [sys.executable, "-c", "import emu_jax; assert emu_jax.__version__.count('.') == 2"]
    subprocess.run(command, cwd=tmp_path, env={"PYTHONPATH": str(ROOT)}, check=True)


def test_types_of_the_package_are_published():
    assert (ROOT / "emu_jax" / "py.typed").exists()
