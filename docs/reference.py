"""Write docs/config.md, the reference of every config field: python docs/reference.py."""

from pathlib import Path

from ml_collections import ConfigDict

from emu_jax import config

HEAD = """# Config fields

Written by `docs/reference.py` from the comments in `configs/base.py`, `configs/sizes.py` and
`configs/decoder.py`. Set a field on the command line with `--config.` in front of its name, as in
`--config.optim.steps=100`. Defaults are those of `configs/pretrain.py` (the 14B); "unpublished"
marks values that neither the paper nor the release gives.
"""
DECODER = """
# Decoder stage

Fields that `configs/decoder.py` adds.
"""


def page() -> str:
    """The whole page, in Markdown."""
    base = section(config.fields())
    return HEAD + base + DECODER + section(config.fields("configs/decoder.py"))


def section(fields: list[config.Field]) -> str:
    """A heading and a table for each group of fields, in the order of the file."""
    out = []
    in_table = False
    for field in fields:
        if isinstance(field.default, ConfigDict):
            out.append(f"\n## {field.path}\n\n{escape(field.comment)}")
            in_table = False
            continue
        if not in_table:
            out.append("\n| field | default | meaning |\n|---|---|---|")
            in_table = True
        default = repr(field.default).replace("|", "\\|")
        out.append(f"| `{field.path}` | `{default}` | {escape(field.comment)} |")
    return "\n".join(out) + "\n"


def escape(words: str) -> str:
    """Words as Markdown shows them: <image> is not a tag, and | ends no cell."""
    return words.replace("<", "&lt;").replace("|", "\\|")


if __name__ == "__main__":
    Path(__file__).with_name("config.md").write_text(page())
