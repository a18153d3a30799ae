"""What the commands share: the parser, and how a command ends."""

import importlib.util
import os
import re
import subprocess
import sys

import pytest

from emu_jax import cli
from emu_jax.__main__ import main as commands_main
from emu_jax.config import UserError
from emu_jax.data.__main__ import main as data_main
from emu_jax.evaluate.__main__ import main as evaluate_main


@pytest.mark.parametrize(
    ("error", "status", "message"),
    [
        (UserError("no such thing"), 2, "error: no such thing\n"),
        (FileNotFoundError(2, "No such file", "a"), 2, "error: [Errno 2] No such file: 'a'\n"),
        (KeyboardInterrupt(), 130, "stopped by Ctrl-C\n"),
    ],
)
def test_a_command_ends_in_one_line(capsys, error, status, message):
    def command(_):
        raise error

    assert cli.run(command, []) == status
    assert capsys.readouterr().err == message


@pytest.mark.parametrize("lines", [1, 10**5])
def test_a_reader_that_stops_early_is_not_an_error(lines):
    program = f"""
import sys
from emu_jax import cli
sys.exit(cli.run(lambda _: print("line\\n" * {lines}), []))
"""
    pipe = subprocess.PIPE
    with subprocess.Popen([sys.executable, "-c", program], stdout=pipe, stderr=pipe) as process:
        process.stdout.close()
        assert process.stderr.read() == b""
    assert process.returncode == 0


def test_a_closed_stdout_is_not_an_error(monkeypatch):
    monkeypatch.setattr(sys, "stdout", None)
    assert cli.run(lambda _: 0, []) == 0


def test_a_parser_raises_and_knows_no_abbreviations():
    parser = cli.Parser()
    parser.add_argument("--limit")
    with pytest.raises(UserError, match="unrecognized arguments: --lim=3"):
        parser.parse_args(["--lim=3"])


def test_a_misspelt_flag_is_named_before_a_missing_one():
    parser = cli.Parser()
    parser.add_argument("--checkpoint", required=True)
    with pytest.raises(UserError, match="--chekpoint=a; did you mean --checkpoint?"):
        parser.parse_args(["--chekpoint=a"])


def test_a_full_disk_behind_stdout_is_one_line(capfd):
    with open("/dev/full", "w") as full:
        program = "from emu_jax import cli; raise SystemExit(cli.run(lambda _: print(1), []))"
        run = subprocess.run([sys.executable, "-c", program], stdout=full)
    assert run.returncode == 2
    error = capfd.readouterr().err
    assert error.startswith("error: ") and error.endswith("No space left on device\n")
    assert error.count("\n") == 1


def test_ctrl_c_ends_a_starting_command_without_a_traceback(capfd):
    """Before cli.run, the process dies of the signal; after it, one line is printed."""
    program = """
import os, signal, sys
# The tests may run in the background, where a shell ignores Ctrl-C.
signal.signal(signal.SIGINT, signal.default_int_handler)
sys.argv[0] = "-m"
import emu_jax
assert signal.getsignal(signal.SIGINT) is signal.SIG_DFL
from emu_jax import cli
sys.argv = ["emu-data"]
sys.exit(cli.run(lambda _: os.kill(os.getpid(), signal.SIGINT)))
"""
    assert subprocess.run([sys.executable, "-c", program]).returncode == 130
    assert capfd.readouterr().err == "stopped by Ctrl-C\n"


@pytest.mark.parametrize("package", sorted(cli.EXTRAS))
def test_a_missing_package_of_an_extra_ends_in_one_line(capsys, monkeypatch, package):
    monkeypatch.setitem(sys.modules, package, None)

    def command(_):
        importlib.import_module(f"{package}.part")

    assert cli.run(command, []) == 2
    error = capsys.readouterr().err
    assert f" needs the package {package}: in the checkout of emu_jax, pip install '.[" in error
    assert error.startswith("error: ") and error.count("\n") == 1


def test_a_missing_package_behind_another_error_ends_in_one_line(capsys):
    def command(_):
        try:
            raise ModuleNotFoundError(name="gcsfs")
        except ModuleNotFoundError as error:
            raise ImportError("Please install gcsfs") from error

    assert cli.run(command, []) == 2
    assert capsys.readouterr().err == (
        "error: reading and writing gs:// paths needs the package gcsfs: "
        "in the checkout of emu_jax, pip install '.[gcs]'\n"
    )


def test_other_missing_modules_are_bugs():
    def command(_):
        importlib.import_module("emu_jax.no_such_module")

    with pytest.raises(ModuleNotFoundError, match="no_such_module"):
        cli.run(command, [])


@pytest.mark.parametrize(
    ("kind", "package", "name"),
    [
        ("html", "selectolax", "page.html"),
        ("obelics", "pyarrow", "rows.parquet"),
        ("subtitled", "av", "clip.mp4"),
    ],
)
def test_inspecting_without_the_extra_names_it(tmp_path, capsys, monkeypatch, kind, package, name):
    for module in [package, *(known for known in sys.modules if known.startswith(f"{package}."))]:
        monkeypatch.setitem(sys.modules, module, None)
    (tmp_path / name).write_bytes(b"<p>a")
    (tmp_path / "clip.vtt").write_text("WEBVTT\n\n00:00.000 --> 00:01.000\nHello.\n")
    assert data_main(["inspect", str(tmp_path / name), f"--kind={kind}", "--jsonl"]) == 2
    assert capsys.readouterr().err == (
        "error: reading web pages, parquet files and videos needs the package "
        f"{package}: in the checkout of emu_jax, pip install '.[data]'\n"
    )


def test_commands_import_without_the_extras(tmp_path):
    program = f"""
import sys
sys.modules.update(dict.fromkeys({sorted(cli.EXTRAS)}))
import emu_jax.data.builders.build, emu_jax.data.loader
import emu_jax.evaluate.__main__, emu_jax.fit.__main__, emu_jax.generate.__main__
import emu_jax.train, emu_jax.weights.__main__
from emu_jax import Session
assert Session.load
from emu_jax.data.__main__ import main
main(["--help"])
"""
    run = subprocess.run(
        [sys.executable, "-c", program],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": os.getcwd()},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    assert "usage: python -m emu_jax.data" in run.stdout


@pytest.mark.parametrize(
    ("main", "argument", "told"),
    [
        (data_main, "build --kind=openmoji", "python -m emu_jax.demo build"),
        (data_main, "build --kind openmoji", "python -m emu_jax.demo build"),
        (evaluate_main, "--task=demo", "python -m emu_jax.demo evaluate"),
        (evaluate_main, "--task demo", "python -m emu_jax.demo evaluate"),
        (evaluate_main, "--task=demo-chat", "python -m emu_jax.demo chat"),
    ],
)
def test_old_names_say_where_they_went(capsys, main, argument, told):
    assert main(argument.split()) == 2
    assert told in capsys.readouterr().err


def test_the_package_lists_its_commands(capsys):
    assert commands_main(["train"]) == 2
    assert "takes no arguments, and was given 'train'" in capsys.readouterr().err
    assert commands_main([]) == 0
    listed = re.findall(r"^  ([a-z]+) ", capsys.readouterr().out, re.MULTILINE)
    for name in listed:
        assert importlib.util.find_spec(f"emu_jax.{name}"), name
    assert len(set(listed)) == 8
