"""python -m emu_jax.weights verify FILE.npz ...: our code against numbers that the released Emu computed."""
import argparse
import sys

from emu_jax import verify
from emu_jax.config import UserError
from emu_jax.verify import golden


def main(arguments: list[str] | None = None) -> int:
    """0 where every quantity is ok, 1 where one is not, 2 for bad input, 3 where all covered ones are ok and some are not covered."""
    parser = argparse.ArgumentParser(prog="python -m emu_jax.weights", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser("verify", help="run our code on golden files and print its largest errors")
    command.add_argument("files", nargs="+", metavar="FILE.npz")
    found = []
    try:
        for path in parser.parse_args(arguments).files:
            rows = list(verify.quantities(golden.load(path)))
            width = max(len(row.name) for row in rows)
            print(f"{path}\n{'quantity':{width}}  error     tolerance  ok")
            for row in rows:
                error = "-        " if row.error is None else f"{row.error:9.2e}"
                print(f"{row.name:{width}}  {error} {row.tolerance:9.0e}  {'not covered' if row.error is None else 'ok' if row.ok else 'FAILED'}")
            found += rows
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    failed, uncovered = sum(row.error is not None and not row.ok for row in found), sum(row.error is None for row in found)
    print(f"{len(found) - failed - uncovered} ok, {failed} failed, {uncovered} not covered")
    return 1 if failed else 3 if uncovered else 0


if __name__ == "__main__":
    sys.exit(main())
