"""Evaluate a model on a benchmark, or score predictions in files.

python -m emu_jax.evaluate --task=T --data=DIR --checkpoint=DIR [--shots=K] [--limit=N]
python -m emu_jax.evaluate score --metric=NAME --predictions=FILE --references=FILE

Read next: benchmark.py, score_files.py.
"""

import argparse
import json
import sys
from pathlib import Path

from emu_jax import cli
from emu_jax.config import UserError
from emu_jax.data import images

DESCRIPTION = """\
Evaluate a trained model on a benchmark, from its published annotation files and images.

Writes submission.json in the benchmark's own format, scores.json, and report.html with images, and
prints the scores. A run that was stopped resumes with the same command."""
EXAMPLES = """\
examples (each begins with: python -m emu_jax.evaluate --checkpoint=runs/instruct):

  caption COCO               --task=coco-caption --data=/data/coco
  a first look               --task=vqav2 --data=/data/vqav2 --limit=200
  few-shot, near images      --task=vqav2 --data=/data/vqav2 --shots=4
  the paper's zero-shot      --task=vqav2 --data=/data/vqav2 --shots=2 --text-only
  text to image, FID         --task=coco-t2i --data=/data/coco --decoder=DIR --inception=DIR
  two machines               --task=okvqa --data=DIR --out=DIR --hosts=2 --host=0 (and --host=1)

To score predictions in files, without a model: python -m emu_jax.evaluate score --help

tasks, each with its default split and the files that it reads, which may be at any depth in --data:

"""
SCORE_DESCRIPTION = "Score predictions in files, and print the numbers as JSON."
SCORE_EXAMPLE = """\
example:

  python -m emu_jax.evaluate score --metric=captions --predictions=results.json \\
      --references=captions_val2014.json

"""


def main(arguments: list[str] | None = None) -> int:
    """Run the command and return its exit status."""
    return cli.run(_command, arguments)


def _command(arguments: list[str]) -> None:
    images.silence_pillow()
    if arguments[:1] == ["score"]:
        _score(arguments[1:])
    else:
        _evaluate(_parse(arguments))


def _evaluate(flags: argparse.Namespace) -> None:
    """Evaluate on a benchmark; print the scores, or how much other hosts have yet to do."""
    # These imports take seconds, so they come after wrong flags are reported.
    import jax

    from emu_jax import checkpoint
    from emu_jax.evaluate import benchmark
    from emu_jax.evaluate.plan import BenchmarkSettings, default_folder
    from emu_jax.evaluate.tasks import TASKS
    from emu_jax.generate.placement import inference_mesh
    from emu_jax.generate.session import Session

    settings = BenchmarkSettings(
        task=flags.task,
        checkpoint=str(Path(flags.checkpoint).resolve()),
        step=checkpoint.latest_step(flags.checkpoint),
        data=str(Path(flags.data).resolve()),
        split=flags.split or TASKS[flags.task].split,
        shots=flags.shots,
        text_only=flags.text_only,
        beams=flags.beams,
        ema=flags.ema,
        decoder=flags.decoder or "",
    )
    host = flags.host
    hosts = flags.hosts
    if hosts is None:
        host = jax.process_index()
        hosts = jax.process_count()
    if not 0 <= host < hosts:
        raise UserError(f"--host={host} must be from 0 to {hosts - 1}, for --hosts={hosts}")

    def load_session() -> Session:
        return Session.load(
            flags.checkpoint,
            ema=flags.ema,
            tokenizer=flags.tokenizer,
            mesh=inference_mesh(flags.checkpoint, jax.local_devices()),
            batch=flags.batch,
        )

    out = Path(flags.out) if flags.out else default_folder(settings)
    resources = benchmark.Resources(flags.wordnet, flags.tagger, flags.inception, flags.clip)
    try:
        outcome = benchmark.run(
            settings,
            load_session,
            out,
            limit=flags.limit,
            allow_missing=flags.allow_missing,
            resources=resources,
            host=host,
            hosts=hosts,
        )
    except KeyboardInterrupt:
        print(
            f"the predictions so far are in {out}; the same command resumes after them",
            file=sys.stderr,
        )
        raise
    if outcome.waiting:
        print(
            f"{outcome.waiting} of {outcome.total} predictions are still to be made by other "
            f"hosts; once they are in {out}, the same command scores them"
        )
        return
    for name, value in outcome.results.items():
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            print(f"{name}: {value:,}" if isinstance(value, int) else f"{name}: {value:,.4g}")
    print(out / "report.html")


def _score(arguments: list[str]) -> None:
    """Score predictions in files, and print the numbers as JSON."""
    from emu_jax.evaluate import score_files

    parser = cli.Parser(
        prog="python -m emu_jax.evaluate score",
        description=SCORE_DESCRIPTION,
        epilog=SCORE_EXAMPLE + score_files.LAYOUTS,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--metric", required=True, choices=list(score_files.METRICS))
    parser.add_argument(
        "--predictions",
        required=True,
        metavar="FILE",
        help="predictions, in a layout below (clip_score also takes a folder)",
    )
    parser.add_argument(
        "--references",
        required=True,
        nargs="+",
        metavar="FILE",
        help="references, in a layout below (visdial and wups take two files)",
    )
    parser.add_argument(
        "--wordnet",
        metavar="DIR",
        help="wups: folder with WordNet's files, such as /usr/share/wordnet of Debian's package "
        "wordnet-base",
    )
    parser.add_argument(
        "--clip",
        metavar="DIR",
        help="clip_score: a CLIP from `python -m emu_jax.weights import --family=clip`",
    )
    parser.add_argument(
        "--tagger",
        metavar="DIR",
        help="wups of NExT-QA: folder with NLTK's averaged_perceptron_tagger_eng (.json)",
    )
    flags = parser.parse_args(arguments)
    inputs = score_files.Inputs(
        flags.predictions, flags.references, flags.wordnet, flags.clip, flags.tagger
    )
    numbers = score_files.score_files(flags.metric, inputs)
    print(json.dumps(numbers, indent=1, ensure_ascii=False))


def _parse(arguments: list[str]) -> argparse.Namespace:
    from emu_jax.evaluate.tasks import TASKS

    parser = cli.Parser(
        prog="python -m emu_jax.evaluate",
        description=DESCRIPTION,
        epilog=EXAMPLES + _task_table(),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--task",
        required=True,
        type=_task,
        choices=list(TASKS),
        metavar="T",
        help="one of the tasks below",
    )
    parser.add_argument(
        "--checkpoint",
        required=True,
        metavar="DIR",
        help="workdir of a training run, or one of its checkpoints",
    )
    parser.add_argument(
        "--data", metavar="DIR", help="folder with the annotation files and the images or videos"
    )
    parser.add_argument(
        "--out",
        metavar="DIR",
        help="folder for predictions, submission.json, scores.json and report.html (default: in "
        "the run's workdir)",
    )
    parser.add_argument(
        "--split", metavar="NAME", help="split of the benchmark (default: see the tasks below)"
    )
    parser.add_argument("--limit", type=_positive, metavar="N", help="only the first N examples")
    parser.add_argument(
        "--allow-missing",
        action="store_true",
        help="leave out questions whose image is missing",
    )
    _add_model_flags(parser)
    _add_metric_flags(parser)
    _add_host_flags(parser)
    flags = parser.parse_args(arguments)
    if not flags.data:
        files = ", ".join(TASKS[flags.task].files)
        raise UserError(f"--data=DIR is missing: the folder with {files} and the images")
    if flags.text_only and not flags.shots:
        raise UserError("--text-only needs --shots=K, the number of examples")
    return flags


def _task(text: str) -> str:
    """Refuse the tasks that have become commands, and pass every other text on."""
    for old, new in (("demo", "evaluate"), ("demo-chat", "chat")):
        if text == old:
            raise UserError(f"--task={old} is a command now: python -m emu_jax.demo {new} --help")
    return text


def _add_model_flags(parser: argparse.ArgumentParser) -> None:
    model = parser.add_argument_group("model and prompts")
    model.add_argument(
        "--shots",
        type=_positive,
        default=0,
        metavar="K",
        help="number of few-shot examples before the question, chosen for their similar images "
        "(RICES; default: 0)",
    )
    model.add_argument(
        "--text-only",
        action="store_true",
        help="show few-shot examples without images, the same ones before all questions",
    )
    model.add_argument(
        "--beams",
        type=_positive,
        default=0,
        metavar="N",
        help="number of beams (default: the task's, 5)",
    )
    model.add_argument(
        "--batch",
        type=_positive,
        default=32,
        metavar="N",
        help="number of questions in a batch, which does not change the answers (default: 32)",
    )
    model.add_argument("--ema", action="store_true", help="use the moving average of the weights")
    model.add_argument(
        "--tokenizer",
        metavar="FILE",
        help="tokenizer, if it is not where the checkpoint's config says",
    )
    model.add_argument(
        "--decoder",
        metavar="DIR",
        help="coco-t2i: run of the stage decoder, which draws the images",
    )


def _add_metric_flags(parser: argparse.ArgumentParser) -> None:
    metrics = parser.add_argument_group("metrics")
    metrics.add_argument("--wordnet", metavar="DIR", help="nextqa: folder with WordNet's files")
    metrics.add_argument(
        "--tagger",
        metavar="DIR",
        help="nextqa: folder with NLTK's averaged_perceptron_tagger_eng; compares lemmas, as the "
        "official script does",
    )
    metrics.add_argument(
        "--inception",
        metavar="DIR",
        help="coco-t2i: FID's Inception from `python -m emu_jax.weights import --family=inception`",
    )
    metrics.add_argument(
        "--clip",
        metavar="DIR",
        help="coco-t2i: also compute the CLIP score, with a CLIP from `python -m emu_jax.weights "
        "import --family=clip`",
    )


def _add_host_flags(parser: argparse.ArgumentParser) -> None:
    hosts = parser.add_argument_group("several hosts")
    hosts.add_argument(
        "--hosts",
        type=_positive,
        metavar="N",
        help="number of hosts that share the examples (default: JAX's processes)",
    )
    hosts.add_argument(
        "--host", type=int, default=0, metavar="K", help="which host this is, from 0 (default: 0)"
    )


def _task_table() -> str:
    """Two lines per task: its description, and its default split with the files it reads."""
    from emu_jax.evaluate.tasks import TASKS

    lines = []
    for name, task in TASKS.items():
        files = [*task.files, *task.optional_files, task.relevance_file]
        names = [file.format(split=task.split) for file in files if file]
        lines.append(f"  {name:14}{task.description}")
        lines.append(f"{'':16}{task.split}: {', '.join(names)}")
    return "\n".join(lines)


def _positive(text: str) -> int:
    """Parse a positive integer."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive integer")
    return int(text)


if __name__ == "__main__":
    sys.exit(main())
