"""Generated pages are up to date, and the documentation names what exists."""

import re
import runpy
import zipfile
from pathlib import Path

from emu_jax import config
from emu_jax.data.documents import Picture, Skipped
from emu_jax.data.sources.options import SourceOptions

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


def test_every_picture_in_the_documentation_exists():
    missing = []
    for page in PAGES:
        for path in re.findall(r"!\[[^]]*\]\(([^)]+)\)", page.read_text()):
            if not (page.parent / path).exists():
                missing.append(f"{page}: {path}")
    assert not missing


def test_no_placeholder_is_left_in_the_documentation():
    for page in PAGES:
        assert not re.search(r"\b(DEMO|TEST)_[A-Z]+\b", page.read_text()), page


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


def test_the_source_that_extending_writes_reads_a_book(tmp_path):
    code = re.search(r"```python\n(.*?)```", (DOCS / "extending.md").read_text(), re.DOTALL)[1]
    source = {}
    exec(code, source)
    with zipfile.ZipFile(tmp_path / "book.zip", "w") as book:
        book.writestr("1.jpg", b"page")
        book.writestr("1.txt", "Once upon a time")
    zipfile.ZipFile(tmp_path / "empty.zip", "w").close()
    found = []
    for shard in source["list_shards"](tmp_path):
        found += source["read_documents"](shard, SourceOptions())
    assert found[0].parts == (Picture(b"page"), "Once upon a time")
    assert found[1] == Skipped("empty", "the book has no pages")
