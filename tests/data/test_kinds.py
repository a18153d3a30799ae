"""Every kind of source, against documents written by hand.

The files are written by the format's own library.
"""

import hashlib
import io
import json
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from PIL import Image

from emu_jax.config import UserError
from emu_jax.data import inspection
from emu_jax.data.builders import card
from emu_jax.data.documents import Document, Picture, Skipped
from emu_jax.data.sources import archives
from emu_jax.data.sources.options import SourceOptions
from tests.support.formats import (
    BLUE,
    bomb,
    encoded,
    film,
    jsonl,
    picture,
    rotated,
    tar,
    write_json,
)


def inspected(kind, path, **options):
    """{id: parts or reason}, with images as (width, height) and roles in front of parts."""
    result = {}
    for document in inspection.inspect_documents(kind, Path(path), SourceOptions(**options)):
        line = inspection.describe(document)
        assert line["id"] not in result
        result[line["id"]] = line.get("skipped") or [
            (part["role"], shown(part)) if "role" in part else shown(part) for part in line["parts"]
        ]
    return result


def shown(part):
    return part["text"] if "text" in part else (part["image"]["width"], part["image"]["height"])


def test_pairs(tmp_path):
    good = encoded(picture())
    grey16 = encoded(
        Image.fromarray((np.arange(48 * 36, dtype=np.uint16) * 30).reshape(36, 48)), "PNG"
    )
    tar(
        tmp_path / "00000.tar",
        {
            "__key__": "000000000",
            "jpg": good,
            "txt": "a red  field\n",
            "json": json.dumps({"caption": "not this", "url": "http://x/0.jpg"}),
        },
        {
            "__key__": "000000001",
            "png": encoded(picture(), "PNG"),
            "json": json.dumps({"caption": "only in the json"}),
        },
        {"__key__": "000000002", "webp": encoded(picture(), "WEBP"), "txt": "as webp"},
        {"__key__": "000000003", "jpg": good, "txt": " \n"},
        {"__key__": "000000004", "jpg": good, "txt": b"caf\xe9"},
        {
            "__key__": "000000005",
            "jpg": good,
            "txt": b"caf\xe9",
            "json": json.dumps({"caption": "café"}),
        },
        {"__key__": "000000006", "jpg": good[: len(good) // 2], "txt": "cut short"},
        {"__key__": "000000007", "jpg": b"", "txt": "of no bytes"},
        {"__key__": "000000008", "jpg": encoded(picture().convert("CMYK")), "txt": "for print"},
        {"__key__": "000000009", "jpg": rotated(picture(), 6), "txt": "a phone held upright"},
        {"__key__": "000000010", "png": grey16, "txt": "sixteen bits"},
        {"__key__": "000000011", "png": bomb(), "txt": "a bomb"},
        {"__key__": "000000012", "txt": "a text alone"},
        {"__key__": "000000013", "jpg": good, "txt": "IMG_2041.JPG"},
        {"__key__": "000000014", "jpg": good, "txt": "\ufeffwith a mark\r\n"},
        {"__key__": "000000015", "jpg": good},
        {"__key__": "000000016", "jpg": good, "txt": "", "json": "{broken"},
    )
    lines = inspected("pairs", tmp_path)
    assert lines.pop("000000006").startswith("not a usable image")
    assert lines == {
        "000000000": [(48, 36), "a red field"],
        "000000001": [(48, 36), "only in the json"],
        "000000002": [(48, 36), "as webp"],
        "000000003": "no caption",
        "000000004": "caption: text is not UTF-8",
        "000000005": [(48, 36), "café"],
        "000000007": "image is empty",
        "000000008": [(48, 36), "for print"],
        "000000009": [(36, 48), "a phone held upright"],
        "000000010": [(48, 36), "sixteen bits"],
        "000000011": "not a usable image: 20000 x 20000 pixels are over the limit of 67108864",
        "000000012": "no image",
        "000000013": "caption is a file name",
        "000000014": [(48, 36), "with a mark"],
        "000000015": "no caption",
        "000000016": "the .json file is broken",
    }


def test_filters_of_pairs(tmp_path):
    words = "a" + "".join(f"b{number}" for number in range(60))

    def sample(key, size, text, score=0.31):
        return {
            "__key__": key,
            "jpg": encoded(picture(size=size)),
            "txt": text,
            "json": json.dumps({"similarity": score}),
        }

    tar(
        tmp_path / "0.tar",
        sample("a", (48, 36), "fine as it is"),
        sample("b", (20, 36), "narrow"),
        sample("c", (400, 36), "a banner"),
        sample("d", (48, 36), "no"),
        sample("e", (48, 36), "unlike its picture", 0.2),
        sample("f", (48, 36), words[:150]),
        sample("g", (48, 36), words[:151]),
    )
    kept = inspected(
        "pairs", tmp_path, min_side=32, max_aspect=3.0, min_chars=3, max_chars=150, min_score=0.28
    )
    assert {key for key, line in kept.items() if isinstance(line, list)} == {"a", "f"}
    assert kept["b"] == "image side under 32 pixels" and kept["e"] == "CLIP score under 0.28"


def test_pairs_in_parquet(tmp_path):
    table = pyarrow.table(
        {
            "key": ["0", "1", "2"],
            "jpg": [encoded(picture()), None, encoded(picture(BLUE))],
            "txt": ["one", None, ""],
            "caption": ["not this", "gone", "from the column"],
            "error_message": [None, "HTTP Error 404", None],
        }
    )
    pyarrow.parquet.write_table(table, tmp_path / "00000.parquet", row_group_size=2)
    assert inspected("pairs", tmp_path) == {
        "0": [(48, 36), "one"],
        "1": "no image: HTTP Error 404",
        "2": [(48, 36), "from the column"],
    }


def test_the_parquet_next_to_a_tar_is_ignored(tmp_path):
    tar(tmp_path / "00000.tar", {"__key__": "0", "jpg": encoded(picture()), "txt": "one"})
    pyarrow.parquet.write_table(
        pyarrow.table({"key": ["0"], "url": ["http://x"], "caption": ["one"]}),
        tmp_path / "00000.parquet",
    )
    assert inspected("pairs", tmp_path) == {"0": [(48, 36), "one"]}
    for path in (tmp_path, tmp_path / "00000.parquet"):
        (tmp_path / "00000.tar").unlink(missing_ok=True)
        with pytest.raises(UserError, match="contains no images"):
            inspected("pairs", path)


def test_a_tar_in_the_order_of_its_folder_gives_every_pair(tmp_path):
    path = tmp_path / "folder.tar"
    with tarfile.open(path, "w") as archive:
        for extension in ("jpg", "txt"):
            for name in ("cat", "dog"):
                data = encoded(picture()) if extension == "jpg" else name.encode()
                member = tarfile.TarInfo(f"./{name}.{extension}")
                member.size = len(data)
                archive.addfile(member, io.BytesIO(data))
    assert inspected("pairs", path) == {"cat": [(48, 36), "cat"], "dog": [(48, 36), "dog"]}


def test_names_with_several_dots_are_pairs_of_their_own(tmp_path):
    path = tar(
        tmp_path / "0.tar",
        {"__key__": "a", "1.jpg": encoded(picture()), "1.txt": "one", "2.jpg": encoded(picture())},
        {"__key__": "b", "jpg": encoded(picture()), "txt": "b", "seg.png": encoded(picture())},
    )
    assert inspected("pairs", path) == {
        "a.1": [(48, 36), "one"],
        "a.2": "no caption",
        "b": [(48, 36), "b"],
    }


def test_what_holds_no_pairs_is_told_apart(tmp_path):
    (tmp_path / "a.txt").write_text("a")
    with pytest.raises(UserError, match="'.*a.txt' is not a file of pairs: its name ends in none"):
        inspected("pairs", tmp_path / "a.txt")
    (tmp_path / "a.png").write_bytes(encoded(picture()))
    told = f"with `tar -cf pictures.tar -C {tmp_path} .`"
    with pytest.raises(UserError, match=told):
        inspected("pairs", tmp_path)
    # img2dataset writes such a parquet file next to loose images, too.
    pyarrow.parquet.write_table(pyarrow.table({"url": ["http://a/a.png"]}), tmp_path / "0.parquet")
    with pytest.raises(UserError, match=told):
        inspected("pairs", tmp_path)


def test_a_tar_cut_short_gives_what_is_whole(tmp_path):
    whole = tar(
        tmp_path / "0.tar",
        *[{"__key__": f"{k}", "jpg": encoded(picture()), "txt": f"number {k}"} for k in range(6)],
    ).read_bytes()
    (tmp_path / "0.tar").write_bytes(whole[: len(whole) // 2])
    lines = inspected("pairs", tmp_path)
    assert lines["0"] == [(48, 36), "number 0"] and lines["0.tar"].startswith(
        "the archive is damaged after the sample"
    )


@pytest.mark.parametrize("zipped", [False, "flat", "with its folder"])
def test_mmc4(tmp_path, zipped):
    def info(name, index, similarity):
        return {
            "image_name": name,
            "raw_url": f"http://x/{name}",
            "matched_text_index": index,
            "matched_sim": similarity,
        }

    shard = jsonl(
        tmp_path / "docs_shard_0_v2.jsonl",
        {
            "url": "http://x/0",
            "text_list": ["First.", "Second.", "Third."],
            "similarity_matrix": [[0.1]],
            "image_info": [
                info("b.png", 2, 0.33),
                info("a.jpg", 0, 0.32),
                info("low.jpg", 1, 0.3199),
                info("gone.jpg", 1, 0.4),
            ],
        },
        {"text_list": ["Nothing fits."], "image_info": [info("a.jpg", 0, 0.1)]},
        {
            "text_list": ["Out of range."],
            "image_info": [info("a.jpg", 7, 0.5), info("../secret.jpg", 0, 0.9)],
        },
        {"text_list": "no list"},
    )
    with shard.open("ab") as file:
        file.write(b"{not json\n\xff\xfe\n")
    images = {
        "a.jpg": encoded(picture()),
        "b.png": encoded(picture(size=(40, 40)), "PNG"),
        "low.jpg": encoded(picture()),
    }
    (tmp_path / "secret.jpg").write_bytes(encoded(picture()))
    if zipped:
        with zipfile.ZipFile(tmp_path / "docs_shard_0_v2.jsonl.zip", "w") as archive:
            archive.write(shard, shard.name)
        shard.unlink()
        with zipfile.ZipFile(tmp_path / "docs_shard_0_v2_images.zip", "w") as archive:
            for name, data in images.items():
                archive.writestr(
                    name if zipped == "flat" else f"docs_shard_0_v2_images/{name}", data
                )
    else:
        (tmp_path / "docs_shard_0_v2_images").mkdir()
        for name, data in images.items():
            (tmp_path / "docs_shard_0_v2_images" / name).write_bytes(data)
    assert inspected("mmc4", tmp_path) == {
        "docs_shard_0_v2:0": [(48, 36), "First.", "Second.", (40, 40), "Third."],
        "docs_shard_0_v2:1": "no image left: similarity under 0.32",
        "docs_shard_0_v2:2": "no image left: image matched to no sentence; image file is missing",
        "docs_shard_0_v2:3": "text_list or image_info is missing",
        "docs_shard_0_v2:4": "line is not JSON",
        "docs_shard_0_v2:5": "line: text is not UTF-8",
    }


def test_obelics(tmp_path):
    data = encoded(picture())
    struct = pyarrow.struct([("bytes", pyarrow.binary()), ("path", pyarrow.string())])
    table = pyarrow.table(
        {
            "images": pyarrow.array(
                [[{"bytes": data}, None, {"bytes": data[:200]}], [None], [None, {"bytes": b""}]],
                pyarrow.list_(struct),
            ),
            "texts": [
                [None, "A paragraph.\n\nAnother.", None],
                ["No picture."],
                ["One that is empty.", None],
            ],
            "general_metadata": ['{"url": "http://x/0"}', "{", None],
        }
    )
    pyarrow.parquet.write_table(table, tmp_path / "train-00000.parquet")
    lines = inspected("obelics", tmp_path)
    assert lines == {
        "train-00000:0": [(48, 36), "A paragraph.\n\nAnother."],
        "train-00000:1": "no image",
        "train-00000:2": "no image left: image is empty",
    }
    document, *_ = inspection.inspect_documents("obelics", tmp_path, SourceOptions())
    assert document.provenance == {"url": "http://x/0"} and document.dropped[0].startswith(
        "not a usable image"
    )


def test_obelics_of_addresses(tmp_path):
    """The public release, which has only image addresses, with img2dataset's downloads."""
    urls = ["http://x/a.jpg", "http://x/failed.jpg", "http://x/never.jpg"]
    table = pyarrow.table(
        {"images": [[urls[0], None, urls[1], urls[2]]], "texts": [[None, "Between.", None, None]]}
    )
    pyarrow.parquet.write_table(table, tmp_path / "0.parquet")
    down = tmp_path / "down"
    tar(down / "00000.tar", {"__key__": "000000000", "jpg": encoded(picture()), "json": "{}"})
    pyarrow.parquet.write_table(
        pyarrow.table(
            {
                "url": urls[:2],
                "key": ["000000000", "000000001"],
                "status": ["success", "failed_to_download"],
            }
        ),
        down / "00000.parquet",
    )
    assert inspected("obelics", tmp_path / "0.parquet") == {
        "0:0": "no image left: only the URL of the image is known"
    }
    assert inspected("obelics", tmp_path / "0.parquet", images=str(down)) == {
        "0:0": [(48, 36), "Between."]
    }


PAGE = """<!doctype html><html><head><title>A page</title><script>var a = "<p>no</p>"</script>
<meta charset="utf-8"></head><body>
<header><a href="/"><img src="/img/brand.png"></a></header><nav><ul><li>Home</li></ul></nav>
<div class="breadcrumb">Home / Here</div>
<h1>The   title</h1><p>Before <b>the</b> picture&nbsp;&amp; all<br>next line.</p>
<figure><img src="img/photo.jpg" alt="a photo"><figcaption>Its caption</figcaption></figure>
<p>After it <img src="img/tiny.png"> in line.</p><p hidden>hidden</p>
<img src="img/photo.jpg"><img src="http://far/away.jpg"><img src="img/gone.png">
<img src="../secret.png"><img src="img/site-logo.png">
<pre>  code
    kept</pre>
<img data-src="img/a%20b.png?v=2" src="data:image/gif;base64,R0lGODlhAQABAAAAACw=">
<p>The end.</p><img src="/etc/passwd"><img src="file:///etc/passwd"><img src="link.png">
<footer>© nobody</footer></body></html>"""


@pytest.fixture
def site(tmp_path):
    root = tmp_path / "site"
    (root / "img").mkdir(parents=True)
    for name, size in (
        ("brand.png", (80, 80)),
        ("photo.jpg", (90, 70)),
        ("tiny.png", (20, 20)),
        ("a b.png", (70, 71)),
        ("site-logo.png", (90, 90)),
        ("shared.png", (90, 91)),
    ):
        (root / "img" / name).write_bytes(
            encoded(picture(size=size), "JPEG" if name.endswith("jpg") else "PNG")
        )
    (tmp_path / "secret.png").write_bytes(encoded(picture(size=(99, 99)), "PNG"))
    (root / "link.png").symlink_to(tmp_path / "secret.png")
    (root / "index.html").write_text(PAGE)
    (root / "bare.html").write_text("<p>Text alone.")
    two = '<meta charset="iso-8859-1"><p>Café</p><img src=img/shared.png><img src="img/a b.png">'
    (root / "two.htm").write_bytes(two.encode("latin-1"))
    (root / "three.html").write_text(
        "<main><header>Of the article</header><img src=img/shared.png></main><p>Outside.</p>"
    )
    (root / "four.html").write_text(
        "<div>" * 5000 + "deep <img src=img/shared.png><img src='img/photo.jpg' width=16 height=16>"
    )
    return root


EXPECTED = [
    "The title\nBefore the picture & all\nnext line.",
    (90, 70),
    "Its caption\nAfter it in line.\n  code\n    kept",
    (70, 71),
    "The end.",
]


def test_html(site):
    lines = inspected("html", site)
    assert lines["index.html"] == EXPECTED
    assert lines["bare.html"] == "no image"
    assert lines["two.htm"] == ["Café", (70, 71)]
    assert lines["three.html"] == "no image left: image repeated on several pages"
    assert lines["four.html"] == "no image left: image repeated on several pages; icon, by its size"
    # Read alone, a page has no image that is repeated on several pages.
    assert inspected("html", site / "three.html") == {"three.html": ["Of the article", (90, 91)]}
    without_captions = inspected("html", site, captions=False, alt=True)["index.html"]
    assert without_captions[2] == "a photo\nAfter it in line.\n  code\n    kept"


@pytest.mark.parametrize(
    ("base", "found"),
    [
        ("img/", True),
        ("/img/any.html", True),
        ("img", False),
        ("../", False),
        ("http://far/img/", False),
    ],
)
def test_html_has_a_base(site, base, found):
    (site / "based.html").write_text(f"<base href='{base}'><p>Look</p><img src=photo.jpg>")
    line = inspected("html", site / "based.html")["based.html"]
    assert line == (["Look", (90, 70)] if found else line) and isinstance(line, list) == found


@pytest.mark.parametrize("archive", ["zip", "tar"])
def test_html_in_an_archive(site, tmp_path, archive):
    """Links in a tar are not followed; the zip contains no links."""
    path = tmp_path / f"site.{archive}"
    names = [
        name
        for name in sorted(site.rglob("*"))
        if archive == "tar" or (name.is_file() and not name.is_symlink())
    ]
    with zipfile.ZipFile(path, "w") if archive == "zip" else tarfile.open(path, "w") as file:
        for name in names:
            if archive == "zip":
                file.write(name, name.relative_to(site))
            else:
                file.add(name, name.relative_to(site), recursive=False)
    assert inspected("html", path) == inspected("html", site)


def test_nothing_outside_is_read(site, tmp_path, monkeypatch):
    """Every file that is opened lies in the folder, whatever the page names."""
    for number, source in enumerate(
        (
            "../secret.png",
            "img/../../secret.png",
            "..%2Fsecret.png",
            str(tmp_path / "secret.png"),
            f"file://{tmp_path}/secret.png",
            "link.png",
            "..\\secret.png",
            "img/..//../secret.png",
            "//../secret.png",
            "./.././secret.png",
            "\0../secret.png",
        )
    ):
        (site / f"evil{number}.html").write_text(f"<p>Look</p><img src='{source}'>")
    opened = []
    read_bytes = Path.read_bytes

    def recorded(path):
        opened.append(path.resolve())
        return read_bytes(path)

    monkeypatch.setattr(Path, "read_bytes", recorded)
    lines = inspected("html", site)
    for number in range(11):
        line = lines[f"evil{number}.html"]
        assert isinstance(line, str) and "several pages" not in line
    assert len(opened) > 15 and all(path.is_relative_to(site.resolve()) for path in opened)
    for name in ("../secret.png", "/etc/passwd", "link.png", "a/../../secret.png"):
        assert name not in archives.Files(site)
        with pytest.raises(ValueError):
            archives.Files(site).read(name)


def greys(kind, path, **options):
    """(frame numbers, document) of the only document.

    The mean grey of a picture tells which frame of `film` it is.
    """
    (document,) = [
        one
        for one in inspection.inspect_documents(kind, Path(path), SourceOptions(**options))
        if isinstance(one, Document)
    ]
    return [
        round((float(part.data.mean()) - 10) / 10)
        for part in document.parts
        if isinstance(part, Picture)
    ], document


def test_videos(tmp_path):
    caption = "Rome, Italy - May 3, 2017: a cat runs. 4k, 60 fps"
    tar(
        tmp_path / "tars" / "00000.tar",
        {"__key__": "000000000", "mp4": film(None, 17), "txt": caption, "json": "{}"},
    )
    numbers, document = greys("videos", tmp_path / "tars")
    assert numbers == [1, 3, 5, 7, 9, 11, 13, 15] and document.parts[-1].text == "a cat runs"
    assert len(greys("videos", tmp_path / "tars", choose="random")[0]) == 8
    folder = tmp_path / "files"
    folder.mkdir()
    film(folder / "short.mp4", 3)
    (folder / "short.txt").write_text("three frames")
    film(folder / "silent.mp4", 3)
    (folder / "broken.mp4").write_bytes(film(None, 9)[:400])
    (folder / "broken.txt").write_text("cannot be decoded")
    lines = inspected("videos", folder)
    assert (
        lines["short.mp4"] == [(64, 48)] * 8 + ["three frames"]
        and lines["silent.mp4"] == "no caption"
    )
    assert lines["broken.mp4"].startswith("not a usable video")


def test_storyboards(tmp_path):
    """Frames are in numeric order, although TarWriter writes "10.png" before "2.png".

    Emu's tool writes storyboards with webdataset's TarWriter, which sorts names as strings.
    """
    frames = {f"{k}.png": encoded(picture(size=(48, 30 + k)), "PNG") for k in range(11)}
    tar(
        tmp_path / "0000000.tar",
        {
            "__key__": "dQw4w9_-XcQ",
            **frames,
            **{f"{k}.txt": "" for k in range(11)},
            "2.txt": "two before",
            "10.txt": "ten  before",
            "11.txt": "the end",
            "final_meta.json": json.dumps(
                {"id": "dQw4w9_-XcQ", "duration": 107, "frame_num": 11, "sb": {}, "subtitle": []}
            ),
        },
        {"__key__": "nothing", "0.txt": "words", "final_meta.json": "{}"},
        {
            "__key__": "half",
            "0.png": frames["0.png"][:90],
            "1.png": frames["1.png"],
            "0.txt": "",
            "1.txt": "still here",
        },
    )
    lines = inspected("storyboards", tmp_path)
    assert lines["dQw4w9_-XcQ"] == [
        (48, 30),
        (48, 31),
        "two before",
        *[(48, 30 + k) for k in range(2, 10)],
        "ten before",
        (48, 40),
        "the end",
    ]
    assert lines["nothing"] == "no frames" and lines["half"] == ["still here", (48, 31)]
    document, *_ = inspection.inspect_documents("storyboards", tmp_path, SourceOptions())
    assert [part.time for part in document.parts if isinstance(part, Picture)] == [
        10.0 * k for k in range(11)
    ]
    cut = inspected("storyboards", tmp_path, max_images=4)
    assert [
        len([part for part in cut[key] if isinstance(part, tuple)])
        for key in ("dQw4w9_-XcQ", "dQw4w9_-XcQ#1", "dQw4w9_-XcQ#2")
    ] == [4, 4, 3]
    assert [*cut["dQw4w9_-XcQ"], *cut["dQw4w9_-XcQ#1"], *cut["dQw4w9_-XcQ#2"]] == lines[
        "dQw4w9_-XcQ"
    ]


def test_subtitled(tmp_path):
    film(tmp_path / "a.mp4", 30, rate=10)
    (tmp_path / "a.en.vtt").write_bytes(
        "\ufeffWEBVTT\r\n\r\n"
        "00:00:00.100 --> 00:00:01.500\r\n<v Ann>Hello\r\n<i>you</i> &amp; me\r\n\r\n"
        "00:00:00.900 --> 00:00:01.200\r\noverlapping\r\n\r\n"
        "00:00:02.500 --> 00:00:09.000\r\nafter the last\r\n".encode()
    )
    film(tmp_path / "b.mp4", 12, rate=10)
    (tmp_path / "b.srt").write_text(
        "1\n00:00:00,000 --> 00:00:00,500\nat the start\n\n2\n00:00:00,600 --> 00:00:00,700\n\n"
    )
    film(tmp_path / "c.mp4", 5)
    film(tmp_path / "d.mp4", 5)
    (tmp_path / "d.srt").write_bytes(b"1\n00:00:00,000 --> 00:00:00,500\ncaf\xe9\n")
    (tmp_path / "e.mp4").write_bytes(b"no video")
    (tmp_path / "e.srt").write_text("1\n00:00:00,000 --> 00:00:00,500\nwords\n")
    lines = inspected("subtitled", tmp_path, every=1.0)
    frame = (64, 48)
    assert lines["a.mp4"] == [frame, "Hello you & me overlapping", frame, frame, "after the last"]
    assert lines["b.mp4"] == [frame, "at the start", frame]
    assert (
        lines["c.mp4"] == "no subtitles"
        and lines["d.mp4"] == "subtitles are not UTF-8"
        and lines["e.mp4"].startswith("not a usable video")
    )
    (tmp_path / "only").mkdir()
    (tmp_path / "a.mp4").rename(tmp_path / "only" / "a.mp4")
    (tmp_path / "a.en.vtt").rename(tmp_path / "only" / "a.en.vtt")
    assert greys("subtitled", tmp_path / "only", every=1.0)[0] == [0, 10, 20]


def test_text(tmp_path):
    (tmp_path / "a.txt").write_bytes("\ufeffOne document.\r\nTwo lines.\r\n".encode())
    (tmp_path / "bad.txt").write_bytes(b"caf\xe9")
    jsonl(
        tmp_path / "b.jsonl",
        {"text": "first"},
        {"id": "mine", "text": " second "},
        {"text": " "},
        {"title": "no text"},
        {"text": "half \ud83d"},
    )
    assert inspected("text", tmp_path) == {
        "a.txt": ["One document.\nTwo lines."],
        "bad.txt": "text is not UTF-8",
        "b:0": ["first"],
        "mine": ["second"],
        "b:2": "text is empty",
        "b:3": "no text",
        "b:4": "unpaired surrogate in the text",
    }


def turns(*values):
    return [
        {"from": "human" if k % 2 == 0 else "gpt", "value": value} for k, value in enumerate(values)
    ]


def test_llava(tmp_path):
    (tmp_path / "images" / "coco").mkdir(parents=True)
    for name, size in (("coco/a.jpg", (48, 36)), ("b.jpg", (40, 40))):
        (tmp_path / "images" / name).write_bytes(encoded(picture(size=size)))
    write_json(
        tmp_path / "llava.json",
        [
            {
                "id": "before",
                "image": "coco/a.jpg",
                "conversations": turns("<image>\nWhat is it?", "Red.", "Sure?", "Yes."),
            },
            {
                "id": "after",
                "image": "coco/a.jpg",
                "conversations": turns("What is it?\n<image>", "Red."),
            },
            {
                "id": "joined",
                "image": "coco/a.jpg",
                "conversations": turns("<image>What is it?", "Red."),
            },
            {
                "id": "literal",
                "image": "coco/a.jpg",
                "conversations": turns(
                    "<image>\nWrite an <image> tag.", "Use <image> or\n<image>\nso."
                ),
            },
            {
                "id": "text",
                "conversations": turns("What does <image> mean?\n<image>", "A tag: <image>"),
            },
            {
                "id": "unmarked",
                "image": "coco/a.jpg",
                "conversations": turns("What is it?", "Red."),
            },
            {
                "id": "two",
                "image": ["coco/a.jpg", "b.jpg"],
                "conversations": turns("<image>\n<image>\nCompare.", "Alike."),
            },
            {
                "id": "inline",
                "image": ["coco/a.jpg", "b.jpg"],
                "conversations": turns("Is <image> like <image> or not?", "It is."),
            },
            {
                "id": "middle",
                "image": "coco/a.jpg",
                "conversations": turns("What does <image> show?", "Red."),
            },
            {
                "id": "more",
                "image": "coco/a.jpg",
                "conversations": turns(
                    "<image>\nWhat is an\n<image>", "A tag.", "And <image>", "Too."
                ),
            },
            {"id": "gone", "image": "c.jpg", "conversations": turns("<image>\nWhat?", "Red.")},
            {
                "id": "outside",
                "image": "../../secret.jpg",
                "conversations": turns("<image>\nWhat?", "Red."),
            },
        ],
    )

    def user(text):
        return ("user", text)

    def assistant(text):
        return ("assistant", text)

    a = ("user", (48, 36))
    b = ("user", (40, 40))
    assert inspected("llava", tmp_path / "llava.json") == {
        "before": [a, user("What is it?"), assistant("Red."), user("Sure?"), assistant("Yes.")],
        "after": [user("What is it?"), a, assistant("Red.")],
        "joined": [a, user("What is it?"), assistant("Red.")],
        "literal": [a, user("Write an <image> tag."), assistant("Use <image> or\n<image>\nso.")],
        "text": [user("What does <image> mean?\n<image>"), assistant("A tag: <image>")],
        "unmarked": [a, user("What is it?"), assistant("Red.")],
        "two": [a, b, user("Compare."), assistant("Alike.")],
        "inline": [user("Is"), a, user("like"), b, user("or not?"), assistant("It is.")],
        "middle": [user("What does"), a, user("show?"), assistant("Red.")],
        "more": [
            a,
            user("What is an\n<image>"),
            assistant("A tag."),
            user("And <image>"),
            assistant("Too."),
        ],
        "gone": "file 'c.jpg' is missing",
        "outside": "file '../../secret.jpg' is missing",
    }


def test_sharegpt_and_alpaca(tmp_path):
    jsonl(
        tmp_path / "share.jsonl",
        {
            "id": "a",
            "conversations": [
                {"from": "system", "value": "Be kind."},
                *turns("Hi", "Hello", "Bye"),
            ],
        },
        {
            "id": "b",
            "items": [{"from": "gpt", "value": "Not asked."}, *turns("Hi <image>", "Hello")],
        },
        {"id": "c", "conversations": turns("Hi")},
        {"id": "d", "conversations": [{"from": "crow", "value": "Kra"}]},
        {"id": "e", "conversations": []},
        [1],
    )
    assert inspected("sharegpt", tmp_path / "share.jsonl") == {
        "a": [("system", "Be kind."), ("user", "Hi"), ("assistant", "Hello")],
        "b": [("user", "Hi <image>"), ("assistant", "Hello")],
        "c": "no question and answer",
        "d": "unknown speaker 'crow'",
        "e": "no conversation",
        "share:5": "record is not an object",
    }
    write_json(
        tmp_path / "alpaca.json",
        [
            {"instruction": "Add.", "input": "1 2", "output": "3"},
            {"instruction": "Sing.", "input": "", "output": "La"},
            {"instruction": "Hide.", "input": "", "output": ""},
        ],
    )
    assert inspected("alpaca", tmp_path / "alpaca.json") == {
        "alpaca:0": [("user", "Add.\n1 2"), ("assistant", "3")],
        "alpaca:1": [("user", "Sing."), ("assistant", "La")],
        "alpaca:2": "no question and answer",
    }


def test_conversations_on_videos(tmp_path):
    (tmp_path / "videos").mkdir()
    film(tmp_path / "videos" / "v_1.mp4", 9)
    write_json(
        tmp_path / "vc.json",
        [
            {
                "video": "v_1.mp4",
                "QA": [
                    {"i": "Watch.", "q": "What?", "a": "Grey."},
                    {"i": "", "q": "And?", "a": "Greyer."},
                ],
            },
            {"video": "gone.mp4", "QA": [{"q": "What?", "a": "Grey."}]},
            {"video": "v_1.mp4", "QA": []},
        ],
    )
    shown = [("user", (64, 48))] * 8
    assert inspected("videochat", tmp_path / "vc.json") == {
        "vc:0": [
            ("system", "Watch."),
            *shown,
            ("user", "What?"),
            ("assistant", "Grey."),
            ("user", "And?"),
            ("assistant", "Greyer."),
        ],
        "vc:1": "file 'gone.mp4' is missing",
        "vc:2": "no QA",
    }
    write_json(
        tmp_path / "vcg.json",
        [
            {"q": "What?", "a": "Grey.", "video_id": "v_1"},
            {"id": "x", "video": "v_1.pkl", "conversations": turns("What?\n<video>", "Grey.")},
        ],
    )
    assert inspected("videochatgpt", tmp_path / "vcg.json") == {
        "vcg:0": [*shown, ("user", "What?"), ("assistant", "Grey.")],
        "x": [("user", "What?"), *shown, ("assistant", "Grey.")],
    }


def test_inspection_describes_pixels(tmp_path):
    """An image is described by the sha256 of its upright pixels and a grid of mean colours."""
    upright = np.asarray(picture(size=(8, 4)).rotate(90, expand=True))
    tar(
        tmp_path / "0.tar",
        {"__key__": "0", "png": encoded(Image.fromarray(upright), "PNG"), "txt": "turned"},
    )
    image, _ = inspection.describe(
        next(inspection.inspect_documents("pairs", tmp_path, SourceOptions()))
    )["parts"]
    assert image["image"]["sha256"] == hashlib.sha256(upright.tobytes()).hexdigest()
    assert (
        image["image"]["grid"][0] == upright[:2, :1].mean((0, 1)).round(2).tolist()
        and len(image["image"]["grid"]) == 16
    )
    assert inspection.grid(np.full((1, 3, 3), 7, np.uint8)) == [[7.0, 7.0, 7.0]] * 16


@pytest.mark.parametrize("kind", ["pairs", "mmc4", "html", "llava", "videos"])
def test_missing_input_is_one_line(kind, tmp_path):
    for path in (tmp_path / "nope", tmp_path):
        with pytest.raises(UserError) as caught:
            list(inspection.inspect_documents(kind, path, SourceOptions()))
        assert "\n" not in str(caught.value) and str(path) in str(caught.value)


def test_the_page_of_an_inspection(tmp_path):
    page = "".join(
        card.inspection_page(
            "x", [Document("a", (Picture(encoded(picture())), "<b>")), Skipped("c", "because")]
        )
    )
    assert (
        "&lt;b&gt;" in page
        and "left out: because" in page
        and page.count("data:image/jpeg") == 1
        and "1 documents, 1 left out" in page
    )
