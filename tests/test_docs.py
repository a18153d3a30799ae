"""Generated pages are up to date, and the documentation names what exists."""

import re
import runpy
from pathlib import Path

from emu_jax import config

DOCS = Path("docs")
PAGES = [Path("README.md"), Path("CONTRIBUTING.md"), *sorted(DOCS.glob("*.md"))]


def test_the_reference_of_the_config_is_up_to_date():
    page = runpy.run_path("docs/reference.py")["page"]()
    assert (DOCS / "config.md").read_text() == page, "run make docs"


def test_the_figure_is_up_to_date():
    draw = runpy.run_path("docs/figures/architecture.py")["draw"]
    assert (DOCS / "figures/architecture.svg").read_text() == draw()


def test_every_path_in_the_documentation_exists():
    missing = []
    for page in PAGES:
        for path in re.findall(
            r"`((?:emu_jax|configs|tests|benchmarks|launch)/[\w/.-]*)", page.read_text()
        ):
            if not Path(path).exists():
                missing.append(f"{page}: {path}")
    assert not missing


def test_every_field_in_the_documentation_exists():
    known = {
        field.path for name in ("base", "decoder") for field in config.fields(f"configs/{name}.py")
    }
    wrong = []
    for page in PAGES:
        for field in re.findall(r"--config\.([a-z_0-9.]+)=", page.read_text()):
            if field not in known:
                wrong.append(f"{page}: {field}")
    assert not wrong
