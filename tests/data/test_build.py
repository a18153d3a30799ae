"""Builds: what is written can be read, and a killed build resumes to identical bytes."""

import json
import os
import random
import resource
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from PIL import Image

from emu_jax.config import UserError
from emu_jax.data import sources
from emu_jax.data.__main__ import command
from emu_jax.data.builders import build
from emu_jax.data.documents import Document, Pair, Picture, Text
from emu_jax.data.sources import records
from emu_jax.data.sources.options import SourceOptions
from tests.support import formats


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    """Three tars of 8 pairs.

    In each tar, the third image is truncated and the fourth caption is blank.
    """
    to = tmp_path_factory.mktemp("shards")
    for shard in range(3):
        samples = [
            {
                "__key__": f"{shard:05}{k:04}",
                "jpg": formats.encoded(formats.picture(seed=k)),
                "txt": f"picture {k} of shard {shard}",
            }
            for k in range(8)
        ]
        samples[2]["jpg"] = samples[2]["jpg"][:300]
        samples[3]["txt"] = "  "
        formats.tar(to / f"{shard:05}.tar", *samples)
    return to


def everything(folder):
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def test_what_is_built_is_read(shards, tmp_path):
    summary = build.build("pairs", [shards], tmp_path / "set", SourceOptions(), workers=1)
    counts = summary["counts"]
    assert (
        counts["documents"] == 18
        and counts["skipped"] == 6
        and counts["images"] == 18
        and counts["shards"] == 3
    )
    source = sources.open_source(f"{tmp_path}/set:train", 16)
    assert len(source) == 18
    first = source[0]
    assert first.id == "00000/000000000" and first.source == "00000"
    (pair,) = first.parts
    assert (
        isinstance(pair, Pair)
        and pair.text == "picture 0 of shard 0"
        and pair.image.shape == (16, 16, 3)
    )
    assert {document.id for document in source} == {
        f"{s:05}/{s:05}{k:04}" for s in range(3) for k in (0, 1, 4, 5, 6, 7)
    }


def test_the_card_counts_every_skip_with_its_reason(shards, tmp_path):
    build.build("pairs", [shards], tmp_path, SourceOptions(), workers=1)
    card = json.loads((tmp_path / "card.json").read_text())
    assert card["skipped"]["no caption"] == 3 and sum(card["skipped"].values()) == 6
    assert card["histograms"]["images"] == {"1": 18} and card["histograms"]["side"] == {"32": 18}
    page = (tmp_path / "card.html").read_text()
    assert (
        "no caption" in page
        and page.count("data:image/jpeg") == 6
        and "picture 0 of shard 2" in page
        and "<script" not in page
    )


def test_a_build_killed_at_random_ends_byte_equal(shards, tmp_path):
    """Kill a build in one process five times, before random writes, then let it finish."""
    build.build("pairs", [shards], tmp_path / "whole", SourceOptions(), workers=1)
    whole = everything(tmp_path / "whole")
    rng = random.Random(0)

    class Killed(BaseException):
        pass

    with pytest.MonkeyPatch.context() as patch:
        for _ in range(5):
            left = rng.randrange(1, 12)

            def counted(function):
                def call(*arguments, **settings):
                    nonlocal left
                    left -= 1
                    if left < 0:
                        raise Killed
                    return function(*arguments, **settings)

                return call

            with patch.context() as inner:
                inner.setattr(build, "_serialized", counted(build._serialized))
                inner.setattr(build, "_write_text", counted(build._write_text))
                try:
                    build.build(
                        "pairs", [shards], tmp_path / "killed" / "whole", SourceOptions(), workers=1
                    )
                except Killed:
                    pass
    build.build("pairs", [shards], tmp_path / "killed" / "whole", SourceOptions(), workers=1)
    assert everything(tmp_path / "killed" / "whole") == whole


@pytest.mark.long
def test_a_build_of_processes_killed_by_signals_ends_byte_equal(shards, tmp_path):
    build.build("pairs", [shards], tmp_path / "a" / "set", SourceOptions(), workers=1)
    to = tmp_path / "b" / "set"
    arguments = [
        sys.executable,
        "-m",
        "emu_jax.data",
        "build",
        "--kind=pairs",
        f"--from={shards}",
        f"--to={to}",
        "--workers=2",
    ]
    # Kill all processes, or only the parent, whose workers must not disturb the next build.
    for delay in (0.5, 1.5, 3, 5, 8):
        process = subprocess.Popen(
            arguments, start_new_session=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        time.sleep(delay)
        if delay in (3, 8):
            process.kill()
        else:
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    subprocess.run(arguments, check=True, stdout=subprocess.DEVNULL)
    assert everything(to) == everything(tmp_path / "a" / "set")


STREAM = """
import resource, sys
from configs.base import data as defaults
from emu_jax.data import sources
from emu_jax.data.loader import Loader
from emu_jax.data.tokenizer import Tokenizer
sources.CACHE_BYTES = 2 ** 24
folder, readers = sys.argv[1], int(sys.argv[2])
data = defaults()
data.update(
    batch=64,
    tokens=512,
    images=1,
    num_streams=4,
    workers=2,
    readers=readers,
    mixture=(("text", 1.0, f"{folder}:train"),),
)
loader = Loader(data, 0, Tokenizer(256, lambda text: list(text.encode()), lambda ids: ""), 2, 4)
next(item for item in loader if item.stats["epochs"]["text"] >= 1)
loader.close()
for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN):
    print(resource.getrusage(who).ru_maxrss // 1024)
"""


@pytest.mark.long
def test_a_million_records_stream_in_bounded_memory(tmp_path):
    """Building and loading a million records takes no more memory than ten thousand.

    The loader's reader processes are included.
    """
    peaks = []
    for count in (10_000, 1_000_000):
        with (tmp_path / f"{count}.jsonl").open("w") as file:
            file.writelines(
                f'{{"text": "text number {number} of many, all of them short"}}\n'
                for number in range(count)
            )
        subprocess.run(
            [
                sys.executable,
                "-m",
                "emu_jax.data",
                "build",
                "--kind=text",
                f"--from={tmp_path}/{count}.jsonl",
                f"--to={tmp_path}/{count}",
                "--workers=1",
            ],
            check=True,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        peaks.append(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024)
    assert len(sources.open_source(f"{tmp_path}/1000000:train", 8)) == 1_000_000
    assert peaks[1] < peaks[0] + 64
    for readers in (0, 2):
        few, many = (
            subprocess.run(
                [sys.executable, "-c", STREAM, f"{tmp_path}/{count}", str(readers)],
                check=True,
                stdout=subprocess.PIPE,
                text=True,
            ).stdout.split()
            for count in (10_000, 1_000_000)
        )
        assert int(many[0]) < int(few[0]) + 64 and int(many[1]) < int(few[1]) + 32


def test_a_finished_build_is_left_alone(shards, tmp_path):
    build.build("pairs", [shards], tmp_path, SourceOptions(), workers=1)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.glob("*array_record*")}
    build.build("pairs", [shards], tmp_path, SourceOptions(), workers=1)
    assert len(before) == 3 and before == {path: path.stat().st_mtime_ns for path in before}


@pytest.mark.parametrize("suffix", [".part", ".new"])
def test_what_a_killed_build_left_is_deleted(shards, tmp_path, suffix):
    (tmp_path / "parts").mkdir()
    (tmp_path / f"metadata{suffix}").mkdir()
    for name in ("plan.json", "parts/00000.json", "metadata"):
        path = tmp_path / f"{name}{suffix}"
        (path / "features.json" if path.is_dir() else path).write_text("{")
    tasks = build.plan_tasks("pairs", [shards], tmp_path / "plan", SourceOptions())
    (tmp_path / "plan" / "plan.json").rename(tmp_path / "plan.json")
    (tmp_path / "plan").rmdir()
    build.build("pairs", [shards], tmp_path, SourceOptions(), workers=1)
    assert len(tasks) == 3 and not list(tmp_path.rglob(f"*{suffix}"))


def test_another_build_is_not_mixed_in(shards, tmp_path):
    build.build("pairs", [shards], tmp_path, SourceOptions(), workers=1)
    with pytest.raises(UserError, match="a build from different input or with different settings"):
        build.build("pairs", [shards], tmp_path, SourceOptions(min_side=10), workers=1)
    (tmp_path / "begun").mkdir()
    # A build that is killed while it writes its plan leaves this file.
    (tmp_path / "begun" / "plan.json.0.part").write_text("")
    assert build.plan_tasks("pairs", [shards], tmp_path / "begun", SourceOptions())
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("")
    with pytest.raises(UserError, match="is not empty"):
        build.build("pairs", [shards], tmp_path / "mine", SourceOptions(), workers=1)


def test_a_build_without_documents_is_an_error(shards, tmp_path):
    with pytest.raises(
        UserError, match="no record became a document: .* x image side under # pixels"
    ):
        build.build("pairs", [shards], tmp_path, SourceOptions(min_side=1000), workers=1)
    assert not (tmp_path / "dataset_info.json").exists()


def test_a_build_of_nothing_says_so(tmp_path):
    empty = formats.tar(tmp_path / "0.tar")
    with pytest.raises(UserError, match="^no record became a document: the input has no records$"):
        build.build("pairs", [empty], tmp_path / "set", SourceOptions(), workers=1)


def test_the_command_prints_reasons_with_an_example(tmp_path, capsys):
    image = formats.encoded(formats.picture())
    path = formats.tar(
        tmp_path / "0.tar",
        {"__key__": "good", "jpg": image, "txt": "a picture"},
        {"__key__": "odd", "jpg": image, "txt": b"caf\xe9 \x81"},
        {"__key__": "odd2", "jpg": image, "txt": b"caf\xe9 \x81"},
        {"__key__": "bare", "jpg": image},
    )
    command(["build", "--kind=pairs", f"--from={path}", f"--to={tmp_path}/set", "--workers=1"])
    assert capsys.readouterr().out.splitlines()[1:] == [
        "skipped 2: caption: text is not UTF-8 (for example in 'odd')",
        "skipped 1: no caption (for example in 'bare')",
        f"{tmp_path}/set/card.html",
    ]


@pytest.fixture
def noise(tmp_path):
    """A tar with an image that does not compress."""
    pixels = np.random.default_rng(0).integers(0, 256, (200, 200, 3), np.uint8)
    image = formats.encoded(Image.fromarray(pixels), "png")
    return formats.tar(tmp_path / "0.tar", {"__key__": "0", "jpg": image, "txt": "noise"})


def test_a_full_disk_is_one_line(noise, tmp_path, small_disk):
    with pytest.raises(
        UserError, match=f"^cannot write into '{tmp_path}/set': File too large; once"
    ):
        build.build("pairs", [noise], tmp_path / "set", SourceOptions(), workers=1)
    with pytest.raises(UserError, match=f"^cannot write {tmp_path}/long.txt: File too large$"):
        build._write_text(tmp_path / "long.txt", "x" * 2**17)
    small_disk()
    summary = build.build("pairs", [noise], tmp_path / "set", SourceOptions(), workers=1)
    assert summary["counts"]["documents"] == 1


def test_names_stay_unique_or_are_refused(tmp_path):
    for part in ("a", "b"):
        formats.tar(
            tmp_path / part / "00000.tar",
            {"__key__": "0", "jpg": formats.encoded(formats.picture()), "txt": f"of {part}"},
        )
    ids = [
        task.label
        for task in build.plan_tasks("pairs", [tmp_path], tmp_path / "both", SourceOptions())
    ]
    assert ids == ["a/00000", "b/00000"]
    with pytest.raises(UserError, match="two inputs have the name '00000'"):
        build.build(
            "pairs", [tmp_path / "a", tmp_path / "b"], tmp_path / "two", SourceOptions(), workers=1
        )


def test_roles_times_and_provenance_travel():
    """`Records` inverts `example_of`, except that pictures come out decoded."""
    image = np.asarray(formats.picture())
    pair = Pair(Picture(formats.encoded(formats.picture())), Text("x", role="user", time=2.0))
    document = Document(
        "d",
        (
            Text("be kind", role="system"),
            Picture(image, "user", 1.5),
            Text("what?", role="user"),
            Text("a square", role="assistant"),
            pair,
        ),
        "shard",
        {"url": "http://a/ü"},
    )
    example = records.document_example(document, "shard/d", "llava")
    assert example["layout"] == "TITTP" and example["roles"] == [
        "system",
        "user",
        "user",
        "assistant",
        "",
    ]
    assert example["source"] == "shard" and json.loads(example["provenance"]) == {
        "url": "http://a/ü"
    }


def test_conversations_are_read_with_their_roles(tmp_path):
    (tmp_path / "in" / "images").mkdir(parents=True)
    (tmp_path / "in" / "images" / "a.jpg").write_bytes(formats.encoded(formats.picture()))
    formats.write_json(
        tmp_path / "in" / "chats.json",
        [
            {
                "id": "1",
                "image": "a.jpg",
                "conversations": [
                    {"from": "human", "value": "<image>\nWhat is it?"},
                    {"from": "gpt", "value": "A square."},
                ],
            }
        ],
    )
    build.build("llava", [tmp_path / "in"], tmp_path / "set", SourceOptions(), workers=1)
    image, question, answer = sources.open_source(f"{tmp_path}/set:train", 8)[0].parts
    assert (image.data.shape, image.role) == ((8, 8, 3), "user")
    assert (question, answer) == (
        Text("What is it?", role="user"),
        Text("A square.", role="assistant"),
    )


def test_times_of_frames_are_read(tmp_path):
    film = formats.film(None, frames=20, rate=10)
    formats.tar(
        tmp_path / "in" / "0.tar",
        {"__key__": "v", "mp4": film, "vtt": "WEBVTT\n\n00:00.500 --> 00:01.000\nhello\n"},
    )
    build.build(
        "subtitled", [tmp_path / "in"], tmp_path / "set", SourceOptions(every=1.0), workers=1
    )
    before, text, after = sources.open_source(f"{tmp_path}/set:train", 8)[0].parts
    assert text == Text("hello", time=0.5) and before.shape == after.shape == (8, 8, 3)


def test_an_unknown_runner_is_one_line(shards, tmp_path):
    pytest.importorskip("apache_beam")
    with pytest.raises(UserError) as caught:
        command(
            ["build", "--kind=pairs", f"--from={shards}", f"--to={tmp_path}", "--runner=NoRunner"]
        )
    assert "\n" not in str(caught.value) and "--runner" in str(caught.value)


def test_inspect_shows_a_page_or_leaves_nothing(shards, tmp_path, capsys):
    command(["inspect", str(shards / "00000.tar"), "--kind=pairs", f"--page={tmp_path}/page.html"])
    assert (
        "6 documents, 2 left out" in (tmp_path / "page.html").read_text()
        and capsys.readouterr().out == f"{tmp_path}/page.html\n"
    )
    with pytest.raises(UserError):
        command(["inspect", "/nope", "--kind=pairs", f"--page={tmp_path}/other.html"])
    (tmp_path / "no.tar").write_text("not an archive")
    with pytest.raises(UserError, match="nothing of '.*no.tar' can be read as pairs: the archive"):
        command(["inspect", f"{tmp_path}/no.tar", "--kind=pairs", f"--page={tmp_path}/other.html"])
    assert sorted(file.name for file in tmp_path.iterdir()) == ["no.tar", "page.html"]


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["build", "--kind=pairs", "--to=x"], "--from"),
        (
            ["build", "--kind=pairs", "--from=/nope", "--to=/tmp/never-made"],
            "'/nope' does not exist",
        ),
        (["inspect", "x", "--kind=cats"], "invalid choice"),
        (["inspect", "x", "--kind=html", "--alt=maybe"], "neither yes nor no"),
        (["inspect", "x", "--kind=videos", "--frames=0"], "--frames is 0; it must be at least 1"),
        (["inspect", "x", "--kind=subtitled", "--every=nan"], "--every is nan"),
        (["inspect", "x", "--kind=videos", "--choose=all"], "centres or random"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(UserError) as caught:
        command(arguments)
    assert message in str(caught.value) and "\n" not in str(caught.value)
