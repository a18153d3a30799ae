"""python -m emu_jax.evaluate --task=T --data=DIR --checkpoint=DIR [--shots=K] [--limit=N]: a
benchmark, and a page to look at. python -m emu_jax.evaluate score --metric=NAME
--predictions=FILE --references=FILE: scores of predictions, without a model (--help: the layouts).

Read next: benchmark.py; score.py.
"""

import argparse
import json
import sys
from pathlib import Path

from emu_jax.config import UserError

DESCRIPTION = """A trained model on a benchmark, from its published annotation files: predictions, their scores, and a page with pictures.
A run that was stopped goes on with the same command."""


def main(arguments: list[str] | None = None) -> int:
    """0, or 2 for what the user can put right, said in one line."""
    try:
        arguments = sys.argv[1:] if arguments is None else arguments
        if arguments[:1] == ["score"]:
            print(json.dumps(scores(arguments[1:]), indent=1, ensure_ascii=False))
            return 0
        flags = _parse(arguments)
        print(benchmark(flags))
    except KeyboardInterrupt:
        print("stopped; the same command goes on", file=sys.stderr)
        return 130
    except (UserError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def benchmark(flags: argparse.Namespace) -> str:
    """Prints the numbers of a benchmark; the page's path, or what is still to do."""
    import jax

    from emu_jax import checkpoint
    from emu_jax.evaluate import benchmark
    from emu_jax.evaluate.tasks import TASKS
    from emu_jax.generate.placement import inference_mesh
    from emu_jax.generate.session import Session

    settings = benchmark.Settings(
        flags.task,
        str(Path(flags.checkpoint).resolve()),
        checkpoint.latest_step(flags.checkpoint),
        str(Path(flags.data).resolve()),
        flags.split or TASKS[flags.task].split,
        flags.shots,
        flags.text_only,
        flags.beams,
        flags.ema,
        flags.decoder or "",
    )
    host, hosts = (
        (jax.process_index(), jax.process_count())
        if flags.hosts is None
        else (flags.host, flags.hosts)
    )
    if not 0 <= host < hosts:
        _fail(f"--host={host} must be from 0 to {hosts - 1}, for --hosts={hosts}")

    def mesh():
        return inference_mesh(flags.checkpoint, jax.local_devices())

    def load():
        return Session.load(
            flags.checkpoint,
            ema=flags.ema,
            tokenizer=flags.tokenizer,
            mesh=mesh(),
            batch=flags.batch,
        )

    out = Path(flags.out) if flags.out else benchmark.where(settings)
    told = benchmark.run(
        settings,
        load,
        out,
        limit=flags.limit,
        allow_missing=flags.allow_missing,
        wordnet=flags.wordnet,
        inception_dir=flags.inception,
        clip_dir=flags.clip,
        tagger=flags.tagger,
        host=host,
        hosts=hosts,
    )
    if "waiting" in told:
        return f"{told['waiting']} of {told['count']} predictions are other hosts'; once they are in {out}, the same command scores them"
    print(
        "\n".join(
            f"{name}: {_shown(value)}"
            for name, value in told.items()
            if isinstance(value, (int, float)) and not isinstance(value, bool)
        )
    )
    return str(out / "report.html")


def scores(arguments: list[str]) -> dict:
    """The numbers of `score`'s flags."""
    from emu_jax.evaluate import score

    parser = argparse.ArgumentParser(
        prog="python -m emu_jax.evaluate score",
        description="Scores of predictions, without a model, as JSON.",
        epilog=score.LAYOUTS,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.error = _fail
    parser.add_argument("--metric", required=True, choices=list(score.METRICS))
    parser.add_argument(
        "--predictions", required=True, metavar="FILE", help="clip_score: or a folder"
    )
    parser.add_argument(
        "--references", required=True, nargs="+", metavar="FILE", help="visdial takes two"
    )
    parser.add_argument(
        "--wordnet",
        metavar="DIR",
        help="for wups: a folder with WordNet's files; Debian's wordnet-base: /usr/share/wordnet",
    )
    parser.add_argument(
        "--clip",
        metavar="DIR",
        help="for clip_score: what `python -m emu_jax.weights import --family=clip` made",
    )
    parser.add_argument(
        "--tagger",
        metavar="DIR",
        help="for wups of NExT-QA: NLTK's averaged_perceptron_tagger_eng (.json)",
    )
    flags = parser.parse_args(arguments)
    return score.score(
        flags.metric,
        score.Job(flags.predictions, flags.references, flags.wordnet, flags.clip, flags.tagger),
    )


def _shown(value: int | float) -> str:
    return f"{value:,}" if isinstance(value, int) else f"{value:,.4g}"


def _parse(arguments: list[str]) -> argparse.Namespace:
    from emu_jax.evaluate.tasks import TASKS

    def names(task):
        return ", ".join(
            file.format(split=task.split)
            for file in (*task.files, *task.more, *filter(None, [task.marks]))
        )

    epilog = "tasks, and what they read:\n" + "\n".join(
        f"  {name:14}{task.what}\n{'':16}{names(task)}" for name, task in TASKS.items()
    )
    parser = argparse.ArgumentParser(
        prog="python -m emu_jax.evaluate",
        description=DESCRIPTION,
        epilog=epilog,
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    # one line, as everywhere
    parser.error = _fail
    parser.add_argument(
        "--task",
        required=True,
        choices=[*TASKS],
        metavar="T",
        help="one of the tasks below",
    )
    parser.add_argument(
        "--checkpoint",
        required=True,
        metavar="DIR",
        help="a run's workdir, or one of its checkpoints",
    )
    parser.add_argument(
        "--data",
        metavar="DIR",
        help="the benchmark's annotation files and pictures, wherever in it",
    )
    parser.add_argument(
        "--out",
        metavar="DIR",
        help="for predictions, submission.json, scores.json and report.html; by default within the run",
    )
    parser.add_argument("--limit", type=_count, metavar="N", help="the first N examples only")
    parser.add_argument(
        "--shots",
        type=_count,
        default=0,
        metavar="K",
        help="K examples before the question, chosen by RICES (0)",
    )
    parser.add_argument(
        "--text-only",
        action="store_true",
        help="these examples without their pictures, and the same ones for all questions",
    )
    parser.add_argument("--split", metavar="NAME", help="another split than the task's")
    parser.add_argument(
        "--allow-missing",
        action="store_true",
        help="leave out questions whose picture is not there",
    )
    parser.add_argument(
        "--beams", type=_count, default=0, metavar="N", help="other than the task's (5)"
    )
    parser.add_argument(
        "--batch",
        type=_count,
        default=32,
        metavar="N",
        help="questions at once (32); the answers do not depend on it",
    )
    parser.add_argument("--ema", action="store_true", help="the moving average of the weights")
    parser.add_argument(
        "--tokenizer", metavar="FILE", help="if it is not where the checkpoint's config says"
    )
    parser.add_argument("--wordnet", metavar="DIR", help="nextqa: WordNet's files")
    parser.add_argument(
        "--tagger",
        metavar="DIR",
        help="nextqa: NLTK's averaged_perceptron_tagger_eng; answers count as lemmas then, as officially",
    )
    parser.add_argument(
        "--decoder", metavar="DIR", help="coco-t2i: a run of the stage decoder, which draws"
    )
    parser.add_argument(
        "--inception",
        metavar="DIR",
        help="coco-t2i: what `python -m emu_jax.weights import --family=inception` made",
    )
    parser.add_argument(
        "--clip",
        metavar="DIR",
        help="coco-t2i: clip_score too, by what `python -m emu_jax.weights import --family=clip` made",
    )
    parser.add_argument(
        "--host", type=int, default=0, metavar="K", help="which of --hosts this is, from 0 (0)"
    )
    parser.add_argument(
        "--hosts",
        type=_count,
        metavar="N",
        help="how many share the work; by default the processes that JAX knows of",
    )
    flags = parser.parse_args(arguments)
    if not flags.data:
        _fail(
            f"--data=DIR is missing: the folder with {', '.join(TASKS[flags.task].files)} and the pictures"
        )
    if flags.text_only and not flags.shots:
        _fail("--text-only needs --shots=K: how many examples")
    return flags


def _count(text: str) -> int:
    """A whole number from 1 on."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number from 1 on")
    return int(text)


def _fail(message: str) -> None:
    raise UserError(message)


if __name__ == "__main__":
    sys.exit(main())
