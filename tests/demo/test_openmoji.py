import functools
import re
import sys
from collections import Counter
from itertools import islice

import numpy as np
import pytest

from emu_jax import demo
from emu_jax.config import UserError
from emu_jax.data import sources, tokenizer
from emu_jax.data.documents import pixels_of, texts_of
from emu_jax.data.sources import records
from emu_jax.demo import __main__ as command
from emu_jax.demo import openmoji, questions, scenes

PAIRS = ("counts", "spatial")
KINDS = ("counts", "spatial", "stories")
SPLITS = (False, True)


@functools.cache
def flat(word):
    """An opaque square in place of a drawing: as large as allowed, in the word's own colour."""
    square = np.full((scenes.drawing_size(64), scenes.drawing_size(64), 4), 255, np.uint8)
    square[..., :3] = (0, 0, 9 * list(scenes.DRAWINGS).index(word))
    return square


@functools.cache
def made(kind, held_out, seed=0):
    return list(scenes.scenes(kind, held_out, seed, 64, flat))


def shown(image):
    """(background, {cell: word}) that can be seen in an image of flat drawings."""
    background = next(
        name
        for name, colour in scenes.BACKGROUNDS.items()
        if tuple(image[0, 31]) == colour or tuple(image[31, 0]) == colour
    )
    words = {}
    for row in (0, 1):
        for column in (0, 1):
            middle = image[row * 32 + 16, column * 32 + 16]
            if tuple(middle) != scenes.BACKGROUNDS[background]:
                words[row, column] = list(scenes.DRAWINGS)[middle[2] // 9]
    return background, words


def caption(background, words):
    """The caption of the given words, computed independently of the code that draws them.

    None if two drawings stand diagonally.
    """
    if len(set(words.values())) == 1:
        number = scenes.NUMBERS[len(words) - 1]
        word = next(iter(words.values()))
        return f"{number} {word}{'s' if len(words) > 1 else ''} on {background}"
    (first, a), (second, b) = sorted(words.items())
    relation = "left of" if first[0] == second[0] else "above" if first[1] == second[1] else None
    article = {word: "an" if word in ("umbrella", "apple", "owl") else "a" for word in (a, b)}
    return relation and f"{article[a]} {a} {relation} {article[b]} {b} on {background}"


@pytest.mark.parametrize("held_out", SPLITS)
@pytest.mark.parametrize("kind", PAIRS)
def test_the_caption_is_what_is_seen(kind, held_out):
    for scene in made(kind, held_out):
        assert scene.layout == "P" and caption(*shown(scene.images[0])) == scene.texts[0]


@pytest.mark.parametrize("held_out", SPLITS)
def test_stories_tell_what_changes(held_out):
    for story in made("stories", held_out):
        seen = [shown(image) for image in story.images]
        first, second = story.combination.split()
        assert caption(*seen[0]) == story.texts[0] and set(seen[0][1].values()) == {first}
        assert set(seen[1][1].values()) == {first, second} and story.texts[1] in (
            f"a {second} comes",
            f"an {second} comes",
        )
        # A story's two drawings stand diagonally: left of and above could form a held-out
        # combination.
        assert caption(*seen[1]) is None
        assert seen[0][1].items() <= seen[1][1].items()
        for (_, words), text in zip(seen[2:], story.texts[2:], strict=True):
            (left,) = set(seen[1][1].values()) - set(words.values())
            assert text == f"the {left} leaves" and words.items() <= seen[1][1].items()
        assert {background for background, _ in seen} == {seen[0][0]}


@pytest.mark.parametrize("kind", KINDS)
def test_drawings_stay_in_their_cells(kind):
    for scene in islice(made(kind, False), 0, None, 5):
        for image in scene.images:
            background, words = shown(image)
            drawn = (image != scenes.BACKGROUNDS[background]).any(-1)
            side = scenes.drawing_size(64)
            for row in (0, 1):
                for column in (0, 1):
                    assert drawn[
                        row * 32 : row * 32 + 32, column * 32 : column * 32 + 32
                    ].sum() == side * side * ((row, column) in words)


def test_jitter_differs_between_renders():
    places = {
        scene.images[0][:32, :32].tobytes()
        for scene in made("counts", False)
        if scene.combination == "four cat blue"
    }
    assert len(places) > 1


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("kind", KINDS)
def test_held_out_combinations_are_whole_and_their_factors_seen(kind, seed):
    train, held_out = scenes.combinations(kind, seed)
    assert len(set(held_out)) == scenes.HELD_OUT[kind] and not set(train) & set(held_out)
    # Together, both splits contain all combinations.
    assert sorted(train + held_out) == sorted(
        one for part in scenes.combinations(kind, seed + 1) for one in part
    )
    assert held_out != scenes.combinations(kind, seed + 1)[1]
    for place in range(len(held_out[0])):
        often = Counter(words[place] for words in train)
        assert all(often[words[place]] >= 10 for words in held_out)


def test_no_held_out_caption_is_trained_on():
    trained = {text for kind in KINDS for scene in made(kind, False) for text in scene.texts}
    for kind in PAIRS:
        assert not trained & {text for scene in made(kind, True) for text in scene.texts}
    triples = {re.sub(" on .*", "", text) for text in trained}
    assert not triples & {re.sub(" on .*", "", scene.texts[0]) for scene in made("spatial", True)}
    stories = {frozenset(scene.texts) for scene in made("stories", False)}
    assert {scene.combination for scene in made("stories", False)}.isdisjoint(
        scene.combination for scene in made("stories", True)
    )
    assert not stories & {frozenset(scene.texts) for scene in made("stories", True)}


def test_scenes_are_a_function_of_seed_and_id():
    again = {scene.id: scene for scene in scenes.scenes("spatial", True, 0, 64, flat)}
    other = {scene.id: scene for scene in scenes.scenes("spatial", False, 1, 64, flat)}
    assert len(again) == len(made("spatial", True))
    for scene in made("spatial", True):
        assert (again[scene.id].images[0] == scene.images[0]).all()
    assert any(
        (other[scene.id].images[0] != scene.images[0]).any()
        for scene in made("spatial", False)
        if scene.id in other
    )


def test_sizes_are_those_of_the_plan():
    assert [(len(made(kind, False)), len(made(kind, True))) for kind in KINDS] == [
        (848, 48),
        (2832, 192),
        (736, 40),
    ]


def test_names_are_told_apart_by_their_drawings():
    assert len(openmoji.files()) > 2000 and not [
        name for name in openmoji.files() if "skin" in name
    ]
    some = ["France", "Clipperton Island", "cook", "man cook", "woman cook", "cat"]
    with pytest.MonkeyPatch.context() as patch:
        chosen = {name: openmoji.files()[name] for name in some}
        patch.setattr(openmoji, "files", lambda: chosen)
        assert openmoji.single_names(64) == sorted(["France", "cat", "cook", "woman cook"])
    assert set(scenes.DRAWINGS.values()) <= set(openmoji.files())


def test_drawings_of_the_scenes_fill_their_square():
    for word in scenes.DRAWINGS:
        drawing = openmoji.cropped_drawing(word, 26)
        assert max(drawing.shape[:2]) == 26 and drawing.shape[2] == 4
        for side in (drawing[0], drawing[-1], drawing[:, 0], drawing[:, -1]):
            assert side[:, 3].max() > 0


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """What `build` writes and returns, with only the first 8 documents of a kind."""
    to = tmp_path_factory.mktemp("openmoji")
    return to, build(to)


def build(to, seed=0):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(openmoji, "write", functools.partial(openmoji.write, first=8))
        return openmoji.build(to, seed, image=28, vocab=160)


def everything(to):
    """(id, texts, images as bytes) of every document in `to`."""
    return {
        split: [
            (
                document.id,
                [text.text for text in texts_of(document)],
                [image.tobytes() for image in pixels_of(document)],
            )
            for document in sources.open_source(f"{to}/{split}", 28)
        ]
        for split in (
            f"{name}:{split}"
            for name in ("names", "scenes", "stories", "questions")
            for split in ("train", "held_out")
        )
    }


def test_build_writes_what_it_says(built):
    to, counts = built
    assert sorted(path.name for path in to.iterdir()) == [
        "LICENSE.txt",
        "names",
        "questions",
        "scenes",
        "sheet.png",
        "stories",
        "tokenizer.json",
    ]
    assert counts["scenes:train"] == Counter(counts=8, spatial=8, images=16)
    assert counts["names:held_out"] == Counter(names=8, images=8)
    assert counts["stories:train"]["stories"] == 8 and counts["stories:train"]["images"] >= 16
    assert counts["questions:train"]["questions"] == 16 <= counts["questions:train"]["images"] <= 32
    mine = tokenizer.load(to / "tokenizer.json", 160)
    for documents in everything(to).values():
        for _, texts, _ in documents:
            assert [mine.decode(mine.encode(text)) for text in texts] == texts


def test_the_licence_travels_with_the_data(built):
    to, _ = built
    line = "OpenMoji – the open-source emoji and icon project"
    licence = (to / "LICENSE.txt").read_text()
    assert line in licence and "CC-BY-SA-4.0" in licence
    for path in to.glob("*/*/*/"):
        assert line in (path / "LICENSE").read_text()
        metadata = records.tfds.builder_from_directory(str(path)).info.metadata
        assert metadata is not None and metadata["license"] == "CC-BY-SA-4.0"


def test_the_same_seed_writes_the_same_data(built, tmp_path):
    to, _ = built
    build(tmp_path / "again")
    assert everything(to) == everything(tmp_path / "again")
    assert (to / "tokenizer.json").read_bytes() == (tmp_path / "again/tokenizer.json").read_bytes()
    build(tmp_path / "other", seed=1)
    assert everything(to)["scenes:train"] != everything(tmp_path / "other")["scenes:train"]


def test_a_killed_build_is_taken_up(built, tmp_path, monkeypatch):
    to, _ = built
    whole = scenes.scenes

    def killed(kind, *arguments):
        yield from islice(whole(kind, *arguments), 3)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(scenes, "scenes", killed)
        with pytest.raises(KeyboardInterrupt):
            build(tmp_path)
    (finished,) = tmp_path.glob("names/*/1.0.0/names-train*")
    # A kill -9 leaves such a folder.
    (tmp_path / "scenes" / finished.parts[-3] / "incomplete.XYZ_1.0.0").mkdir(
        parents=True, exist_ok=True
    )
    before = finished.stat().st_mtime_ns
    assert not list(tmp_path.glob("scenes/*/1.0.0"))
    build(tmp_path)
    assert finished.stat().st_mtime_ns == before
    assert not list(tmp_path.glob("*/*/incomplete*"))
    assert everything(tmp_path) == everything(to)


def test_a_build_of_other_settings_is_not_mixed_in(built):
    with pytest.raises(
        UserError, match="holds data with other settings, seed0_28px_first8, not seed1_28px_first8"
    ):
        build(built[0], seed=1)


def test_a_missing_package_is_named(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "resvg_py", None)
    # Forget the module, so that the command imports it again.
    monkeypatch.delitem(sys.modules, openmoji.__name__)
    monkeypatch.delattr(demo, "openmoji")
    assert command.main(["build", f"--to={tmp_path}"]) == 2
    assert (
        capsys.readouterr().err == "error: drawing the demo's data needs the package resvg_py: "
        "in the checkout of emu_jax, pip install '.[demo]'\n"
    )


def test_a_folder_that_cannot_be_made(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert command.main(["build", f"--to={tmp_path}/file"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["build", "--kind=coco", "--to=x"], "unrecognized arguments: --kind=coco"),
        (["build"], "--to"),
        (["build", "--to=x", "--seed=a"], "invalid int value: 'a'"),
        (["make"], "invalid choice: 'make'"),
        ([], "build"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(UserError) as caught:
        command.command(arguments)
    assert message in str(caught.value) and "\n" not in str(caught.value)


# Questions


@functools.cache
def talks(held_out):
    """{scene id: (scene, [(kind, question, answer)], conversation)}"""
    found = {}
    for kind in PAIRS:
        for scene, talk in zip(
            made(kind, held_out), questions.conversations(made(kind, held_out), 0), strict=True
        ):
            assert talk.id == f"questions/{scene.id}"
            found[scene.id] = (
                scene,
                list(zip(talk.provenance["kinds"], talk.texts[::2], talk.texts[1::2], strict=True)),
                talk,
            )
    return found


@pytest.mark.parametrize("held_out", SPLITS)
def test_answers_are_what_is_seen(held_out):
    """Each answer follows from what the picture shows, found independently of the captions."""
    seen = Counter()
    for scene, talk, _ in talks(held_out).values():
        background, words = shown(scene.images[0])
        places = sorted(words.items())
        for kind, question, answer in talk[:2]:
            seen[kind] += 1
            if kind == "what":
                assert answer == caption(background, words)
            elif kind == "colour":
                assert answer == background
            elif kind == "number":
                assert (
                    question == f"how many {places[0][1]}s are there?"
                    and answer == scenes.NUMBERS[len(words) - 1]
                )
            elif kind == "there":
                assert answer == (
                    "yes" if question.split()[-1].rstrip("?") in words.values() else "no"
                )
            elif kind == "relation":
                assert (
                    question.endswith(f"the {places[1][1]}?") and answer.split()[-1] == places[0][1]
                )
                assert ("left of" in question) == (places[0][0][0] == places[1][0][0])
            else:
                assert [word for word in words.values() if word in questions.ANIMALS] == [
                    answer.removeprefix("the ")
                ]
    assert seen.keys() == {"what", "colour", "number", "there", "relation", "animal"} and min(
        seen.values()
    ) >= (8 if held_out else 100)


def test_conversations_have_turns_and_some_go_on_with_another_picture():
    every = list(talks(False).values())
    longer = [(talk, turns) for _, turns, talk in every if len(talk.images) == 2]
    assert 0.25 < len(longer) / len(every) < 0.42
    for talk, turns in longer:
        assert talk.layout == "ITTTTITT" and len(turns) == 3
        assert turns[2] == ("what", "and what is this?", caption(*shown(talk.images[1])))
        assert talk.roles == (
            "user",
            "user",
            "assistant",
            "user",
            "assistant",
            "user",
            "user",
            "assistant",
        )
    for _, turns, _ in every:
        assert len({question for _, question, _ in turns}) == len(turns)
    yes = Counter(answer for _, turns, _ in every for kind, _, answer in turns if kind == "there")
    assert 0.4 < yes["yes"] / yes.total() < 0.6
