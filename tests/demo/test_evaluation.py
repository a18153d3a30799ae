"""The demo's scores on examples made by hand, and its commands on untrained models."""

import json
import re
import subprocess
import sys
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from emu_jax import config, stages
from emu_jax.checkpoint import CheckpointManager
from emu_jax.config import UserError
from emu_jax.data import sources, tokenizer
from emu_jax.data.documents import Document, Pair, texts_of
from emu_jax.demo import __main__ as command
from emu_jax.demo import evaluation, history, openmoji, scenes, scores, strip
from emu_jax.demo.captions import Captioned, caption_groups, caption_numbers, name_in_context
from emu_jax.demo.model import Model
from emu_jax.models import emu, module
from tests.support import make

# Texts


def test_f1():
    assert scores.f1("red heart", "red heart") == 1
    # The order of the words does not count.
    assert scores.f1("red heart", "heart red") == 1
    assert scores.f1("red heart", "") == scores.f1("red heart", "cat") == 0
    assert scores.f1("a cat and a pig", "a pig") == pytest.approx(2 * 1 * 0.4 / 1.4)
    # A word counts as often as it occurs.
    assert scores.f1("cat", "cat cat cat") == pytest.approx(0.5)


def test_every_caption_of_the_scenes_is_parsed():
    flat = np.zeros((4, 4, 4), np.uint8)
    for kind in ("counts", "spatial"):
        for scene in scenes.scenes(kind, True, 0, 64, lambda _: flat):
            found = scores.facts(scene.texts[0])
            names = (
                ("number", "first", "background")
                if kind == "counts"
                else ("first", "relation", "second")
            )
            assert " ".join(found[name] for name in names) == scene.combination
            assert scene.texts[0].endswith(f"on {found['background']}")


def test_facts_count_in_their_roles():
    true = "a cat left of a pig on green"
    assert scores.facts_right(true, true) == 1
    assert scores.facts_right(true, "a pig left of a cat on green") == 0.5
    assert scores.facts_right(true, "a cat above an umbrella on green") == 0.5
    assert scores.facts_right(true, "two cats on green") == 0.5
    assert scores.facts_right("two cats on green", "one cat on green") == pytest.approx(2 / 3)
    assert scores.facts_right(true, "grinning cat") == scores.facts_right(true, "") == 0


def test_swapped():
    true = "a cat left of a pig on green"
    assert scores.swapped(true, "a pig above a cat on blue") and not scores.swapped(true, true)
    assert not scores.swapped(true, "two cats on green") and not scores.swapped(
        "two cats on green", "two cats on green"
    )


# Visual tokens


def test_ranks_against_sorting():
    rng = np.random.default_rng(0)
    distances = rng.random((20, 9))
    right = rng.integers(0, 9, 20)
    assert (
        scores.ranks(distances, right)
        == [sorted(row).index(row[r]) for row, r in zip(distances, right)]
    ).all()


def test_collapsed_tokens_rank_last():
    assert (scores.ranks(np.zeros((3, 7)), np.arange(3)) == 6).all()


def test_squared_distances_far_from_the_origin():
    rng = np.random.default_rng(0)
    a, b = (1000 + rng.normal(size=(n, 5)).astype(np.float32) for n in (4, 6))
    want = np.square(a[:, None].astype(np.float64) - b[None]).sum(-1)
    np.testing.assert_allclose(scores.squared_distances(a, b), want, rtol=1e-3)


def test_r2():
    true = np.random.default_rng(0).normal(size=(50, 3, 4))
    assert scores.r2(true, true) == 1
    assert scores.r2(true, np.broadcast_to(true.mean(0), true.shape)) == pytest.approx(0)
    assert scores.r2(true, -true) < -1
    # Constant targets, which a collapsed encoder makes, do not count as success.
    assert scores.r2(np.ones((3, 2, 2)), np.ones((3, 2, 2))) == 0


@pytest.mark.parametrize("directions", [1, 3, 8])
def test_effective_rank(directions):
    rng = np.random.default_rng(0)
    basis = np.linalg.qr(rng.normal(size=(8, 8)))[0][:directions]
    z = rng.normal(size=(4000, directions)) @ basis
    assert scores.effective_rank(z.reshape(-1, 2, 4)) == pytest.approx(directions, rel=0.02)
    assert scores.effective_rank(np.zeros((10, 2, 4))) == 0


def test_nearest():
    rng = np.random.default_rng(0)
    among = rng.integers(0, 256, (7, 8, 8, 3), np.uint8)
    order = rng.permutation(7)
    noisy = np.clip(among[order].astype(int) + rng.integers(-9, 9, among.shape), 0, 255).astype(
        np.uint8
    )
    assert (scores.nearest(noisy, among) == order).all()


def test_batches_have_one_shape_and_lose_nothing():
    shapes = []

    def double(x, y):
        shapes.append(x.shape)
        return 2 * x + y[:, None]

    x = np.arange(2 * 300).reshape(300, 2)
    y = np.arange(300)
    assert (evaluation.in_batches("", double, x, y) == 2 * x + y[:, None]).all()
    assert set(shapes) == {(evaluation.BATCH, 2)}


# The model


@pytest.fixture(scope="module", autouse=True)
def one_shape():
    """Prompts are padded to one length, in batches of four, so that few programs are compiled."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("emu_jax.generate.session.MIN_LENGTH", 128)
        patch.setattr("emu_jax.demo.model.BATCH", 4)
        yield


@pytest.fixture(scope="module")
def model():
    """A debug model with random weights, large enough that its texts differ.

    Its tokenizer has a token per letter.
    """
    c = make.cfg("model.llama.vocab=120", "model.standardise=true")
    p = make.program(c)
    params = jax.tree.map(lambda x: 4 * x if x.ndim > 1 else x, make.params(p))
    letters = tokenizer.Tokenizer(
        120,
        lambda text: [3 + ord(letter) - 97 for letter in text],
        lambda ids: " ".join(map(str, ids)),
    )
    return Model(emu.EmuConfig.of(c.model.to_dict()), params, letters)


@pytest.fixture(scope="module")
def images():
    return np.random.default_rng(0).integers(0, 256, (4, 28, 28, 3), np.uint8)


def test_regressed_tokens_do_not_depend_on_the_other_names_in_the_batch(model):
    names = ["cat", "a", "umbrella"]
    together = model.regress(names)
    assert np.abs(together[0] - together[1]).max() > 0.1
    for name, tokens in zip(names, together):
        np.testing.assert_allclose(model.regress([name])[0], tokens, atol=1e-4)


def test_continuing_an_image_is_captioning_it(model, images):
    captions = model.caption(images)
    assert len(set(captions)) > 1
    assert model.complete([(image,) for image in images]) == captions
    # A longer prompt of two images in the same batch changes nothing.
    prompts = [(images[0],), (images[1], "pig", images[2]), (images[3],)]
    assert model.complete(prompts)[0] == captions[0]


def test_the_second_image_is_seen(model, images):
    said = model.complete([(images[0], "pig", image) for image in images[1:]])
    assert len(set(said)) > 1


def test_a_fourth_drawing_is_named_after_three_examples(model, images):
    drawings = [
        Captioned(str(k), images[k % 4], name, "")
        for k, name in enumerate(("pig", "owl", "cat", "dog", "fox"))
    ]
    (four,) = name_in_context(model, drawings)
    assert four[:3] == drawings[:3] and four[3].true == "dog"
    assert (
        four[3].predicted
        == model.complete([(images[0], "pig", images[1], "owl", images[2], "cat", images[3])])[0]
        != model.caption(images)[3]
    )
    assert not name_in_context(model, drawings[:3])


def test_captions_are_returned_in_the_order_of_the_images():
    """A model that is always right scores 1, whatever order its images are batched in.

    Each image also gets the caption of its own nearest image.
    """

    def source(texts, first):
        return [
            Document(f"counts/{text}", (Pair(np.full((4, 4, 3), first + k, np.uint8), text),))
            for k, text in enumerate(texts)
        ]

    learnt = source(["aaaaaa", "b", "cccc"], 0)
    unseen = source(["two cats on blue", "one pig on pink"], 100)
    texts = {0: "aaaaaa", 1: "b", 2: "cccc", 100: "two cats on  blue ", 101: "one cat on pink"}

    class Right(Model):
        def __init__(self):
            self.tokenizer = tokenizer.Tokenizer(
                256, lambda text: [ord(letter) for letter in text], str
            )

        def caption(self, images):
            return [scores.plain(texts[image[0, 0, 0]]) for image in images]

    captions = caption_groups(
        Right(), {"names_train": (learnt, None), "scenes_held_out": (unseen, learnt)}
    )
    assert [caption.predicted for caption in captions["names_train"]] == ["aaaaaa", "b", "cccc"]
    assert [caption.nearest for caption in captions["scenes_held_out"]] == ["cccc", "cccc"]
    numbers = caption_numbers(captions)
    assert numbers["names_train_exact"] == 1 and "names_train_nearest_exact" not in numbers
    assert numbers["scenes_held_out_exact"] == numbers["scenes_held_out_counts_exact"] == 0.5
    assert (
        numbers["scenes_held_out_facts"] == pytest.approx(5 / 6)
        and numbers["scenes_held_out_nearest_facts"] == 0
    )
    assert numbers["scenes_held_out_spatial_count"] == 0


def test_retrieval_counts_trained_and_held_out_apart():
    drawings = [Captioned(str(k), np.zeros((2, 2, 3), np.uint8), str(k), "") for k in range(8)]
    visual = np.arange(8.0).reshape(8, 1, 1)
    regressed = visual.copy()
    # The first drawing ranks third. The last drawing, which is held out, ranks last.
    regressed[0] = 1.1
    regressed[7] = 0
    drawn, numbers = evaluation.retrieve(drawings, 6, visual, regressed)
    assert [query.rank for query in drawn] == [2, 0, 0, 0, 0, 0, 0, 7]
    assert [name for name, _ in drawn[0].found][:2] == ["1", "2"] and [
        query.held_out for query in drawn
    ] == 6 * [False] + 2 * [True]
    assert numbers["retrieval_top1"] == pytest.approx(5 / 6) and numbers["retrieval_top5"] == 1
    assert numbers["retrieval_held_out_top5"] == 0.5 and numbers["free_run_r2"] < 1


# The history


def test_history(tmp_path):
    folder = tmp_path / "checkpoints" / "20"
    folder.mkdir(parents=True)
    # The first step compiles and has no step_time.
    lines = [
        {"step": 1, "visual_variance": 2.0, "input_wait": 9.0, "padding": 0.9},
        {
            "step": 10,
            "visual_variance": 0.5,
            "input_wait": 0.1,
            "padding": 0.2,
            "step_time": 1.0,
            "tokens_per_second": 10.0,
            "flops_per_second": 1.0,
            "flops_per_second/llama": 1.0,
        },
        {"step": 10, "eval/text_loss": 3.0, "eval/visual_variance": 0.01},
        {
            "step": 20,
            "visual_variance": None,
            "input_wait": 0.2,
            "padding": 0.4,
            "step_time": 2.0,
            "tokens_per_second": 20.0,
            "flops_per_second": 3.0,
            "flops_per_second/llama": 2.0,
        },
        {"step": 30, "visual_variance": 0.001, "step_time": 5.0, "input_wait": 5.0, "padding": 0.1},
    ]
    (tmp_path / "metrics.jsonl").write_text(
        "\n".join(map(json.dumps, lines)) + '\n{"step": 40, "lo'
    )
    assert [line["step"] for line in history.read(str(tmp_path))] == [1, 10, 10, 20, 30]
    # The history of a checkpoint ends at its step.
    lines = history.read(str(folder))
    assert [line["step"] for line in lines] == [1, 10, 10, 20]
    assert history.curve(lines, "visual_variance") == [(1, 2.0), (10, 0.5)]
    assert history.variance(lines) == {
        "visual_variance_first": 2.0,
        "visual_variance_least": 0.5,
        "visual_variance_ratio": 0.25,
    }
    assert history.speed(lines) == pytest.approx(
        {
            "steps": 20,
            "wall_s": 30,
            "step_time_s": 1.5,
            "tokens_per_second": 15,
            "flops_per_second": 2,
            "flops_per_second/llama": 1.5,
            "input_wait_share": 0.1,
            "padding_share": 0.3,
        }
    )
    assert (
        history.read(str(tmp_path / "checkpoints")) == []
        and history.speed([]) == history.variance([]) == {}
    )


def test_targets():
    numbers = {
        "names_train_exact": 0.8,
        "retrieval_top5": 0.59,
        "scenes_held_out_exact": 0.5,
        "scenes_held_out_nearest_exact": 0.26,
        "visual_variance_ratio": 0.09,
        "speed/input_wait_share": 0.02,
    }
    assert [target.reached for target in evaluation.targets(numbers)] == [
        True,
        False,
        True,
        False,
        None,
        None,
        False,
        None,
        False,
    ]
    nothing = evaluation.targets(
        numbers | {"scenes_held_out_exact": 0.0, "scenes_held_out_nearest_exact": 0.0}
    )
    # With a baseline of zero, a score of zero does not reach twice the baseline.
    assert nothing[3].reached is False


# The command


@flax.struct.dataclass
class State:
    trainable: Any
    frozen: Any
    ema: Any
    step: Any


def save(workdir, c):
    stage = stages.STAGES[c.stage]
    params = module.init(stage.module, stage.make_config(c.model.to_dict()), jax.random.key(0))
    # Use NumPy arrays: their checksums need no compiled program.
    state = State(jax.tree.map(np.asarray, params), {}, None, jnp.int32(7))
    CheckpointManager(str(workdir), keep=1, keep_every=0).save(
        7, state, {}, config.to_dict(c), wait=True
    )


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    openmoji.write(folder, 0, 64, first=4)
    texts = [
        text.text
        for split in ("names:train", "scenes:train")
        for document in sources.open_source(f"{folder}/{split}", 64)
        for text in texts_of(document)
    ]
    tokenizer.train(texts, 120, folder / "tokenizer.json")
    return folder


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    save(folder / "warmup", make.cfg("stage=contrastive", "model.llama.vocab=120"))
    save(
        folder / "emu",
        make.cfg("model.llama.vocab=120", "model.standardise=true", f"init={folder}/warmup"),
    )
    (folder / "emu" / "metrics.jsonl").write_text(
        '{"step": 1, "text_loss": 3.0, "visual_variance": 1.0}\n'
    )
    drawing = (
        "drawing.sampler=ddim",
        "drawing.steps=2",
        "drawing.negative=zeros",
        "model.decoder.condition=encoded",
        "optim.ema=0.0",
    )
    save(folder / "decoder", make.decoder_cfg("model.llama.vocab=120", *drawing))
    return folder


def test_the_command(data, runs, capsys):
    assert command.main(["evaluate", f"--checkpoint={runs}/emu", f"--data={data}"]) == 0
    out = capsys.readouterr().out.splitlines()
    assert out[-1] == f"{runs}/emu/report.html"
    results = json.loads((runs / "emu" / "results.json").read_text())
    numbers = results["numbers"]
    assert (
        numbers["names_train_count"] == numbers["names_held_out_count"] == 4
        and numbers["scenes_held_out_count"] == 8
    )
    assert numbers["retrieval_among"] == 8 and len(results["captions"]["scenes_held_out"]) == 8
    # Both encoders have the same random weights.
    assert numbers["raw_variance_ratio"] == pytest.approx(1, abs=1e-4)
    assert all(np.isfinite(value) for value in numbers.values())
    assert all(line.startswith(target["what"]) for line, target in zip(out, results["targets"]))
    assert (
        len(out) == 10
        and len(results["targets"]) == 9
        and "</html>" in (runs / "emu" / "report.html").read_text()
    )
    assert not [name for name in numbers if name.startswith("pictures")] and not list(
        (runs / "emu").glob("*.part")
    )


def test_the_command_with_a_decoder(data, runs, tmp_path):
    assert (
        command.main(
            [
                "evaluate",
                f"--checkpoint={runs}/emu",
                f"--data={data}",
                f"--decoder={runs}/decoder",
                f"--out={tmp_path}",
            ]
        )
        == 0
    )
    results = json.loads((tmp_path / "results.json").read_text())
    numbers = results["numbers"]
    targets = {target["what"]: target for target in results["targets"]}
    assert [
        numbers[f"pictures_{group}_count"]
        for group in ("names_train", "names_held_out", "scenes_held_out")
    ] == [4, 4, 8]
    for source, target in (
        ("encoded", "decoded from a drawing's visual tokens"),
        ("regressed", "decoded from a drawing's name"),
    ):
        (found,) = (value for what, value in targets.items() if what.startswith(target))
        # With only four drawings, the right one is always among the top five.
        assert found["value"] == numbers[f"pictures_names_train_{source}_top5"] == 1.0
        assert (
            0
            <= numbers[f"pictures_scenes_held_out_{source}_top1"]
            <= numbers[f"pictures_scenes_held_out_{source}_top5"]
            <= 1
        )
    assert "Blends" in (tmp_path / "report.html").read_text()


def test_the_strip(data, runs, tmp_path, monkeypatch, capsys):
    arguments = ["strip", f"--checkpoint={runs}/emu", f"--decoder={runs}/decoder"]
    arguments += [f"--data={data}", f"--out={tmp_path}/strip.png"]
    assert command.main(arguments) == 2
    assert "has 4 training drawings; the strip shows 12" in capsys.readouterr().err
    monkeypatch.setattr(strip, "COUNT", 3)
    assert command.main(arguments) == 0
    with Image.open(tmp_path / "strip.png") as image:
        assert image.width == strip.LABELS + 3 * (strip.SIDE + strip.GAP)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--checkpoint={runs}/none"], "no directory"),
        (["--checkpoint={runs}"], "no checkpoint in"),
        (["--checkpoint={runs}/warmup"], "of the stage 'contrastive'"),
        (["--checkpoint={runs}/emu", "--data={runs}"], "no dataset in '{runs}/names'"),
        (["--checkpoint={runs}/emu", "--data={data}", "--warmup={runs}/other"], "no directory"),
        (
            ["--checkpoint={runs}/emu", "--data={data}", "--decoder={runs}/warmup"],
            "not a decoder's",
        ),
        (["--checkpoint={runs}/emu", "--task=demo"], "unrecognized arguments: --task=demo"),
        (["--check={runs}/emu"], "--check={runs}/emu; did you mean --checkpoint?"),
    ],
)
def test_bad_input_is_one_line(arguments, message, data, runs, capsys):
    arguments = ["evaluate", *(argument.format(runs=runs, data=data) for argument in arguments)]
    assert command.main(arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1
    assert message.format(runs=runs) in error


def test_another_tokenizer_is_refused(data, runs):
    save(runs / "large", make.cfg("model.llama.vocab=500"))
    with pytest.raises(UserError, match=re.escape("has 120 pieces")):
        evaluation.evaluate(str(runs / "large"), str(data))


def test_as_a_program():
    done = subprocess.run(
        [sys.executable, "-m", "emu_jax.demo", "evaluate"], capture_output=True, text=True
    )
    assert (
        done.returncode == 2
        and done.stderr.startswith("error: ")
        and "Traceback" not in done.stderr
    )
