"""Every task end to end, in its official layout, with a tiny random checkpoint."""

import copy
import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from emu_jax import checkpoint, config
from emu_jax.checkpoint import CheckpointManager
from emu_jax.config import UserError
from emu_jax.data import tokenizer
from emu_jax.evaluate import prompts, retrieval
from emu_jax.evaluate.__main__ import main
from emu_jax.evaluate.metrics import fid
from emu_jax.evaluate.plan import BenchmarkSettings, plan_benchmark
from emu_jax.evaluate.predict import Predictor
from emu_jax.evaluate.tasks import TASKS
from emu_jax.generate.diffusion_decoder import DiffusionDecoder
from emu_jax.generate.session import Session
from emu_jax.hooks import benchmark_evaluator
from emu_jax.plan import make_plan
from emu_jax.weights import __main__ as weights
from tests.support import clips, dictionary, layouts, make

WORDS = [
    "a picture of dog",
    "Question: Short answer:",
    "red and blue",
    "is it the answer known?",
    "one two three four",
] * 9
LAYOUTS = {
    "coco-caption": lambda root: layouts.karpathy(root, "coco", 4),
    "flickr30k": lambda root: layouts.karpathy(root, "flickr30k", 4),
    "nocaps": lambda root: layouts.nocaps(root, 4),
    "vqav2": lambda root: layouts.vqa(root, "v2_"),
    "okvqa": lambda root: layouts.vqa(root, ""),
    "vizwiz": lambda root: layouts.vizwiz(root, 4),
    "visdial": layouts.visdial,
    "msvd-qa": lambda root: layouts.video_qa(root, "msvd", 4),
    "msrvtt-qa": lambda root: layouts.video_qa(root, "msrvtt", 4),
    "nextqa": lambda root: layouts.nextqa(root, 4),
    "mmvet": lambda root: layouts.mmvet(root, 4),
    "coco-t2i": layouts.coco_prompts,
}
SCORES = {
    "captions": {"CIDEr", "Bleu_4", "ROUGE_L"},
    "vqa": {"accuracy"},
    "exact_match": {"exact_match"},
    "wups": {"wups@0", "wups@0.9", "wups@0/CW"},
    "visdial": {"ndcg", "mrr", "recall@5"},
    "judge": {"count"},
    "fid": {"fid", "clip_score"},
}


def save(folder, c, params):
    # NumPy's arrays, whose checksums need no program.
    state = dataclasses.make_dataclass("State", ("trainable", "frozen", "ema", "step"))(
        jax.tree.map(np.asarray, params), {}, None, jnp.int32(7)
    )
    CheckpointManager(str(folder), keep=1, keep_every=0).save(
        7, state, {}, config.to_dict(c), wait=True
    )


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """Checkpoints (emu, chat, decoder, inception, clip) and a dictionary (wordnet)."""
    root = tmp_path_factory.mktemp("root")
    tokenizer.train(WORDS, 140, root / "tokenizer.json")
    for name, added in (("emu", 4), ("chat", 6)):
        c = make.cfg(
            "model.llama.vocab=140",
            f"model.llama.added={added}",
            f"data.tokenizer={root}/tokenizer.json",
            "data.tokens=512",
        )
        save(root / name, c, make.random_params(make.program(c)))
    c = make.decoder_cfg("optim.ema=0.0", "drawing.sampler=ddim", "drawing.steps=2")
    save(root / "decoder", c, make.random_params(make.program(c)))
    save(root / "inception", c, {"Mixed_7c": {"branch_pool": {"w": jnp.zeros(2)}}})
    dictionary.write(root / "wordnet")
    clips.folder(root / "theirs")
    assert weights.main(["import", "--family=clip", str(root / "theirs"), f"--to={root}/clip"]) == 0
    return root


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """data(task): the task's folder, written on first use."""
    root = tmp_path_factory.mktemp("data")

    def of(task):
        if not (root / task).exists():
            LAYOUTS[task](root / task)
            if task == "nextqa":
                shutil.move(root / task / "val.csv", root / task / "test.csv")
        return root / task

    return of


@pytest.fixture(scope="module", autouse=True)
def loaded_once():
    """Load each checkpoint once for all tests, and pad all prompts and answers to one length.

    The tasks then share compiled programs.
    """
    load = Session.load
    sessions = {}

    def cached(directory, *, batch=2, **options: Any):
        options["mesh"] = None
        if (directory, batch) not in sessions:
            sessions[directory, batch] = load(directory, batch=batch, **options)
        return sessions[directory, batch]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Session, "load", cached)
        patch.setattr("emu_jax.generate.session.MIN_LENGTH", 128)
        yield


def call(root, data, task, *more, model="emu"):
    return main(
        [
            f"--task={task}",
            f"--data={data(task)}",
            f"--checkpoint={root}/{model}",
            "--batch=2",
            "--beams=1",
            f"--wordnet={root}/wordnet",
            *(
                f"--{name}={root}/{name}"
                for name in ("decoder", "inception", "clip")
                if task == "coco-t2i"
            ),
            *map(str, more),
        ]
    )


def read(folder):
    return {
        name: json.loads((folder / name).read_text()) for name in ("scores.json", "submission.json")
    }


@pytest.mark.parametrize("task", TASKS)
def test_a_killed_and_resumed_run_gives_the_same_results(
    root, data, tmp_path, monkeypatch, task, capsys
):
    monkeypatch.setattr(
        fid,
        "features",
        lambda params, images: np.stack([np.ravel(image)[:4].astype(float) for image in images]),
    )
    complete = tmp_path / "complete"
    killed = tmp_path / "killed"
    beams = "--beams=2" if task == "coco-caption" else "--beams=1"
    assert call(root, data, task, f"--out={complete}", beams) == 0
    printed = capsys.readouterr().out.splitlines()
    predict = Predictor.predict
    calls = []
    decode = DiffusionDecoder.__call__

    def killed_in_second_call(function):
        def wrapped(*arguments):
            calls.append(1)
            if len(calls) == 2:
                raise KeyboardInterrupt
            return function(*arguments)

        return wrapped

    monkeypatch.setattr(Predictor, "predict", killed_in_second_call(predict))
    monkeypatch.setattr(DiffusionDecoder, "__call__", killed_in_second_call(decode))
    assert (
        call(root, data, task, f"--out={killed}", beams) == 130
        and "the same command resumes" in capsys.readouterr().err
    )
    lines = killed / "predictions-0.jsonl"
    assert len(lines.read_text().splitlines()) == 2 and not (killed / "scores.json").exists()
    with lines.open("a") as file:
        file.write('{"id": "half a li')
    monkeypatch.setattr(Predictor, "predict", predict)
    monkeypatch.setattr(DiffusionDecoder, "__call__", decode)
    assert call(root, data, task, f"--out={killed}", beams) == 0
    assert read(killed) == read(complete)
    results, submitted = read(complete).values()
    assert (
        results.keys() >= SCORES[TASKS[task].metric] | {"step", "count"}
        and results["missing_pictures"] == 0
        and results["step"] == 7
    )
    if task == "nextqa":
        assert sum(map(len, submitted.values())) == results["count"]
    else:
        assert len(submitted) == results["count"]
    page = (complete / "report.html").read_text()
    assert (
        "</html>" in page
        and page.count("<img") >= results["count"]
        and printed[-1] == str(complete / "report.html")
    )
    assert f"count: {results['count']}" in printed and not list(complete.glob("*.part"))


def test_answers_do_not_depend_on_the_batch_and_hosts_share_them(root, data, tmp_path, capsys):
    assert call(root, data, "vqav2", f"--out={tmp_path}/one") == 0
    for host in (0, 1):
        assert (
            call(
                root,
                data,
                "vqav2",
                f"--out={tmp_path}/two",
                "--hosts=2",
                f"--host={host}",
                "--batch=1",
            )
            == 0
        )
    assert read(tmp_path / "one") == read(tmp_path / "two")
    assert "2 of 4 predictions are still to be made by other hosts" in capsys.readouterr().out


def test_a_chat_model_gets_the_releases_prompt(root, data):
    session = Session.load(str(root / "chat"))
    settings = BenchmarkSettings("vizwiz", str(root / "chat"), 7, str(data("vizwiz")), "val")
    predictor = Predictor(session, settings, plan_benchmark(settings, limit=1))
    prompt = predictor.prompt("known", predictor.plan.examples[0], [])
    asked = session.processor.template(
        prompts.question_prompt("known", "What is this?"), [prompt.images]
    )
    assert (
        prompt.tokens == asked.tokens
        and session.tokenizer.user in prompt.tokens
        and len(prompt.images) == 1
    )


def test_shots_are_the_nearest_and_as_many_as_fit(root, data, tmp_path, capsys):
    assert call(root, data, "vqav2", f"--out={tmp_path}/rices", "--shots=2") == 0
    assert read(tmp_path / "rices")["scores.json"]["fewer_shots"] == 0
    settings = BenchmarkSettings(
        "vqav2", str(root / "emu"), 7, str(data("vqav2")), "val2014", shots=2
    )
    session = copy.copy(Session.load(str(root / "emu")))
    plan = plan_benchmark(settings)
    # The run above has saved the index.
    predictor = Predictor(session, settings, plan, tmp_path / "rices" / "examples.npz")
    shots = predictor.choose_shots(plan.examples[:1])[0]
    features = retrieval.compute_features(
        session,
        [
            predictor.frames(name)
            for name in (plan.examples[0].media, *(shot.media for shot in shots))
        ],
    )
    assert (
        features[0] @ features[2] >= features[0] @ features[1]
        and len({shot.media for shot in shots}) == 2
    )
    prompt, used = predictor.fit_prompt(plan.examples[0], shots)
    assert (
        used == 2
        and len(prompt.images) == 3
        and prompt.images[2] is predictor.frames(plan.examples[0].media)[0]
    )
    session.context = len(prompt) + predictor.generation.max_new_tokens - 1
    prompt, used = predictor.fit_prompt(plan.examples[0], shots)
    assert used == 1 and prompt.images[0] is predictor.frames(shots[1].media)[0]
    assert call(root, data, "vqav2", f"--out={tmp_path}/text", "--shots=2", "--text-only") == 0
    assert read(tmp_path / "text")["scores.json"]["text_only"] is True


def test_fewer_shots_than_asked_for_are_reported(root, data, tmp_path, capsys, monkeypatch):
    session = copy.copy(Session.load(str(root / "emu")))
    session.context = 128
    monkeypatch.setattr(Session, "load", lambda directory, **options: session)
    assert (
        call(root, data, "vqav2", f"--out={tmp_path}", "--shots=4", "--text-only", "--limit=2") == 0
    )
    assert "2 of 2 prompts had room for fewer than 4 few-shot examples" in capsys.readouterr().out
    assert read(tmp_path)["scores.json"]["fewer_shots"] == 2


def test_missing_images_are_an_error_or_left_out_and_counted(root, data, tmp_path, capsys):
    folder = shutil.copytree(data("vqav2"), tmp_path / "data")
    (folder / "val2014" / "COCO_val2014_000000000001.jpg").unlink()

    def some(task):
        return folder

    assert call(root, some, "vqav2", f"--out={tmp_path}/out") == 2
    assert (
        "1 of 2 images are missing: COCO_val2014_000000000001.jpg; --allow-missing leaves"
        in capsys.readouterr().err
    )
    assert call(root, some, "vqav2", f"--out={tmp_path}/out", "--allow-missing") == 0
    scores = read(tmp_path / "out")["scores.json"]
    assert scores["missing_pictures"] == 1 and scores["count"] == 2
    assert (tmp_path / "out" / "missing.txt").read_text() == "COCO_val2014_000000000001.jpg\n"


def test_a_split_without_answers_gives_a_submission_only(root, data, tmp_path):
    folder = shutil.copytree(data("vqav2"), tmp_path / "data")
    (folder / "v2_mscoco_val2014_annotations.json").unlink()
    assert call(root, lambda task: folder, "vqav2", f"--out={tmp_path}/out") == 0
    assert (
        "accuracy" not in read(tmp_path / "out")["scores.json"]
        and len(read(tmp_path / "out")["submission.json"]) == 4
    )


@pytest.mark.parametrize(
    ("task", "flags", "message"),
    [
        (
            "vqav2",
            ["--data={data}/okvqa"],
            "no v2_OpenEnded_mscoco_val2014_questions.json anywhere in it, which --task=vqav2 "
            "reads; it looks like --task=okvqa",
        ),
        (
            "msvd-qa",
            ["--data={data}/msrvtt-qa"],
            "test_qa.json: not MSVD-QA's questions: rows have a category_id",
        ),
        ("coco-caption", ["--split=restval"], "no image of split 'restval'; there are test, train"),
        ("mmvet", ["--shots=2"], "mmvet has no split for few-shot examples"),
        ("vqav2", ["--shots=9", "--text-only"], "'train2014' has 4 examples"),
        ("vqav2", ["--shots=9"], "'train2014' has 2 images of examples"),
        ("coco-t2i", ["--inception={root}/emu"], "is not FID's Inception; --inception=DIR"),
        ("coco-t2i", ["--clip={root}/emu"], "is not a CLIP; --clip=DIR"),
        ("nextqa", ["--tagger=/nowhere"], "of the tagger; --tagger=DIR"),
        ("coco-t2i", ["--decoder="], "a trained decoder (--decoder=DIR) and --inception=DIR"),
        ("vqav2", ["--data=/nowhere"], "no folder '/nowhere'"),
        ("nextqa", ["--wordnet=/nowhere"], "no WordNet file"),
        ("vqav2", ["--limit=0"], "'0' is not a positive integer"),
        ("vqav2", ["--text-only"], "--text-only needs --shots"),
        ("vqav2", ["--checkpoint=/nowhere"], "no directory"),
        ("vqav2", ["--host=3", "--hosts=2"], "--host=3 must be from 0 to 1"),
    ],
)
def test_bad_input_is_a_one_line_error(root, data, tmp_path, capsys, task, flags, message):
    data(task), data("okvqa"), data("msrvtt-qa")
    assert (
        call(
            root,
            data,
            task,
            f"--out={tmp_path}/out",
            *(flag.format(data=Path(data(task)).parent, root=root) for flag in flags),
        )
        == 2
    )
    error = capsys.readouterr().err
    assert (
        error.startswith("error: ")
        and error.count("\n") == 1
        and message in error
        and not (tmp_path / "out").exists()
    )


def test_different_settings_and_damaged_lines_are_one_line_errors(root, data, tmp_path, capsys):
    assert call(root, data, "vqav2", f"--out={tmp_path}", "--limit=1") == 0
    assert call(root, data, "vqav2", f"--out={tmp_path}", "--beams=3") == 2
    assert (
        "predictions of different settings: beams was 1 and is 3 now; choose another --out"
        in capsys.readouterr().err
    )
    (tmp_path / "predictions-0.jsonl").write_text("no json\n")
    assert call(root, data, "vqav2", f"--out={tmp_path}", "--limit=1") == 2
    assert "predictions-0.jsonl: line 1 is not a prediction" in capsys.readouterr().err


# During training


def test_numbers_during_training_are_the_commands(root, data, tmp_path, monkeypatch):
    assert call(root, data, "vqav2", f"--out={tmp_path}", "--limit=2") == 0
    task = TASKS["vqav2"]
    monkeypatch.setitem(
        TASKS,
        "vqav2",
        dataclasses.replace(task, generation=dataclasses.replace(task.generation, beams=1)),
    )
    c = config.from_dict(checkpoint.read_config(str(root / "emu")))
    c.eval.tasks = (("vqav2", str(data("vqav2")), 2),)
    session = Session.load(str(root / "emu"))
    evaluate = benchmark_evaluator(make_plan(c, jax.devices()[:1]), session.tokenizer)
    expected = {
        f"vqav2/{name}": value
        for name, value in read(tmp_path)["scores.json"].items()
        if name.startswith("accuracy")
    }
    assert evaluate(session.params) == expected and len(expected) == 3


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (("mmvet", "x", 3), "eval.tasks: 'mmvet' is not one of coco-caption, flickr30k"),
        (("vqav2", "/nowhere", 3), "no folder '/nowhere'"),
        (("vqav2", "x"), r"eval.tasks: \('vqav2', 'x'\) is not a \(task"),
    ],
)
def test_an_impossible_task_is_an_error_before_training(root, row, message):
    c = config.from_dict(checkpoint.read_config(str(root / "emu")))
    c.eval.tasks = (row,)
    with pytest.raises(UserError, match=message):
        benchmark_evaluator(
            make_plan(c, jax.devices()[:1]), Session.load(str(root / "emu")).tokenizer
        )
