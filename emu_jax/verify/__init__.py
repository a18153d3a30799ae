"""Check our code against golden files: `python -m emu_jax.verify FILE.npz`.

A golden file holds inputs and outputs of reference code. It does not hold weights: a rule computes
them from their names and a seed. Read next: golden.py, then emu.py, stable_diffusion.py and
inception.py.
"""

import argparse
from collections.abc import Iterator

import numpy as np

from emu_jax import cli
from emu_jax.verify import emu, golden, inception, stable_diffusion
from emu_jax.verify.golden import Quantity

USAGE = """Run our code on golden files and print its errors.

Exit status: 0 if all quantities agree, 1 if one does not, 3 if those that our code covers agree but
some are not covered, 2 for bad input.
"""


def quantities(file: dict[str, np.ndarray]) -> Iterator[Quantity]:
    """The quantities of a golden file, with our errors; None: our code does not cover it."""
    if "input_ids" in file:
        return emu.quantities(file)
    if "unet_config" in file:
        return stable_diffusion.quantities(file)
    if any(name.startswith("Mixed_") for name in map(str, file.get("parameter_names", ()))):
        return inception.quantities(file)
    return (Quantity(name, None, 0.0) for name in file if not name.startswith("parameter_"))


def main(arguments: list[str] | None = None) -> int:
    """Verify the golden files that `arguments` name (None: sys.argv); returns the exit status."""
    return cli.run(command, arguments)


def command(arguments: list[str]) -> int:
    parser = cli.Parser(
        prog="python -m emu_jax.verify",
        description=USAGE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("files", nargs="+", metavar="FILE.npz", help="see tests/golden/README.md")
    return verify_files(parser.parse_args(arguments).files)


def verify_files(paths: list[str]) -> int:
    """Print a table of errors for each golden file, and return the exit status (see USAGE)."""
    found = []
    for path in paths:
        rows = list(quantities(golden.load(path)))
        _print_table(path, rows)
        found += rows
    failed = sum(row.error is not None and not row.ok for row in found)
    uncovered = sum(row.error is None for row in found)
    print(f"{len(found) - failed - uncovered} ok, {failed} failed, {uncovered} not covered")
    if failed:
        return 1
    return 3 if uncovered else 0


def _print_table(path: str, rows: list[Quantity]) -> None:
    width = max(len(row.name) for row in rows)
    print(path)
    print(f"{'quantity':{width}}  error     tolerance  ok")
    for row in rows:
        if row.error is None:
            error = "-        "
            verdict = "not covered"
        else:
            error = f"{row.error:9.2e}"
            verdict = "ok" if row.ok else "FAILED"
        print(f"{row.name:{width}}  {error} {row.tolerance:9.0e}  {verdict}")
