"""Makes data sets: python -m emu_jax.data build --kind=openmoji --to=DIR [--seed=0]

Read next: builders/openmoji.py.
"""
import argparse
import logging
import sys
from pathlib import Path

from emu_jax.config import UserError


def main(arguments: list[str]) -> None:
    flags = _parse(arguments)
    from emu_jax.data.builders import openmoji
    logging.getLogger("absl").setLevel(logging.ERROR)           # tfds warns of every config that is not its own
    counts = openmoji.build(Path(flags.to), flags.seed)
    for split, count in counts.items():
        print(f"{split:18}" + ", ".join(f"{number} {what}" for what, number in count.items()))
    print(f"to be seen in {flags.to}/sheet.png; licence: CC-BY-SA-4.0, OpenMoji ({flags.to}/LICENSE.txt)")


def _parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m emu_jax.data", description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.error = _fail                                        # one line, as everywhere
    build = parser.add_subparsers(required=True, metavar="build").add_parser("build", help="write a data set", allow_abbrev=False)
    build.error = _fail
    build.add_argument("--kind", required=True, choices=["openmoji"], help="openmoji: the demo's drawings, scenes and stories")
    build.add_argument("--to", required=True, help="directory to write into")
    build.add_argument("--seed", type=int, default=0, help="decides what is held out, and every placement")
    return parser.parse_args(arguments)


def _fail(message: str) -> None:
    raise UserError(message)


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except (UserError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
