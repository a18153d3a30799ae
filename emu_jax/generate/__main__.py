"""python -m emu_jax.generate --checkpoint=DIR PART...: text and images from a trained Emu.

Read next: session.py, which is the same as a Python API.
"""

import argparse
import os
import re
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from emu_jax import cli
from emu_jax.config import UserError
from emu_jax.data import images
from emu_jax.generate import media
from emu_jax.generate.generation_config import GenerationConfig

DESCRIPTION = """\
Generate text and images with a trained Emu.

Every PART is a piece of the prompt, in reading order: the path of an image, the path of a video (8
of its frames), or else a text."""
EPILOG = """\
examples (each begins with: python -m emu_jax.generate --checkpoint=DIR):

  caption an image           photo.jpg
  ask about it               --chat photo.jpg "What is this?"
  chat in the terminal       --chat
  learn from examples        dog.png "There are two dogs." cat.png "There is one cat." cow.png
  generate an image          --image --decoder=DIR --out=dog.png "a photo of a dog"
  blend two images           --image --decoder=DIR --out=both.png cat.png tiger.png
  reconstruct an image       --reconstruct --decoder=DIR --out=again.png cat.png
  sample                     --temperature=0.7 --top-p=0.9 --seed=1 photo.jpg
  beam search                --beams=5 --length-penalty=-1 photo.jpg

Text goes to standard output, everything else to standard error. A generated image is saved in --out
as its visual tokens, image-1.npy (float32 [N, D]), and with --decoder also as image-1.png, whose
metadata contain the prompt and the settings. Images are not checked for safety. Exit status: 0, 2
for a user's mistake (explained in one line), 130 after Ctrl-C.

python -m emu_jax.generate precompute --help: inputs of decoder training, made once."""
# Help of each field of GenerationConfig.
TEXT_OPTIONS = {
    "max_new_tokens": "maximum length of the answer; the end of the context also ends it",
    "min_new_tokens": "minimum length: no </s> before",
    "temperature": "sampling temperature; 0: greedy",
    "top_k": "sample among the K likeliest tokens; 0: off",
    "top_p": "nucleus sampling: among the likeliest tokens with this total probability; 1: off",
    "min_p": "sample among tokens at least this share as likely as the likeliest; 0: off",
    "repetition_penalty": "above 1: tokens of the prompt and the answer become less likely",
    "beams": "number of beams; with more than 1 the answer is printed when it is complete",
    "length_penalty": "beams rank by log-probability / length^X; below 0 favours short answers",
    "stop": "end the answer before this text; may be repeated",
    "seed": "random seed of sampling and of the image decoder",
}


@dataclass
class Output:
    """Where generated images are saved: a folder, or a file name that ends in .png.

    A folder gets image-1.npy, image-2.npy, ... from the first free number on; FILE.png is followed
    by FILE-2.png, FILE-3.png, ...
    """

    path: Path
    # Metadata of the first PNG; each further one has the next seed.
    metadata: dict[str, Any]
    saved: int = 0

    def save(self, image) -> Path:
        """Write a GeneratedImage atomically; return the path of its pixels, if it has any.

        Without pixels it is that of the visual tokens. Raises UserError if it cannot be written.
        """
        import numpy as np
        from PIL import Image
        from PIL.PngImagePlugin import PngInfo

        number = self.saved
        self.saved += 1
        path = self._path(number)
        if path.suffix == ".npy":
            with cli.output_file(path, "wb") as file:
                np.save(file, image.visual)
        if image.pixels is None:
            return path
        info = PngInfo()
        for name, value in (self.metadata | {"seed": self.metadata["seed"] + number}).items():
            info.add_itxt(name, str(value))
        path = path.with_suffix(".png")
        with cli.output_file(path, "wb") as file:
            Image.fromarray(image.pixels).save(file, "png", pnginfo=info)
        return path

    def _path(self, number: int) -> Path:
        """FILE.png or FILE-2.png, or the next image-N.npy of the folder."""
        if self.path.suffix == ".png":
            return self.path.with_stem(f"{self.path.stem}-{number + 1}") if number else self.path
        names = os.listdir(self.path) if self.path.is_dir() else []
        matches = [re.fullmatch(r"image-(\d+)\.npy", name) for name in names]
        taken = [int(match[1]) for match in matches if match]
        return self.path / f"image-{max(taken, default=0) + 1}.npy"


def main(arguments: list[str] | None = None) -> int:
    """Run the command and return its exit status."""
    return cli.run(_command, arguments)


def _command(arguments: list[str]) -> None:
    images.silence_pillow()
    if arguments[:1] == ["precompute"]:
        from emu_jax.generate import precompute

        precompute.main(arguments[1:])
    else:
        _run(_parse(arguments))


def _run(flags: argparse.Namespace) -> None:
    # These imports take seconds, and a wrong flag should fail at once.
    from emu_jax.generate.conversation import Conversation
    from emu_jax.generate.placement import inference_mesh
    from emu_jax.generate.session import Session

    config = _generation_config(flags)
    session = Session.load(
        flags.checkpoint,
        ema=flags.ema,
        tokenizer=flags.tokenizer,
        truncate=flags.truncate,
        mesh=inference_mesh(flags.checkpoint),
    )
    if flags.decoder and not (flags.image or flags.reconstruct or session.max_images):
        raise UserError(
            f"--decoder={flags.decoder} is not needed: this model answers with text; "
            "add --image to generate an image"
        )
    parts = [_part(text) for text in flags.parts]
    metadata = {
        "prompt": " ".join(flags.parts),
        "checkpoint": flags.checkpoint,
        "software": "emu_jax",
    }
    if flags.decoder:
        session.image_decoder = _load_decoder(flags, session)
        metadata |= {"decoder": flags.decoder, "seed": flags.seed}
        metadata |= session.image_decoder.sampling
    output = Output(Path(flags.out), metadata)
    conversation = Conversation(session, chat=flags.chat, system=flags.system)
    if not parts:
        _chat(conversation, config, output)
    elif flags.reconstruct:
        size = session.processor.image_size
        images = [media.load_image(Path(part), size) for part in flags.parts]
        _show(session.decode_images(session.encode_images(images)), output)
    elif flags.image:
        image = conversation.generate_image(parts, progress=True)
        # The same visual tokens, decoded with further seeds.
        more = image.visual[None].repeat(flags.count - 1, 0)
        _show([image, *session.decode_images(more)], output)
    elif config.beams > 1:
        prompt = session.chat_prompt(parts, system=flags.system) if flags.chat else parts
        print(session.generate_texts([prompt], config)[0])
    else:
        _show(conversation.reply(parts, config), output)


def _generation_config(flags: argparse.Namespace) -> GenerationConfig:
    values: dict[str, Any] = {name: getattr(flags, name) for name in TEXT_OPTIONS}
    values["stop"] = tuple(flags.stop)
    return GenerationConfig(**values)


def _load_decoder(flags: argparse.Namespace, session):
    from emu_jax.generate import diffusion_decoder

    options = {name: getattr(flags, name) for name in diffusion_decoder.SAMPLING_OPTIONS}
    return diffusion_decoder.load(
        flags.decoder,
        session.model_config,
        mesh=session.mesh,
        overrides={name: value for name, value in options.items() if value is not None},
        empty_prompt=lambda: session.generate_images([[]])[0],
        seed=flags.seed,
    )


def _chat(conversation, config: GenerationConfig, output: Output) -> None:
    """Reply to the lines of standard input; report a mistake and read the next line."""
    while True:
        print("> ", end="", file=sys.stderr, flush=True)
        line = sys.stdin.readline()
        if not line:
            print(file=sys.stderr)
            return
        if not line.strip():
            continue
        try:
            _show(conversation.reply(_split_line(line.strip()), config), output)
        except UserError as error:
            print(f"error: {error}", file=sys.stderr)


def _show(pieces: Iterable, output: Output) -> None:
    """Print texts as they come, and save images."""
    line_is_open = False
    for piece in pieces:
        if isinstance(piece, str):
            print(piece, end="", flush=True)
            line_is_open = bool(piece)
        else:
            print("\n" if line_is_open else "", end="", flush=True)
            print(f"[image: {output.save(piece)}]", file=sys.stderr)
            line_is_open = False
    print("\n" if line_is_open else "", end="", flush=True)


def _part(text: str) -> str | Path:
    if media.is_media_file(text):
        return Path(text)
    if media.has_media_suffix(text) and " " not in text:
        print(f"note: file {text!r} not found, so it is part of the text", file=sys.stderr)
    elif os.path.isfile(text):
        print(
            f"note: {text!r} is not an image or a video, so its name is the text", file=sys.stderr
        )
    return text


def _split_line(line: str) -> list[str | Path]:
    """Parts of a line of a chat: words that name media files, and the texts between them."""
    parts: list[str | Path] = []
    text = ""
    for word in re.split(r"(\s+)", line):
        if media.is_media_file(word):
            parts += [text.strip(), Path(word)]
            text = ""
        else:
            text += word
    parts.append(text.strip())
    return [part for part in parts if part]


def _parse(arguments: list[str]) -> argparse.Namespace:
    parser = cli.Parser(
        prog="python -m emu_jax.generate",
        description=DESCRIPTION,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "parts", nargs="*", metavar="PART", help="text, or path of an image or video"
    )
    parser.add_argument(
        "--checkpoint",
        required=True,
        metavar="DIR",
        help="workdir of a training run, or one of its checkpoints",
    )
    parser.add_argument("--ema", action="store_true", help="use the moving average of the weights")
    parser.add_argument(
        "--tokenizer",
        metavar="FILE",
        help="tokenizer.model or tokenizer.json, if it is not where the checkpoint's config says",
    )
    parser.add_argument(
        "--truncate",
        choices=["never", "left"],
        default="never",
        help="left: cut the beginning of a prompt that is too long; never: refuse it (default)",
    )
    parser.add_argument(
        "--chat",
        action="store_true",
        help="use the chat format of an instruction-tuned model; without PART: in the terminal",
    )
    parser.add_argument(
        "--system",
        metavar="TEXT",
        help='system message of --chat, "" for none (default: what the model was tuned with)',
    )
    images = parser.add_argument_group("images")
    images.add_argument(
        "--image", action="store_true", help="generate an image instead of text: append [IMG]"
    )
    images.add_argument(
        "--reconstruct",
        action="store_true",
        help="encode images to visual tokens and decode these again",
    )
    images.add_argument(
        "--decoder",
        metavar="DIR",
        help="run or checkpoint of the stage decoder, which turns visual tokens into pixels",
    )
    images.add_argument(
        "--out",
        default="generated",
        metavar="DIR",
        help="folder for generated images, or with --decoder a FILE.png (default: generated)",
    )
    images.add_argument(
        "--count",
        type=int,
        default=1,
        metavar="N",
        help="number of images, with the seeds --seed, --seed + 1, ... (default: 1)",
    )
    sampling = parser.add_argument_group("image sampling (default: the decoder's config.drawing)")
    sampling.add_argument("--sampler", metavar="NAME", help="pndm, ddim, euler, dpm++ or flow")
    sampling.add_argument("--steps", type=int, metavar="N", help="number of sampling steps")
    sampling.add_argument("--guidance", type=float, metavar="X", help="guidance scale; 1: off")
    sampling.add_argument(
        "--rescale",
        type=float,
        metavar="X",
        help="rescale of guidance, 0 (off) to 1: reduces overexposure",
    )
    text = parser.add_argument_group("text")
    for name, meaning in TEXT_OPTIONS.items():
        flag = f"--{name.replace('_', '-')}"
        if name == "stop":
            text.add_argument(flag, help=meaning, action="append", default=[], metavar="TEXT")
            continue
        default = getattr(GenerationConfig, name)
        kind = type(default)
        text.add_argument(
            flag,
            help=f"{meaning} (default: {default:g})",
            type=kind,
            default=default,
            metavar="N" if kind is int else "X",
        )
    # What follows -- is part of the prompt, even if it begins with a dash.
    end = arguments.index("--") if "--" in arguments else len(arguments)
    flags = parser.parse_intermixed_args(arguments[:end])
    flags.parts += arguments[end + 1 :]
    _check(flags)
    return flags


def _check(flags: argparse.Namespace) -> None:
    """Raise UserError for flags that do not go together."""
    if not flags.parts and not flags.chat:
        raise UserError("give a prompt: texts and files in reading order; or --chat to chat")
    if flags.image and not flags.parts:
        raise UserError("--image needs a prompt: texts and files in reading order")
    if flags.parts and not any(part.strip() for part in flags.parts):
        raise UserError("the prompt is empty")
    for text in (*flags.parts, *flags.stop, flags.system or ""):
        # Python keeps bytes that are not UTF-8 as lone surrogates.
        if not text.isprintable() and re.search("[\ud800-\udfff]", text):
            raise UserError(f"{text!r} is not UTF-8 text")
    if flags.count < 1:
        raise UserError(f"--count={flags.count} must be at least 1")
    suffix = Path(flags.out).suffix.lower()
    if suffix in media.IMAGE_SUFFIXES and suffix != ".png":
        raise UserError(f"--out={flags.out}: images are written as FILE.png, or into a folder")
    needs_decoder = flags.reconstruct or flags.out.endswith(".png") or flags.count != 1
    if needs_decoder and not flags.decoder:
        raise UserError("--reconstruct, --count and --out=FILE.png need a decoder: --decoder=DIR")
    if flags.reconstruct:
        are_images = [
            media.is_media_file(part) and not media.is_video(Path(part)) for part in flags.parts
        ]
        if not are_images or not all(are_images):
            raise UserError("--reconstruct takes existing image files and nothing else")


if __name__ == "__main__":
    sys.exit(main())
