"""Makes data sets, and shows what they are made of:

python -m emu_jax.data inspect PATH --kind=K [--jsonl]              what becomes of every record,
and why some are left out python -m emu_jax.data build --kind=K --from=PATH... --to=DIR
documents as ArrayRecord, and a data card

Read next: sources/kinds.py.
"""

import argparse
import json
import logging
import os
import sys
from dataclasses import fields
from pathlib import Path

from emu_jax.config import UserError
from emu_jax.data.sources.options import SourceOptions


def main(arguments: list[str]) -> None:
    flags = _parse(arguments)
    # tfds warns of every config that is not its own
    logging.getLogger("absl").setLevel(logging.ERROR)
    if flags.command == "inspect":
        _inspect(flags)
    else:
        _build(flags)


def _inspect(flags: argparse.Namespace) -> None:
    from emu_jax.data import inspection
    from emu_jax.data.builders import card

    documents = inspection.inspect_documents(flags.kind, Path(flags.path), _options(flags))
    if flags.jsonl:
        for document in documents:
            # ASCII: whatever the terminal takes, and a line is a line
            print(json.dumps(inspection.describe(document)), flush=True)
        return
    page = Path(flags.page or f"inspect-{Path(flags.path).name.split('.')[0] or flags.kind}.html")
    new = page.with_suffix(".new")
    try:
        with new.open("w", encoding="utf-8") as file:
            file.writelines(card.inspection_page(f"{flags.path}, read as {flags.kind}", documents))
        new.replace(page)
    finally:
        new.unlink(missing_ok=True)
    print(page)


def _build(flags: argparse.Namespace) -> None:
    if not flags.from_:
        raise UserError("build needs --from=PATH, the files to read")
    from emu_jax.data.builders import build

    counts = build.build(
        flags.kind,
        [Path(path) for path in flags.from_],
        Path(flags.to),
        _options(flags),
        flags.workers,
        flags.runner,
        flags.rest,
    )
    print(", ".join(f"{number:,} {what.replace('_', ' ')}" for what, number in counts.items()))
    print(f"{flags.to}/card.html")


def _options(flags: argparse.Namespace) -> SourceOptions:
    return SourceOptions(
        **{field.name: getattr(flags, field.name) for field in fields(SourceOptions)}
    )


def _parse(arguments: list[str]) -> argparse.Namespace:
    from emu_jax.data.sources.kinds import KINDS

    parser = argparse.ArgumentParser(
        prog="python -m emu_jax.data", description=__doc__.splitlines()[0], allow_abbrev=False
    )
    commands = parser.add_subparsers(required=True, metavar="build | inspect", dest="command")
    kinds = "; ".join(f"{name}: {kind.help}" for name, kind in KINDS.items())
    inspect = commands.add_parser(
        "inspect", help="show what becomes of every record", allow_abbrev=False
    )
    inspect.add_argument("path", help="a file or folder")
    inspect.add_argument("--kind", required=True, choices=[*KINDS], help=kinds)
    inspect.add_argument(
        "--jsonl",
        action="store_true",
        help="print a line of JSON a document, instead of writing a page",
    )
    inspect.add_argument("--page", default="", help="where to write the page; inspect-NAME.html")
    build = commands.add_parser("build", help="write a data set", allow_abbrev=False)
    build.add_argument(
        "--kind",
        required=True,
        choices=[*KINDS],
        help=kinds,
    )
    build.add_argument(
        "--from",
        dest="from_",
        action="extend",
        nargs="+",
        default=[],
        help="files and folders to read",
    )
    build.add_argument("--to", required=True, help="directory to write into")
    build.add_argument("--workers", type=int, default=0, help="processes; 0: one a core")
    build.add_argument(
        "--runner",
        default="",
        help="a runner of Apache Beam in place of processes here: DirectRunner, "
        "DataflowRunner, ...; what follows -- is passed on to it",
    )
    for command in (inspect, build):
        for field in fields(SourceOptions):
            kind = (
                {"type": _yes_or_no, "metavar": "yes|no"}
                if isinstance(field.default, bool)
                else {"type": type(field.default)}
            )
            help = f"{field.metadata['help']} ({field.default})"
            command.add_argument(
                f"--{field.name.replace('_', '-')}", default=field.default, help=help, **kind
            )
    for one in (parser, inspect, build):
        # one line, as everywhere
        one.error = _fail
    split = arguments.index("--") if "--" in arguments else len(arguments)
    flags = parser.parse_args(arguments[:split])
    flags.rest = arguments[split + 1 :]
    return flags


def _yes_or_no(text: str) -> bool:
    if text.lower() not in ("yes", "no", "true", "false"):
        raise argparse.ArgumentTypeError(f"'{text}' is neither yes nor no")
    return text.lower() in ("yes", "true")


def _fail(message: str) -> None:
    raise UserError(message)


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    # of `| head`, which has seen enough
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (UserError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
