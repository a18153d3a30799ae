"""Released weights in and out, and our code held to the released Emu's numbers.

import --family=llama LLAMA --family=eva-clip EVA --config=configs/pretrain.py --to=DIR
several sources make one checkpoint export --family=llama --from=DIR --to=FOLDER merge --from=DIR
--to=DIR                                    LoRA into its matrices, and those that are stored in
few bits made plain verify FILE.npz ...
"""

import argparse
import sys

from emu_jax import config, verify
from emu_jax.config import UserError
from emu_jax.weights import transfer
from emu_jax.weights.families import FAMILIES

NAMES = ", ".join(FAMILIES)
IMPORT = f"""
SOURCE: a folder, a .safetensors, .bin or .pt file, an index, or all files of one checkpoint. Name a family before its sources; families: {NAMES}.
Several families make one checkpoint together: EVA-CLIP and a LLaMA are the paper's start. What no source fills (the resampler,
the heads) is left out, and is fresh where training starts from DIR (--config.init=DIR).
The rows of new tokens are the mean of the old ones. Of T5's decoder: all but the learned queries, the projection, and keys and values of the
cross-attention, which read another width. A chat model's LoRA is merged into its weights, or stays LoRA where the config's model
has it (configs/instruct.py, model.lora.rank). A PEFT adapter (peft) goes beside its model: --family=llama LLAMA --family=peft ADAPTER.
stable-diffusion: one folder of diffusers', of which unet, vae and the scheduler's config are read. Its condition may have another width than the
model's: what reads it is fresh then where training starts from DIR (--config.init=EMU,DIR).
inception: the network of FID, for python -m emu_jax.evaluate --inception=DIR; a checkpoint of its own.
clip: Hugging Face's CLIPModel, for --clip=DIR there; a checkpoint of its own, with the tokenizer and the preprocessor of its folder.
With --config=FILE the sources must fit its model; without, configs/pretrain.py (stable-diffusion: configs/decoder.py) takes their towers' sizes.
--config.FIELD=VALUE as in training.
"""
EXPORT = """
Writes safetensors, their index and config.json into a new folder, as the family's own library names them, in the dtype of the checkpoint.
llama: LlamaForCausalLM, without Emu's added tokens; emu1: the release's names; LoRA is merged into their weights. peft: the LoRA alone, as an
adapter of a LlamaForCausalLM, without the rows of [USER] and [ASSISTANT]. stable-diffusion: a folder for StableDiffusionPipeline, without a text
encoder, for an Emu makes its conditions.
"""


def main(arguments: list[str] | None = None) -> int:
    """0 done; 2 for bad input, said in one line after the tensors that do not fit; `verify` 1 where
    a quantity is not ok, and 3 where all covered ones are ok and some are not covered.
    """
    arguments = sys.argv[1:] if arguments is None else arguments
    try:
        if arguments[:1] == ["import"]:
            return import_(arguments[1:])
        # "bake" is the command's former name
        if arguments[:1] == ["bake"]:
            arguments = ["merge", *arguments[1:]]
        flags = _parser().parse_args(arguments)
        if flags.command == "merge":
            transfer.merge(flags.source, flags.to)
            print(
                f"{flags.to}: one model of plain matrices; start from it with --config.init={flags.to}"
            )
            return 0
        return export(flags) if flags.command == "export" else verify.verify_files(flags.files)
    except transfer.Misfit as error:
        print(*error.lines, sep="\n", file=sys.stderr)
        print(f"error: {error}", file=sys.stderr)
    except (UserError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
    return 2


def import_(arguments: list[str]) -> int:
    sources, rest = _sources(arguments)
    parser = argparse.ArgumentParser(
        prog="python -m emu_jax.weights import",
        usage="%(prog)s --family=F SOURCE... [--family=F SOURCE...] --to=DIR [--config=FILE]",
        description=IMPORT,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.error = _fail
    parser.add_argument("--to", metavar="DIR", help="directory of the new checkpoint")
    parser.add_argument(
        "--image-size",
        type=int,
        metavar="PIXELS",
        help="interpolate position embeddings (bicubic) to images of this size",
    )
    parser.add_argument(
        "--dry-run", action="store_true", help="say what would be imported, and write nothing"
    )
    flags, rest = parser.parse_known_args(rest)
    given = any(argument.startswith("--config=") for argument in rest)
    default = next(
        (name for family, _ in sources if (name := FAMILIES[family].config_file) != "pretrain"),
        "pretrain",
    )
    c = config.load(([] if given else [f"--config=configs/{default}.py"]) + rest)
    if not sources:
        _fail(f"name a family and its sources: --family=F SOURCE...; families: {NAMES}")
    if not flags.to and not flags.dry_run:
        _fail("--to=DIR is missing: the directory of the new checkpoint")
    made = transfer.make_plan(sources, c, given=given, image_size=flags.image_size)
    print(*transfer.summary(made), sep="\n", flush=True)
    if not flags.dry_run:
        transfer.write(made, flags.to)
        print(f"{flags.to}: {made.parts[0].family.hint.format(to=flags.to)}")
    return 0


def export(flags: argparse.Namespace) -> int:
    for name, size in transfer.export(
        flags.family, flags.source, flags.to, ema=flags.ema, dtype=flags.dtype
    ).items():
        print(f"{size:>16,} bytes  {flags.to}/{name}")
    return 0


def _sources(arguments: list[str]) -> tuple[list[tuple[str, list[str]]], list[str]]:
    """[(family, its sources)], a family and what is named after it, and the other arguments."""
    groups: list[tuple[str, list[str]]] = []
    rest: list[str] = []
    waiting = iter(arguments)
    for argument in waiting:
        flag, equals, value = argument.partition("=")
        if flag == "--family":
            name = value if equals else next(waiting, "")
            if name not in FAMILIES:
                _fail(f"no family {name!r}; there are {NAMES}")
            groups.append((name, []))
        elif not equals and (flag in ("--to", "--image-size") or flag.startswith("--config")):
            rest.append(f"{flag}={next(waiting, '')}")
        elif argument.startswith("-"):
            rest.append(argument)
        elif not groups:
            _fail(f"name the family of {argument!r} before it: --family=F {argument}")
        else:
            groups[-1][1].append(argument)
    if bare := [name for name, where in groups if not where]:
        _fail(f"--family={bare[0]} is followed by no source")
    return groups, rest


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m emu_jax.weights",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser(
        "import", help="a checkpoint of ours from others'; import --help", add_help=False
    )
    out = commands.add_parser(
        "export",
        help="theirs from ours",
        description=EXPORT,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    out.add_argument("--family", required=True, choices=list(FAMILIES))
    out.add_argument(
        "--from",
        dest="source",
        required=True,
        metavar="DIR",
        help="a run's workdir, or one of its checkpoints",
    )
    out.add_argument("--to", required=True, metavar="FOLDER", help="new folder to write into")
    out.add_argument(
        "--ema", action="store_true", help="the moving average of the weights, where they have one"
    )
    out.add_argument(
        "--dtype",
        choices=["float32", "bfloat16", "float16"],
        help="cast to it; default: as the checkpoint has it",
    )
    flat = commands.add_parser(
        "merge", help="a checkpoint without LoRA and with plain matrices, the same model"
    )
    flat.add_argument(
        "--from",
        dest="source",
        required=True,
        metavar="DIR",
        help="a run's workdir, or one of its checkpoints",
    )
    flat.add_argument("--to", required=True, metavar="DIR", help="directory of the new checkpoint")
    check = commands.add_parser(
        "verify", help="run our code on golden files and print its largest errors"
    )
    check.add_argument("files", nargs="+", metavar="FILE.npz")
    for command in (parser, out, flat, check):
        command.error = _fail
    return parser


def _fail(message: str) -> None:
    raise UserError(message)


if __name__ == "__main__":
    sys.exit(main())
