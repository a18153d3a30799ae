"""Import and export checkpoints of other libraries, and merge LoRA.

Each command has its own --help. Read next: transfer.py, families.py.
"""

import argparse
import sys

from emu_jax import cli, config
from emu_jax.config import UserError
from emu_jax.weights import transfer
from emu_jax.weights.families import FAMILIES

NAMES = ", ".join(FAMILIES)
TABLE = "\n".join(f"  {name:17} {family.about}" for name, family in FAMILIES.items())
DESCRIPTION = "Convert checkpoints of other libraries to ours and back, and merge LoRA."
EPILOG = f"""\
families:
{TABLE}

examples:
  python -m emu_jax.weights import --family=llama LLAMA --family=eva-clip EVA.pt --to=DIR
  python -m emu_jax.weights export --family=llama --from=DIR --to=FOLDER
"""
IMPORT = """\
Import one or several checkpoints of other libraries into one of ours.

SOURCE is a folder, a .safetensors, .bin or .pt file, an index, or all files of one checkpoint.
Parts of the model that no source has are left out; training from DIR (--config.init=DIR)
initialises them.
"""
IMPORT_EPILOG = f"""\
families:
{TABLE}

config:
  With --config=FILE, the sources must fit the model of that config. Without it, the sizes are those
  of the sources, and everything else is from configs/pretrain.py (configs/decoder.py for
  stable-diffusion, configs/clip.py for clip). --config.FIELD=VALUE works as in training.

notes:
  The embeddings of tokens that Emu adds start as the mean of the existing rows.
  emu1: LoRA is merged into the weights, or kept if the config's model has LoRA
    (configs/instruct.py, model.lora.rank).
  peft: give the base model too: --family=llama LLAMA --family=peft ADAPTER.
  t5-decoder: the learned queries and the projection are not imported, because a T5 does not have
    them; nor are keys and values of the cross-attention if the T5's width differs from that of the
    visual encoder.
  stable-diffusion: reads unet, vae and the scheduler's config. If the width of the condition
    differs from the config's, training initialises the layers that read the condition.
  clip, inception: these become checkpoints of their own, not parts of an Emu.

examples:
  python -m emu_jax.weights import --family=llama LLAMA --family=eva-clip EVA.pt --to=DIR
  python -m emu_jax.weights import --family=stable-diffusion FOLDER --dry-run
"""
EXPORT = """\
Export a checkpoint of ours to a new folder, in the format of the family's own library.

Writes safetensors, an index and config.json.
llama: a LlamaForCausalLM without Emu's added tokens, with LoRA merged.
emu1: a checkpoint with the released names, with LoRA merged.
peft: only the LoRA, as an adapter of a LlamaForCausalLM; the embeddings of [USER] and [ASSISTANT]
  are not part of it.
stable-diffusion: a folder for StableDiffusionPipeline without a text encoder, because an Emu
  provides the condition.
"""
EXPORT_EPILOG = """\
examples:
  python -m emu_jax.weights export --family=llama --from=runs/pretrain --to=FOLDER
  python -m emu_jax.weights export --family=emu1 --from=DIR --to=FOLDER --ema --dtype=bfloat16
"""
MERGE = "Merge LoRA into the matrices it adapts, and dequantize int8 and nf4 matrices."
SOURCE = "workdir of a run, or one of its checkpoints"


def main(arguments: list[str] | None = None) -> int:
    """Run a command and return its exit status: 0, or 2 after a message for bad input.

    `verify`, an old name of emu_jax.verify, returns the statuses of that command.
    """
    return cli.run(_run, arguments)


def _run(arguments: list[str]) -> int:
    command = arguments[0] if arguments else ""
    rest = arguments[1:]
    try:
        if command == "import":
            return import_(rest)
        # `verify` was a command of this module in older versions.
        if command == "verify":
            from emu_jax import verify

            return verify.main(rest)
        # `merge` was called `bake` in older versions.
        if command == "bake":
            arguments = ["merge", *rest]
        flags = _parser().parse_args(arguments)
        return merge(flags) if flags.command == "merge" else export(flags)
    except transfer.Misfit as error:
        print(*error.lines, sep="\n", file=sys.stderr)
        raise


def import_(arguments: list[str]) -> int:
    """Import a checkpoint, or with --dry-run print what an import would do."""
    sources, rest = _sources(arguments)
    parser = cli.Parser(
        prog="python -m emu_jax.weights import",
        usage="%(prog)s --family=F SOURCE... [--family=F SOURCE...] --to=DIR [--config=FILE]",
        description=IMPORT,
        epilog=IMPORT_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--to", metavar="DIR", help="directory of the new checkpoint")
    parser.add_argument(
        "--image-size",
        type=int,
        metavar="PIXELS",
        help="interpolate position embeddings (bicubic) to images of this size",
    )
    parser.add_argument(
        "--dry-run", action="store_true", help="print what would be imported, and write nothing"
    )
    flags, rest = parser.parse_known_args(rest)
    given = any(argument.startswith("--config=") for argument in rest)
    if not given:
        files = [FAMILIES[family].config_file for family, _ in sources]
        file = next((file for file in files if file != "pretrain"), "pretrain")
        rest = [f"--config=configs/{file}.py", *rest]
    c = config.load(rest)
    if not sources:
        raise UserError(f"no sources: give --family=F SOURCE..., where F is one of {NAMES}")
    if not flags.to and not flags.dry_run:
        raise UserError("--to=DIR is missing: the directory of the new checkpoint")
    plan = transfer.make_plan(sources, c, given=given, image_size=flags.image_size)
    print(*transfer.summary(plan), sep="\n", flush=True)
    if not flags.dry_run:
        transfer.write(plan, flags.to)
        print(f"{flags.to}: {plan.parts[0].family.hint.format(to=flags.to)}")
    return 0


def export(flags: argparse.Namespace) -> int:
    """Export a checkpoint, and print the files."""
    sizes = transfer.export(flags.family, flags.source, flags.to, ema=flags.ema, dtype=flags.dtype)
    for name, size in sizes.items():
        print(f"{size:>16,} bytes  {flags.to}/{name}")
    return 0


def merge(flags: argparse.Namespace) -> int:
    """Write a checkpoint without LoRA and with plain matrices."""
    transfer.merge(flags.source, flags.to)
    print(f"{flags.to}: a model of plain matrices; start from it with --config.init={flags.to}")
    return 0


def _sources(arguments: list[str]) -> tuple[list[tuple[str, list[str]]], list[str]]:
    """Split arguments into [(family, its sources)] and the others."""
    groups: list[tuple[str, list[str]]] = []
    rest: list[str] = []
    waiting = iter(arguments)
    for argument in waiting:
        flag, equals, value = argument.partition("=")
        if flag == "--family":
            name = value if equals else next(waiting, "")
            if name not in FAMILIES:
                raise UserError(f"no family {name!r}; there are {NAMES}")
            groups.append((name, []))
        elif not equals and (flag in ("--to", "--image-size") or flag.startswith("--config")):
            rest.append(f"{flag}={next(waiting, '')}")
        elif argument.startswith("-"):
            rest.append(argument)
        elif not groups:
            raise UserError(f"name the family of {argument!r} before it: --family=F {argument}")
        else:
            groups[-1][1].append(argument)
    for name, paths in groups:
        if not paths:
            raise UserError(f"--family={name} is followed by no source")
    return groups, rest


def _parser() -> cli.Parser:
    raw = argparse.RawDescriptionHelpFormatter
    parser = cli.Parser(
        prog="python -m emu_jax.weights",
        description=DESCRIPTION,
        epilog=EPILOG,
        formatter_class=raw,
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    commands.add_parser("import", help="make a checkpoint of ours from foreign ones")
    command = commands.add_parser(
        "export",
        help="write a checkpoint of ours in a foreign format",
        description=EXPORT,
        epilog=EXPORT_EPILOG,
        formatter_class=raw,
    )
    command.add_argument("--family", required=True, choices=list(FAMILIES), metavar="F", help=NAMES)
    command.add_argument("--from", dest="source", required=True, metavar="DIR", help=SOURCE)
    command.add_argument("--to", required=True, metavar="FOLDER", help="new folder to write")
    command.add_argument(
        "--ema", action="store_true", help="use the moving average of weights that have one"
    )
    command.add_argument(
        "--dtype",
        choices=["float32", "bfloat16", "float16"],
        help="dtype of the exported tensors (default: the checkpoint's)",
    )
    command = commands.add_parser("merge", help="merge LoRA into plain matrices", description=MERGE)
    command.add_argument("--from", dest="source", required=True, metavar="DIR", help=SOURCE)
    command.add_argument(
        "--to", required=True, metavar="DIR", help="directory of the new checkpoint"
    )
    return parser


if __name__ == "__main__":
    sys.exit(main())
