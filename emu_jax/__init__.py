"""emu_jax: training code for unified multimodal generation in JAX and Flax.

The model is Emu (arXiv 2307.05222).

from emu_jax import Session

session = Session.load("runs/emu")
print(session.generate_texts([["a photo of"]])[0])
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from emu_jax.generate.session import Session

__all__ = ["Session", "__version__"]


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
