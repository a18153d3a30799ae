"""python -m emu_jax lists the commands."""

import sys

from emu_jax import cli

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
    """Print the commands; an argument is one too many, since a command's name has a dot."""

    def command(given: list[str]) -> int:
        print(COMMANDS)
        return 2 if given and given[0] not in ("-h", "--help") else 0

    return cli.run(command, arguments)


if __name__ == "__main__":
    sys.exit(main())
