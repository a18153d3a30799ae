"""python -m emu_jax.generate --checkpoint=DIR PART...: what a trained Emu makes of a prompt of
texts, images and videos.

Read next: session.py.
"""

import argparse
import os
import re
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from emu_jax.config import UserError
from emu_jax.generate import media
from emu_jax.generate.generation_config import GenerationConfig

EPILOG = """
a PART that names an image or video file that is there is that image or video (8 of its frames); any other PART is text. Examples:

  describe a picture              python -m emu_jax.generate --checkpoint=DIR photo.jpg
  ask about it, in chat format    python -m emu_jax.generate --checkpoint=DIR --chat photo.jpg "what is this?"
  talk (a line may name files)    python -m emu_jax.generate --checkpoint=DIR --chat
  learn from examples             python -m emu_jax.generate --checkpoint=DIR dog.png "There are two dogs." cat.png "There is one cat." cow.png
  draw                            python -m emu_jax.generate --checkpoint=DIR --decoder=DIR --image --out=dog.png "a photo of a dog"
  blend two pictures              python -m emu_jax.generate --checkpoint=DIR --decoder=DIR --image --out=both.png cat.png tiger.png
  what a picture's tokens hold    python -m emu_jax.generate --checkpoint=DIR --decoder=DIR --reconstruct --out=again.png cat.png
  let chance choose               ... --temperature=0.7 --top-p=0.9 --seed=1
  search for the likeliest        ... --beams=5 --length-penalty=-1

Text goes to standard output as it comes, all else to standard error. A drawing is saved in --out: its visual tokens as image-N.npy
(float32 [N, D]), and with --decoder the picture as image-N.png; --out=FILE.png names the picture itself. A picture's metadata hold the prompt
and the settings that drew it. No safety checker looks at pictures. Exit status: 0, or 2 for what you can put right, said in one line.
"""
SAMPLING = {
    "max_new_tokens": "longest answer, in tokens; the end of the model's context ends it too",
    "min_new_tokens": "no </s> before so many",
    "temperature": "0: always the likeliest token; 1: as likely as the model says; below 1 more careful",
    "top_k": "sample among the K likeliest tokens; 0: all",
    "top_p": "sample among the likeliest that together have this probability",
    "min_p": "sample among those at least this share as likely as the likeliest",
    "repetition_penalty": "above 1: what was said before is less likely to be said again",
    "beams": "keep so many answers in view, and print the best when it is complete",
    "length_penalty": "of beams: log-probability / length ** this; below 0 favours short answers",
    "stop": "end before this text; may be given several times",
    "seed": "of what chance decides: the same seed, the same answer",
}


@dataclass
class Output:
    """Where drawings go: a folder, under the next free number, or a FILE.png; the second and later
    ones of a file are FILE-2.png, ...
    """

    path: Path
    # what a picture's metadata say, but its seed: this is the first one's
    told: dict[str, Any]
    saved: int = 0

    def save(self, drawing) -> Path:
        """Writes it, whole or not at all; the path of the picture, or of the visual tokens where
        there is none.
        """
        import numpy as np
        from PIL import Image
        from PIL.PngImagePlugin import PngInfo

        number = self.saved
        self.saved = self.saved + 1
        if self.path.suffix == ".png":
            path = self.path.with_stem(f"{self.path.stem}-{number + 1}") if number else self.path
        else:
            taken = [
                int(match[1])
                for name in _names(self.path)
                if (match := re.fullmatch(r"image-(\d+)\.npy", name))
            ]
            path = self.path / f"image-{max(taken, default=0) + 1}.npy"
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix == ".npy":
            _whole(path, lambda file: np.save(file, drawing.visual))
        if drawing.pixels is None:
            return path
        info = PngInfo()
        for name, value in (self.told | {"seed": self.told["seed"] + number}).items():
            info.add_itxt(name, str(value))
        path = path.with_suffix(".png")
        _whole(path, lambda file: Image.fromarray(drawing.pixels).save(file, "png", pnginfo=info))
        return path


def _names(folder: Path) -> list[str]:
    return os.listdir(folder) if folder.is_dir() else []


def _whole(path: Path, write: Callable[[IO[bytes]], None]) -> None:
    """A file, or none. Raises UserError where it cannot be written."""
    part = path.with_name(f"{path.name}.part")
    try:
        with part.open("wb") as file:
            write(file)
        part.replace(path)
    except OSError as error:
        part.unlink(missing_ok=True)
        raise UserError(f"cannot write {path}: {error.strerror}") from error


def main(arguments: list[str] | None = None) -> int:
    """0, or 2 for what the user can put right, said in one line."""
    arguments = sys.argv[1:] if arguments is None else arguments
    try:
        if arguments[:1] == ["precompute"]:
            from emu_jax.generate import precompute

            precompute.main(arguments[1:])
            return 0
        flags = _parse(arguments)
        _run(flags)
    except (UserError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(file=sys.stderr)
        return 130
    return 0


def _run(flags: argparse.Namespace) -> None:
    # these take seconds to import: a wrong flag is answered at once
    from emu_jax.generate import diffusion_decoder
    from emu_jax.generate.session import Conversation, Session, mesh_of

    options = GenerationConfig(
        **{
            name: tuple(value) if isinstance(value := getattr(flags, name), list) else value
            for name in SAMPLING
        }
    )
    mesh = mesh_of(flags.checkpoint)
    session = Session.load(
        flags.checkpoint,
        ema=flags.ema,
        tokenizer=flags.tokenizer,
        truncate=flags.truncate,
        mesh=mesh,
    )
    parts = [_part(text) for text in flags.parts]
    told = dict(prompt=" ".join(flags.parts), checkpoint=flags.checkpoint, software="emu_jax")
    if flags.decoder:
        given = {
            name: value
            for name in diffusion_decoder.SAMPLING_OPTIONS
            if (value := getattr(flags, name)) is not None
        }
        session.image_decoder = diffusion_decoder.load(
            flags.decoder,
            session.model_config,
            mesh=mesh,
            overrides=given,
            empty_prompt=lambda: session.generate_images([[]])[0],
            seed=flags.seed,
        )
        told |= dict(decoder=flags.decoder, seed=flags.seed, **session.image_decoder.sampling)
    out = Output(Path(flags.out), told)
    conversation = Conversation(session, chat=flags.chat, system=flags.system)
    if not parts:
        _talk(conversation, options, out)
    elif flags.reconstruct:
        _show(
            session.decode_images(
                session.encode_images(
                    [media.load_image(part, session.processor.image_size) for part in parts]
                )
            ),
            out,
        )
    elif flags.image:
        drawing = conversation.generate_image(parts, progress=True)
        _show(
            [drawing, *session.decode_images(drawing.visual[None].repeat(flags.count - 1, 0))], out
        )
    elif options.beams > 1:
        print(
            session.generate_texts(
                [session.chat_prompt(parts, system=flags.system) if flags.chat else parts], options
            )[0]
        )
    else:
        _show(conversation.reply(parts, options), out)


def _talk(conversation, options, out: Output) -> None:
    """Turns until the input ends. What is wrong with a turn is said, and the next one is
    awaited.
    """
    while True:
        print("> ", end="", file=sys.stderr, flush=True)
        line = sys.stdin.readline()
        if not line:
            print(file=sys.stderr)
            return
        if not line.strip():
            continue
        try:
            _show(conversation.reply(_parts(line.strip()), options), out)
        except UserError as error:
            print(f"error: {error}", file=sys.stderr)


def _show(pieces: Iterable, out: Output) -> None:
    """Text as it comes; drawings into `out`."""
    said = ""
    for piece in pieces:
        if isinstance(piece, str):
            print(piece, end="", flush=True)
            said = piece
        else:
            print("\n" if said else "", end="", flush=True)
            print(f"[image: {out.save(piece)}]", file=sys.stderr)
            said = ""
    print("\n" if said else "", end="", flush=True)


def _part(text: str) -> str | Path:
    if media.is_media_file(text):
        return Path(text)
    if media.has_media_suffix(text) and " " not in text:
        print(f"note: there is no file {text!r}: it is taken as text", file=sys.stderr)
    return text


def _parts(line: str) -> list[str | Path]:
    """A line of a chat: words that name media files are those files."""
    parts: list[str | Path] = []
    for word in re.split(r"(\s+)", line):
        if media.is_media_file(word):
            parts.append(Path(word))
        elif parts and isinstance(parts[-1], str):
            parts[-1] += word
        else:
            parts.append(word)
    return [
        part for part in (part.strip() if isinstance(part, str) else part for part in parts) if part
    ]


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m emu_jax.generate",
        description=__doc__.splitlines()[0].partition(": ")[2],
        epilog=EPILOG,
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    # one line, as everywhere
    parser.error = _fail
    parser.add_argument(
        "parts",
        nargs="*",
        metavar="PART",
        help="a text, or the path of an image or video file; in reading order",
    )
    parser.add_argument(
        "--checkpoint",
        required=True,
        metavar="DIR",
        help="a run's workdir, or one of its checkpoints; it knows its tokenizer",
    )
    parser.add_argument(
        "--image",
        action="store_true",
        help="draw: append [IMG] and regress an image's visual tokens",
    )
    parser.add_argument(
        "--reconstruct",
        action="store_true",
        help="draw pictures from their own visual tokens, as the encoder makes them",
    )
    parser.add_argument(
        "--decoder",
        metavar="DIR",
        help="a run of the stage decoder, or one of its checkpoints: drawings become pictures",
    )
    parser.add_argument(
        "--chat",
        action="store_true",
        help="the chat format of a model tuned on instructions; without parts, a conversation",
    )
    parser.add_argument(
        "--system",
        metavar="TEXT",
        help="chat: the system message; by default what the model was tuned with: "
        "the release has one for an image, one for a video",
    )
    parser.add_argument("--ema", action="store_true", help="the moving average of the weights")
    parser.add_argument(
        "--out",
        default="generated",
        metavar="DIR",
        help="where drawings are saved (generated), or with --decoder a FILE.png",
    )
    parser.add_argument(
        "--tokenizer",
        metavar="FILE",
        help="tokenizer.model or tokenizer.json, if it is not where the checkpoint's config says",
    )
    parser.add_argument(
        "--truncate",
        choices=["never", "left"],
        default="never",
        help="left: cut the beginning of a prompt longer than the context",
    )
    drawing = parser.add_argument_group("pictures (as the decoder's config says, unless given)")
    drawing.add_argument("--sampler", metavar="NAME", help="pndm, ddim, euler, dpm++ or flow")
    drawing.add_argument("--steps", type=int, metavar="N", help="of the sampler")
    drawing.add_argument(
        "--guidance",
        type=float,
        metavar="X",
        help="how far away from the negative condition; 1: not at all",
    )
    drawing.add_argument(
        "--rescale", type=float, metavar="X", help="takes guidance's contrast back, up to 1"
    )
    drawing.add_argument(
        "--count",
        type=int,
        default=1,
        metavar="N",
        help="so many pictures, of --seed and the seeds after it (1)",
    )
    text = parser.add_argument_group("text")
    for name, meaning in SAMPLING.items():
        flag = f"--{name.replace('_', '-')}"
        default = getattr(GenerationConfig, name)
        if name == "stop":
            text.add_argument(flag, help=meaning, action="append", default=[], metavar="TEXT")
        else:
            kind = type(default)
            text.add_argument(
                flag,
                help=f"{meaning} ({default:g})",
                type=kind,
                default=default,
                metavar="N" if kind is int else "X",
            )
    flags = parser.parse_intermixed_args(arguments)
    if not flags.parts and not flags.chat:
        _fail("give a prompt: texts and files, in reading order; or --chat for a conversation")
    if flags.image and not flags.parts:
        _fail("--image needs a prompt: texts and files, in reading order")
    if flags.parts and not any(part.strip() for part in flags.parts):
        _fail("the prompt is empty")
    if not flags.decoder and (flags.reconstruct or flags.out.endswith(".png") or flags.count != 1):
        _fail(
            "pictures, so --reconstruct, --count and --out=FILE.png, need a decoder: --decoder=DIR"
        )
    if flags.reconstruct and not (
        flags.parts
        and all(
            media.is_media_file(part) and not media.is_video(Path(part)) for part in flags.parts
        )
    ):
        _fail("--reconstruct takes image files that are there, and nothing else")
    if flags.count < 1:
        _fail(f"--count={flags.count} must be at least 1")
    return flags


def _fail(message: str) -> None:
    raise UserError(message)


if __name__ == "__main__":
    sys.exit(main())
