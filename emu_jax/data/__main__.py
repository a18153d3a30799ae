"""Inspect raw data, and build datasets from it.

inspect PATH --kind=KIND         show the document made from each record, or why it is left out
build --kind=KIND --from=PATH... --to=DIR
                                 write documents as ArrayRecord files, with a data card

Read next: sources/kinds.py.
"""

import argparse
import json
import logging
import sys
from dataclasses import fields
from pathlib import Path

from emu_jax import cli
from emu_jax.config import UserError
from emu_jax.data.sources.options import SourceOptions

# The most reasons for skipped records, and for dropped images, that `build` prints.
MAX_REASONS = 5


def main(arguments: list[str] | None = None) -> int:
    """Run the command line `arguments` (None: sys.argv) and return its exit status."""
    return cli.run(command, arguments)


def command(arguments: list[str]) -> None:
    flags = _parse(arguments)
    # tensorflow-datasets warns about every builder config that it does not define itself.
    logging.getLogger("absl").setLevel(logging.ERROR)
    from emu_jax.data import images, video

    images.silence_pillow()
    video.silence_ffmpeg()
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
            # json.dumps escapes to ASCII, so no character of a text can end the line.
            print(json.dumps(inspection.describe(document)), flush=True)
        return
    name = Path(flags.path).name.split(".")[0] or flags.kind
    page = Path(flags.page or f"inspect-{name}.html")
    with cli.output_file(page) as file:
        file.writelines(card.inspection_page(f"{flags.path}, read as {flags.kind}", documents))
    print(page)


def _build(flags: argparse.Namespace) -> None:
    if not flags.from_:
        raise UserError("build needs --from=PATH, the files or folders to read")
    from emu_jax.data.builders import build

    summary = build.build(
        flags.kind,
        [Path(path) for path in flags.from_],
        Path(flags.to),
        _options(flags),
        flags.workers,
        flags.runner,
        flags.rest,
    )
    counts = summary["counts"].items()
    print(", ".join(f"{number:,} {name.replace('_', ' ')}" for name, number in counts))
    for what in ("skipped", "dropped"):
        for reason, number in list(summary[what].items())[:MAX_REASONS]:
            id = summary["examples"].get(reason)
            print(f"{what} {number:,}: {reason}" + (f" (for example in {id!r})" if id else ""))
    print(f"{flags.to}/card.html")


def _options(flags: argparse.Namespace) -> SourceOptions:
    chosen = {field.name: getattr(flags, field.name) for field in fields(SourceOptions)}
    return SourceOptions(**chosen)


def _parse(arguments: list[str]) -> argparse.Namespace:
    from emu_jax.data.sources.kinds import KINDS

    kinds = "\n".join(f"  {name:14}{kind.help}" for name, kind in KINDS.items())
    parser = cli.Parser(
        prog="python -m emu_jax.data",
        description="Inspect raw data, and build datasets from it.",
    )
    commands = parser.add_subparsers(required=True, metavar="build | inspect", dest="command")
    inspect = commands.add_parser(
        "inspect",
        help="show the document made from each record",
        description="Show the document made from each record, or the reason why it is left out.",
        epilog=f"kinds:\n{kinds}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    inspect.add_argument("path", help="a file or folder")
    inspect.add_argument(
        "--jsonl",
        action="store_true",
        help="print one line of JSON per document instead of writing a page",
    )
    inspect.add_argument(
        "--page", default="", help="where to write the page (default: inspect-NAME.html)"
    )
    build = commands.add_parser(
        "build",
        help="write a dataset",
        description="Write a dataset as ArrayRecord files, with a data card. If it is stopped, "
        "the same command continues it.",
        epilog=f"kinds:\n{kinds}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
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
    build.add_argument(
        "--workers", type=int, default=0, help="number of processes (default: one per core)"
    )
    build.add_argument(
        "--runner",
        default="",
        help="an Apache Beam runner instead of local processes (DirectRunner, DataflowRunner, "
        "...); arguments after -- are passed to it",
    )
    for subparser in (inspect, build):
        subparser.add_argument(
            "--kind",
            required=True,
            type=_kind,
            choices=[*KINDS],
            metavar="KIND",
            help="format of the input",
        )
        _add_source_options(subparser)
    split = arguments.index("--") if "--" in arguments else len(arguments)
    flags = parser.parse_args(arguments[:split])
    flags.rest = arguments[split + 1 :]
    return flags


def _kind(text: str) -> str:
    """Refuse the kind that has become a command, and pass every other text on."""
    if text == "openmoji":
        raise UserError("--kind=openmoji is a command of its own now: python -m emu_jax.demo build")
    return text


def _add_source_options(parser: argparse.ArgumentParser) -> None:
    for field in fields(SourceOptions):
        flag = f"--{field.name.replace('_', '-')}"
        help = f"{field.metadata['help']} (default: {_shown(field.default)})"
        if isinstance(field.default, bool):
            parser.add_argument(
                flag, type=_yes_or_no, metavar="yes|no", default=field.default, help=help
            )
        else:
            parser.add_argument(flag, type=type(field.default), default=field.default, help=help)


def _shown(default: object) -> str:
    if isinstance(default, bool):
        return "yes" if default else "no"
    return str(default) or "none"


def _yes_or_no(text: str) -> bool:
    if text.lower() not in ("yes", "no", "true", "false"):
        raise argparse.ArgumentTypeError(f"'{text}' is neither yes nor no")
    return text.lower() in ("yes", "true")


if __name__ == "__main__":
    sys.exit(main())
