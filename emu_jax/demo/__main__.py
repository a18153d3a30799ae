"""The demo: a small Emu that learns to caption and to draw on two CPU cores.

python -m emu_jax.demo COMMAND: `build` writes the demo's data, `evaluate` and `chat` score trained
models and write a page, and `strip` writes an image for a README. Each has --help. Training is
`python -m emu_jax.train --config=configs/demo.py:STAGE`. Read next: configs/demo.py.
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
    """Run a command and return its exit status: 0, or 2 after one line about a user's error."""
    return cli.run(command, arguments)


def command(arguments: list[str]) -> None:
    flags = _parse(arguments)
    # tensorflow-datasets warns about every builder config that it does not define itself.
    logging.getLogger("absl").setLevel(logging.ERROR)
    commands = {"build": build, "evaluate": evaluate, "chat": chat, "strip": strip}
    commands[flags.command](flags)


def build(flags: argparse.Namespace) -> None:
    """Write the data, and print the number of documents of each kind."""
    # This import takes seconds, so it comes after wrong flags are reported.
    from emu_jax.demo import openmoji

    counts = openmoji.build(Path(flags.to), flags.seed)
    for split, count in counts.items():
        print(f"{split:20}" + ", ".join(f"{number} {what}" for what, number in count.items()))
    print(f"examples: {flags.to}/sheet.png")
    print(f"licence: CC-BY-SA-4.0, OpenMoji ({flags.to}/LICENSE.txt)")


def evaluate(flags: argparse.Namespace) -> None:
    """Print the targets, and write all numbers to results.json and report.html."""
    from emu_jax.demo import evaluation, report

    result = evaluation.evaluate(flags.checkpoint, flags.data, flags.warmup, flags.decoder)
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
    """Print the accuracies before and after tuning, and write results.json and report.html."""
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
    """Write a PNG of sampled drawings: the originals, and the decoder's versions of them."""
    from emu_jax.demo import strip

    decoded = strip.sample(flags.checkpoint, flags.decoder, flags.data, flags.seed)
    with atomic_write(flags.out, "wb") as file:
        strip.draw(decoded).save(file, "PNG", optimize=True)
    print(flags.out)


def _write(flags: argparse.Namespace, results: dict[str, Any], page: str) -> None:
    """Write results.json and report.html into --out, or the run's workdir; print the path."""
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
        description="Build the data of the demo, a small Emu, and evaluate its trained models.",
    )
    commands = parser.add_subparsers(
        required=True, dest="command", metavar="build | evaluate | chat | strip"
    )
    build = commands.add_parser("build", help="write the demo's data")
    build.add_argument("--to", required=True, metavar="DIR", help="folder to write into")
    build.add_argument(
        "--seed",
        type=int,
        default=0,
        help="random seed of the held-out combinations and of all positions (0)",
    )
    evaluate = commands.add_parser("evaluate", help="score a trained demo, and write a page")
    chat = commands.add_parser("chat", help="compare answers before and after instruction tuning")
    strip = commands.add_parser("strip", help="write a PNG of twelve random drawings")
    for subparser in (evaluate, chat, strip):
        subparser.add_argument(
            "--checkpoint",
            required=True,
            metavar="DIR",
            help="workdir of a run, or one of its checkpoints",
        )
        subparser.add_argument(
            "--data",
            default="data/demo",
            metavar="DIR",
            help="folder that `build` wrote (data/demo)",
        )
    for subparser in (evaluate, chat):
        subparser.add_argument(
            "--out",
            metavar="DIR",
            help="folder for results.json and report.html (the run's workdir)",
        )
    evaluate.add_argument(
        "--decoder", metavar="DIR", help="run of the stage decoder; without it nothing is drawn"
    )
    evaluate.add_argument(
        "--warmup", metavar="DIR", help="run that trained the encoder (config.init of the run)"
    )
    strip.add_argument("--decoder", required=True, metavar="DIR", help="run of the stage decoder")
    strip.add_argument("--out", required=True, metavar="FILE", help="PNG to write")
    strip.add_argument("--seed", type=int, default=0, help="random seed of the drawings (0)")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
