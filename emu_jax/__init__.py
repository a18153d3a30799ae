"""emu_jax: training code for unified multimodal generation in JAX and Flax.

The model is Emu (arXiv 2307.05222).

from emu_jax import Session

session = Session.load("runs/emu")
print(session.generate_texts([["a photo of"]])[0])
"""

import os
import signal
import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from emu_jax.generate.session import Session

__all__ = ["Session", "__version__"]

# A command is starting: `python -m` or one of the scripts emu-train, emu-data and so on. Until
# cli.run takes over, let Ctrl-C end the process without the traceback of a half-done import.
_program = os.path.basename(sys.argv[0]) if sys.argv else ""
if _program == "-m" or _program.startswith("emu-"):
    # A shell ignores Ctrl-C for commands in the background; leave that as it is.
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)


def __getattr__(name: str) -> Any:
    """Load public names on first use, so that `import emu_jax` stays cheap."""
    if name == "Session":
        from emu_jax.generate.session import Session

        return Session
    if name == "__version__":
        return _version()
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def _version() -> str:
    """The version of the installed package, or of this checkout if none is installed."""
    import tomllib
    from importlib import metadata
    from pathlib import Path

    try:
        return metadata.version("emu-jax")
    except metadata.PackageNotFoundError:
        project = Path(__file__).parents[1] / "pyproject.toml"
        return tomllib.loads(project.read_text())["project"]["version"]
