"""python -m emu_jax.evaluate --task=demo|demo-chat --checkpoint=DIR [--data=data/demo] [--warmup=DIR] [--out=DIR]: numbers, and a page to look at.

Read next: demo.py, report.py; chat.py.
"""
import argparse
import json
import sys
from pathlib import Path

from emu_jax.config import UserError


def main(arguments: list[str] | None = None) -> int:
    """0, or 2 for what the user can put right, said in one line."""
    try:
        flags = _parse(arguments)
        print(chat(flags.checkpoint, flags.data, flags.out) if flags.task == "demo-chat" else
              demo(flags.checkpoint, flags.data, flags.warmup, flags.out))
    except (UserError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def demo(checkpoint: str, data: str, warmup: str | None, out: str | None) -> Path:
    """Prints the numbers, writes results.json and report.html into `out`, and returns the page's path."""
    from emu_jax.evaluate import demo, history, report  # these take seconds to import: a wrong flag is answered at once
    result = demo.evaluate(checkpoint, data, warmup)
    width = max(map(len, result.numbers))
    print("\n".join(f"{name:{width}}  {_shown(value)}" for name, value in result.numbers.items()))
    verdict = {True: "reached", False: "NOT reached", None: "not measured"}
    width = max(len(target.what) for target in result.targets)
    for target in result.targets:
        value = "-" if target.value is None else f"{target.value:.1%}"
        print(f"{target.what:{width}}  {value:>8}  {target.bound:13} {verdict[target.reached]}")
    folder = Path(out) if out else history.workdir(checkpoint)[0]
    folder.mkdir(parents=True, exist_ok=True)
    told = {group: [{"id": told.id, "true": told.true, "said": told.said, "nearest": told.nearest} for told in some]
            for group, some in result.captions.items() if group.endswith("held_out")}
    results = {"checkpoint": checkpoint, "numbers": result.numbers, "targets": [target._asdict() for target in result.targets],
               "captions": told}
    _write(folder / "results.json", json.dumps(results, indent=1, ensure_ascii=False) + "\n")
    _write(folder / "report.html", report.page(result, checkpoint))
    return folder / "report.html"


def chat(checkpoint: str, data: str, out: str | None) -> Path:
    """As `demo`, for a model that was tuned to answer questions."""
    from emu_jax.evaluate import chat, history
    result = chat.evaluate(checkpoint, data)
    print(chat.table(result))
    folder = Path(out) if out else history.workdir(checkpoint)[0]
    folder.mkdir(parents=True, exist_ok=True)
    answers = [{"id": told.id, "kind": told.kind, "question": told.question, "true": told.true, "before": told.before, "after": told.after}
               for told in result.told]
    _write(folder / "results.json", json.dumps({"checkpoint": checkpoint, "numbers": result.numbers, "answers": answers}, indent=1,
                                               ensure_ascii=False) + "\n")
    _write(folder / "report.html", chat.page(result, checkpoint))
    return folder / "report.html"


def _shown(value: int | float) -> str:
    return f"{value:,}" if isinstance(value, int) else f"{value:,.4g}"


def _write(path: Path, text: str) -> None:
    """Whole or not at all."""
    part = path.with_name(f"{path.name}.part")
    part.write_text(text, encoding="utf-8")
    part.replace(path)


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m emu_jax.evaluate", description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.error = _fail                            # one line, as everywhere
    parser.add_argument("--task", required=True, choices=["demo", "demo-chat"],
                        help="demo: drawings, scenes and stories, with a report; demo-chat: questions on scenes, before and after tuning")
    parser.add_argument("--checkpoint", required=True, help="a run's workdir, or one of its checkpoints")
    parser.add_argument("--data", default="data/demo", help="what `python -m emu_jax.data build --kind=openmoji` wrote")
    parser.add_argument("--warmup", help="the run that warmed the encoder up; by default where the run's config says it started")
    parser.add_argument("--out", help="directory for results.json and report.html; by default the run's")
    return parser.parse_args(arguments)


def _fail(message: str) -> None:
    raise UserError(message)


if __name__ == "__main__":
    sys.exit(main())
