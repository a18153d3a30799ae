"""python -m emu_jax.generate --checkpoint=DIR PART...: what a trained Emu makes of a prompt of texts, images and videos.

Read next: session.py.
"""
import argparse
import os
import re
import sys
from collections.abc import Iterable
from pathlib import Path

from emu_jax.config import UserError
from emu_jax.generate import media
from emu_jax.generate.options import Options

EPILOG = """
a PART that names an image or video file that is there is that image or video (8 of its frames); any other PART is text. Examples:

  describe a picture              python -m emu_jax.generate --checkpoint=DIR photo.jpg
  ask about it, in chat format    python -m emu_jax.generate --checkpoint=DIR --chat photo.jpg "what is this?"
  talk (a line may name files)    python -m emu_jax.generate --checkpoint=DIR --chat
  learn from examples             python -m emu_jax.generate --checkpoint=DIR dog.png "There are two dogs." cat.png "There is one cat." cow.png
  draw                            python -m emu_jax.generate --checkpoint=DIR --image "a photo of a dog"
  blend two pictures              python -m emu_jax.generate --checkpoint=DIR --image cat.png tiger.png
  let chance choose               ... --temperature=0.7 --top-p=0.9 --seed=1
  search for the likeliest        ... --beams=5 --length-penalty=-1

Text goes to standard output as it comes, all else to standard error. A drawing is saved in --out: its visual tokens as image-N.npy
(float32 [N, D]), and image-N.png where the session has a decoder. Exit status: 0, or 2 for what you can put right, said in one line.
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


def main(arguments: list[str] | None = None) -> int:
    """0, or 2 for what the user can put right, said in one line."""
    try:
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
    from emu_jax.generate.session import Conversation, Session, mesh_of  # takes seconds to import: a wrong flag is answered at once
    options = Options(**{name: tuple(value) if isinstance(value := getattr(flags, name), list) else value for name in SAMPLING})
    session = Session.load(flags.checkpoint, ema=flags.ema, tokenizer=flags.tokenizer, truncate=flags.truncate, mesh=mesh_of(flags.checkpoint))
    out, parts = Path(flags.out), [_part(text) for text in flags.parts]
    conversation = Conversation(session, chat=flags.chat, system=flags.system)
    if not parts:
        _talk(conversation, options, out)
    elif flags.image:
        _show([conversation.draw(parts, progress=True)], out)
    elif options.beams > 1:
        print(session.texts([session.chat_prompt(parts, system=flags.system) if flags.chat else parts], options)[0])
    else:
        _show(conversation.say(parts, options), out)


def _talk(conversation, options, out: Path) -> None:
    """Turns until the input ends. What is wrong with a turn is said, and the next one is awaited."""
    while True:
        print("> ", end="", file=sys.stderr, flush=True)
        line = sys.stdin.readline()
        if not line:
            print(file=sys.stderr)
            return
        if not line.strip():
            continue
        try:
            _show(conversation.say(_parts(line.strip()), options), out)
        except UserError as error:
            print(f"error: {error}", file=sys.stderr)


def _show(pieces: Iterable, out: Path) -> None:
    """Text as it comes; drawings into `out`."""
    said = ""
    for piece in pieces:
        if isinstance(piece, str):
            print(piece, end="", flush=True)
            said = piece
        else:
            print("\n" if said else "", end="", flush=True)
            print(_save(piece, out), file=sys.stderr)
            said = ""
    print("\n" if said else "", end="", flush=True)


def _save(drawing, out: Path) -> str:
    """Writes a drawing under the next free number; returns what was written."""
    import numpy as np
    from PIL import Image
    out.mkdir(parents=True, exist_ok=True)
    numbers = [int(match[1]) for name in os.listdir(out) if (match := re.fullmatch(r"image-(\d+)\.npy", name))]
    path = out / f"image-{max(numbers, default=0) + 1}.npy"
    np.save(path, drawing.visual)
    if drawing.pixels is None:
        return f"[image: {path}]"
    Image.fromarray(drawing.pixels).save(path.with_suffix(".png"))
    return f"[image: {path.with_suffix('.png')}]"


def _part(text: str) -> str | Path:
    if media.is_file(text):
        return Path(text)
    if media.named(text) and " " not in text:
        print(f"note: there is no file {text!r}: it is taken as text", file=sys.stderr)
    return text


def _parts(line: str) -> list[str | Path]:
    """A line of a chat: words that name media files are those files."""
    parts: list[str | Path] = []
    for word in re.split(r"(\s+)", line):
        if media.is_file(word):
            parts.append(Path(word))
        elif parts and isinstance(parts[-1], str):
            parts[-1] += word
        else:
            parts.append(word)
    return [part for part in (part.strip() if isinstance(part, str) else part for part in parts) if part]


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m emu_jax.generate", description=__doc__.splitlines()[0].partition(": ")[2], epilog=EPILOG,
                                     allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = _fail                            # one line, as everywhere
    parser.add_argument("parts", nargs="*", metavar="PART", help="a text, or the path of an image or video file; in reading order")
    parser.add_argument("--checkpoint", required=True, metavar="DIR", help="a run's workdir, or one of its checkpoints; it knows its tokenizer")
    parser.add_argument("--image", action="store_true", help="draw: append [IMG] and regress an image's visual tokens")
    parser.add_argument("--chat", action="store_true", help="the chat format of a model tuned on instructions; without parts, a conversation")
    parser.add_argument("--system", metavar="TEXT", help="chat: the system message; by default the release's for one image or one video, else none")
    parser.add_argument("--ema", action="store_true", help="the moving average of the weights")
    parser.add_argument("--out", default="generated", metavar="DIR", help="where drawings are saved (generated)")
    parser.add_argument("--tokenizer", metavar="FILE", help="tokenizer.model or tokenizer.json, if it is not where the checkpoint's config says")
    parser.add_argument("--truncate", choices=["never", "left"], default="never", help="left: cut the beginning of a prompt longer than the context")
    text = parser.add_argument_group("text")
    for name, meaning in SAMPLING.items():
        flag, default = f"--{name.replace('_', '-')}", getattr(Options, name)
        if name == "stop":
            text.add_argument(flag, help=meaning, action="append", default=[], metavar="TEXT")
        else:
            kind = type(default)
            text.add_argument(flag, help=f"{meaning} ({default:g})", type=kind, default=default, metavar="N" if kind is int else "X")
    flags = parser.parse_intermixed_args(arguments)
    if not flags.parts and not flags.chat:
        _fail("give a prompt: texts and files, in reading order; or --chat for a conversation")
    if flags.image and not flags.parts:
        _fail("--image needs a prompt: texts and files, in reading order")
    return flags


def _fail(message: str) -> None:
    raise UserError(message)


if __name__ == "__main__":
    sys.exit(main())
