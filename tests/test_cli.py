"""What the commands share: the parser, and how a command ends."""

import pytest

from emu_jax import cli
from emu_jax.config import UserError


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


def test_a_parser_raises_and_knows_no_abbreviations():
    parser = cli.Parser()
    parser.add_argument("--limit")
    with pytest.raises(UserError, match="unrecognized arguments: --lim=3"):
        parser.parse_args(["--lim=3"])
