"""python -m emu_jax lists the commands."""

import sys

from emu_jax import cli
from emu_jax.config import UserError

COMMANDS = """\
usage: python -m emu_jax.COMMAND

  train      train a model, or resume a run
  data       look at your data, and build data sets from it
  generate   write and draw with a trained model
  evaluate   benchmarks and scores
  weights    import and export weights, merge LoRA
  fit        compile a run for hardware that you do not have, and report what it needs
  verify     compare with numbers of the released code
  demo       the parts of `make demo`

Each has --help."""


def main(arguments: list[str] | None = None) -> int:
    """Print the commands and return the exit status, 2 if an argument is given."""
    return cli.run(command, arguments)


def command(arguments: list[str]) -> None:
    if arguments and arguments[0] not in ("-h", "--help"):
        raise UserError(
            f"python -m emu_jax takes no arguments, and was given {arguments[0]!r}; its commands "
            "have a dot, as in python -m emu_jax.train; without arguments it lists them"
        )
    print(COMMANDS)


if __name__ == "__main__":
    sys.exit(main())
