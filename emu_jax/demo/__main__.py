"""The demo: a small Emu that learns to caption and to draw on two CPU cores.

python -m emu_jax.demo build --to=DIR            its data: drawings, scenes, stories and questions
python -m emu_jax.demo evaluate --checkpoint=DIR [--decoder=DIR]    its numbers, and a page
python -m emu_jax.demo chat --checkpoint=DIR     questions answered before and after tuning
python -m emu_jax.demo strip --checkpoint=DIR --decoder=DIR --out=FILE.png    drawings for a README

Training is `python -m emu_jax.train --config=configs/demo.py:STAGE`. Read next: configs/demo.py.
"""

import argparse
import json
import logging
import sys
from pathlib import Path
from typing import Any

from emu_jax import checkpoint, cli
from emu_jax.files import atomic_write


def main(arguments: list[str] | None = None) -> int:
    """Exit status: 0, or 2 after one line about what the user can put right."""
    return cli.run(command, arguments)


def command(arguments: list[str]) -> None:
    flags = _parse(arguments)
    # tensorflow-datasets warns about every config that is not its own
    logging.getLogger("absl").setLevel(logging.ERROR)
    commands = {"build": build, "evaluate": evaluate, "chat": chat, "strip": strip}
    commands[flags.command](flags)


def build(flags: argparse.Namespace) -> None:
    """Write the data and print how much there is of each kind."""
    # These imports take seconds: a wrong flag is reported before them.
    from emu_jax.demo import openmoji

    counts = openmoji.build(Path(flags.to), flags.seed)
    for split, count in counts.items():
        print(f"{split:20}" + ", ".join(f"{number} {what}" for what, number in count.items()))
    print(f"to be seen in {flags.to}/sheet.png")
    print(f"licence: CC-BY-SA-4.0, OpenMoji ({flags.to}/LICENSE.txt)")


def evaluate(flags: argparse.Namespace) -> None:
    """Print the numbers and targets; write results.json and report.html."""
    from emu_jax.demo import evaluation, report

    result = evaluation.evaluate(flags.checkpoint, flags.data, flags.warmup, flags.decoder)
    width = max(map(len, result.numbers))
    for name, value in result.numbers.items():
        shown = f"{value:,}" if isinstance(value, int) else f"{value:,.4g}"
        print(f"{name:{width}}  {shown}")
    verdict = {True: "reached", False: "NOT reached", None: "not measured"}
    width = max(len(target.what) for target in result.targets)
    for target in result.targets:
        value = "-" if target.value is None else f"{target.value:.1%}"
        print(f"{target.what:{width}}  {value:>8}  {target.bound:13} {verdict[target.reached]}")
    captions = {}
    for group in ("names_held_out", "scenes_held_out"):
        captions[group] = [
            {"id": one.id, "true": one.true, "said": one.predicted, "nearest": one.nearest}
            for one in result.captions[group]
        ]
    results = {
        "checkpoint": flags.checkpoint,
        "numbers": result.numbers,
        "targets": [target._asdict() for target in result.targets],
        "captions": captions,
    }
    _write(flags, results, report.page(result, flags.checkpoint))


def chat(flags: argparse.Namespace) -> None:
    """Print the accuracies before and after tuning; write results.json and report.html."""
    from emu_jax.demo import chat, chat_report

    result = chat.evaluate(flags.checkpoint, flags.data)
    print(chat.table(result))
    names = ("id", "kind", "question", "true", "before", "after")
    answers = []
    for answered in result.answers:
        answers.append({name: getattr(answered, name) for name in names})
    results = {"checkpoint": flags.checkpoint, "numbers": result.numbers, "answers": answers}
    _write(flags, results, chat_report.page(result, flags.checkpoint))


def strip(flags: argparse.Namespace) -> None:
    """Write a PNG of sampled drawings: originals, and what the decoder makes of them."""
    from emu_jax.demo import strip

    decoded = strip.sample(flags.checkpoint, flags.decoder, flags.data, flags.seed)
    with atomic_write(flags.out, "wb") as file:
        strip.draw(decoded).save(file, "PNG", optimize=True)
    print(flags.out)


def _write(flags: argparse.Namespace, results: dict[str, Any], page: str) -> None:
    """results.json and report.html in --out, or in the run's workdir; prints the page's path."""
    workdir, _ = checkpoint.split_step(Path(flags.checkpoint).resolve())
    folder = Path(flags.out) if flags.out else workdir
    folder.mkdir(parents=True, exist_ok=True)
    with atomic_write(folder / "results.json") as file:
        file.write(json.dumps(results, indent=1, ensure_ascii=False) + "\n")
    with atomic_write(folder / "report.html") as file:
        file.write(page)
    print(folder / "report.html")


def _parse(arguments: list[str]) -> argparse.Namespace:
    parser = cli.Parser(
        prog="python -m emu_jax.demo",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(
        required=True, dest="command", metavar="build | evaluate | chat | strip"
    )
    build = commands.add_parser("build", help="write the demo's data")
    build.add_argument("--to", required=True, metavar="DIR", help="folder to write into")
    build.add_argument(
        "--seed", type=int, default=0, help="decides what is held out, and every placement (0)"
    )
    evaluate = commands.add_parser("evaluate", help="numbers and a page of a trained demo")
    chat = commands.add_parser("chat", help="questions, answered before and after tuning")
    strip = commands.add_parser("strip", help="a PNG of a dozen drawings, sampled by a seed")
    for subparser in (evaluate, chat, strip):
        subparser.add_argument(
            "--checkpoint",
            required=True,
            metavar="DIR",
            help="workdir of a run, or one of its checkpoints",
        )
        subparser.add_argument(
            "--data", default="data/demo", metavar="DIR", help="what `build` wrote (data/demo)"
        )
    for subparser in (evaluate, chat):
        subparser.add_argument(
            "--out", metavar="DIR", help="for results.json and report.html (the run's workdir)"
        )
    evaluate.add_argument(
        "--decoder", metavar="DIR", help="run of the decoder; without it nothing is drawn"
    )
    evaluate.add_argument(
        "--warmup", metavar="DIR", help="run that trained the encoder (config.init of the run)"
    )
    strip.add_argument("--decoder", required=True, metavar="DIR", help="run of the decoder")
    strip.add_argument("--out", required=True, metavar="FILE", help="PNG to write")
    strip.add_argument("--seed", type=int, default=0, help="decides which drawings are shown (0)")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
