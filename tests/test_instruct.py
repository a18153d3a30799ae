"""Runs of configs/instruct.py: from a pretrained, quantized model to one that chats."""

import json
from contextlib import closing

import jax.numpy as jnp
import numpy as np
import pytest

from emu_jax import checkpoint, config, sharding, train, tree
from emu_jax.config import UserError
from emu_jax.data import tokenizer as tokenizers
from emu_jax.data.loader import Loader
from emu_jax.demo import __main__ as command
from emu_jax.demo import chat, chat_report
from emu_jax.generate.session import Session
from emu_jax.plan import make_plan
from tests.support import fixtures, make
from tests.support.runs import mesh_of_one_device

SMALL = (
    "data.batch=8",
    "data.num_streams=4",
    "data.tokens=128",
    "data.images=4",
    "data.pack_lookahead=4",
    "data.workers=2",
    "data.system=none",
    "objective.chunk=64",
    "log.pictures_every=0",
    "optim.steps=3",
    "optim.warmup=0.0",
    "rules.peak_lr=(('.*', 1e-2),)",
    "rules.decay=(('.*', 0.1),)",
    "model.lora.rank=4",
    "model.lora.storage=int8",
    "model.compute=float32",
    "model.vision.remat=none",
    "model.resampler.remat=none",
    "model.llama.remat=none",
)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    to = tmp_path_factory.mktemp("data")
    fixtures.write_tiny(to)
    return to


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A pretrained model, without the tokens of a chat."""
    c = make.cfg()
    path = tmp_path_factory.mktemp("runs") / "base"
    make.written(path, c, make.random_params(make.program(c)))
    return path


def arguments(data, base, workdir, *overrides):
    mixture = (("questions", 1.0, f"{data}/questions:train"),)
    given = (
        f"workdir={workdir}",
        f"init={base}",
        f"data.tokenizer={data}/tokenizer.json",
        f"data.mixture={mixture!r}",
        *SMALL,
        *overrides,
    )
    return ["--config=configs/instruct.py:debug", *(f"--config.{override}" for override in given)]


@pytest.fixture(scope="module")
def one_device():
    """Use one device; tests/models/test_lora.py shards LoRA."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sharding, "make_mesh", mesh_of_one_device)
        yield


@pytest.fixture(scope="module")
def tuned(data, base, one_device, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("runs") / "tuned"
    assert train.main(arguments(data, base, workdir)) == 0
    return workdir


def test_lora_and_the_new_rows_learn_from_answers(base, tuned):
    lines = [json.loads(line) for line in (tuned / "metrics.jsonl").read_text().splitlines()]
    assert (
        lines[-1]["step"] == 3
        and "image_loss" not in lines[-1]
        and np.isfinite(lines[-1]["text_loss"])
    )
    assert {"cut_turns", "cut_documents", "flops_per_second/llama"} <= lines[-1].keys()
    before, after = (
        dict(tree.leaves(checkpoint.restore_params(str(directory)))) for directory in (base, tuned)
    )
    for path in before.keys() & after.keys() - {"llama/embed/added", "llama/lm_head/added"}:
        np.testing.assert_array_equal(
            after[path], before[path].astype(after[path].dtype), err_msg=path
        )
    assert (
        after["llama/embed/base"].dtype == jnp.bfloat16
        and after["llama/blocks/attn/q/int8"].dtype == np.int8
    )
    for table in ("embed", "lm_head"):
        old = before[f"llama/{table}/added"]
        new = after[f"llama/{table}/added"]
        np.testing.assert_array_equal(new[:4], old)
        assert (
            np.abs(new[4:] - np.concatenate([before[f"llama/{table}/base"], old]).mean(0)).max(1)
            > 1e-3
        ).all()
    assert all(np.abs(after[f"llama/blocks/attn/{name}/b"]).max() > 1e-3 for name in "qkvo")


def test_its_answers_before_and_after_are_told_by_a_command(data, tuned, capsys, monkeypatch):
    monkeypatch.setattr(chat, "NEW_TOKENS", 4)
    assert command.main(["chat", f"--checkpoint={tuned}", f"--data={data}"]) == 0
    out = capsys.readouterr().out.splitlines()
    assert (
        out[-1] == f"{tuned}/report.html"
        and out[0].split() == "held-out questions number before after most common answer".split()
    )
    results = json.loads((tuned / "results.json").read_text())
    numbers = results["numbers"]
    answers = results["answers"]
    assert numbers["all_count"] == len(answers) >= 2 * 16
    for when in ("before", "after"):
        assert numbers[f"all_{when}"] == pytest.approx(
            np.mean([answer["true"] == answer[when] for answer in answers])
        )
    assert (
        any(answer["before"] != answer["after"] for answer in answers)
        and 0 < numbers["all_most_common"] < 1
    )
    page = (tuned / "report.html").read_text()
    assert page.count("<img") >= chat_report.SHOWN and "<script" not in page and "CC BY-SA" in page


def test_it_goes_on_from_its_checkpoint(data, base, tuned, capsys):
    assert train.main(arguments(data, base, tuned)) == 0
    assert train.main(arguments(data, base, tuned, "model.lora.rank=8")) == 2
    assert "model.lora.rank was 4 and is 8" in capsys.readouterr().err


def test_a_chat_begins_as_it_was_tuned(tuned):
    """A chat begins without the release's system message.

    tests/generate/test_session.py tests chats in a cache.
    """
    session = Session.load(str(tuned))
    prompt = session.processor.chat_turn(
        [np.zeros((28, 28, 3), np.uint8), "what is this?"], system=None, first=True
    )
    assert prompt.tokens[:2] == [1, session.tokenizer.user] and len(prompt.images) == 1


def test_the_paper_trains_26_million_of_14_billion_parameters():
    """LoRA of rank 16 at q, k, v and o of 40 layers of width 5120, and four vocabulary rows."""
    c = config.load(["--config=configs/instruct.py"])
    trainable = make_plan(c).state.trainable
    sizes = {path: leaf.size for path, leaf in tree.leaves(trainable)}
    assert (
        sum(size for path, size in sizes.items() if path.endswith(("/a", "/b")))
        == 40 * 4 * 2 * 16 * 5120
    )
    assert {path for path in sizes if not path.endswith(("/a", "/b"))} == {
        "llama/embed/added",
        "llama/lm_head/added",
    }
    c = config.load(
        [
            "--config=configs/instruct.py",
            "--config.model.lora.rank=0",
            "--config.rules.train=(('(vision|ln_visual|resampler)/.*', False), ('.*', True))",
        ]
    )
    assert make_plan(c).state.trainable.keys() == {
        "llama",
        "regress_head",
    }


def test_conversations_need_a_model_with_chat_tokens(data, base):
    c = config.load(arguments(data, base, "run"))
    loader = Loader(
        c.data, 0, tokenizers.load(c.data.tokenizer, fixtures.VOCAB), 4, fixtures.IMAGE, chats=False
    )
    with (
        closing(loader),
        pytest.raises(
            UserError,
            match=r"is a conversation, and this model has no \[USER\] and \[ASSISTANT\] tokens",
        ),
    ):
        next(iter(loader))
