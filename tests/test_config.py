"""Every field is known and has a type; what is wrong is said in one line that names what would be
right.
"""

import json
from pathlib import Path

import pytest

from emu_jax import config
from emu_jax.config import UserError

BASE = "--config=configs/base.py:debug"


def load(*overrides):
    return config.load([BASE, *overrides])


def test_overrides_by_equals_sign_and_by_the_next_argument():
    c = load(
        "--config.optim.steps=7",
        "--config.optim.b2",
        "0.5",
        "--config.workdir",
        "a=b",
        "--config.objective.regress_end=True",
    )
    assert (c.optim.steps, c.optim.b2, c.workdir, c.objective.regress_end) == (7, 0.5, "a=b", True)


@pytest.mark.parametrize(
    ("key", "text", "value"),
    [
        ("optim.b1", "1", 1.0),
        ("optim.b1", "1e-3", 1e-3),
        ("seed", "-3", -3),
        ("init", "12", "12"),
        ("objective.regress_end", "false", False),
        ("data.mixture", "[('a', 1.0, 'x:train')]", (("a", 1.0, "x:train"),)),
        ("optim.steps", "10_000", 10_000),
        ("workdir", "", ""),
    ],
)
def test_values_keep_the_type_of_the_default(key, text, value):
    c = load(f"--config.{key}={text}")
    for name in key.split("."):
        c = c[name]
    assert c == value and type(c) is type(value)


@pytest.mark.parametrize(
    ("key", "text", "kind"),
    [
        ("optim.steps", "1.5", "int"),
        ("optim.steps", "many", "int"),
        ("optim.steps", "True", "int"),
        ("optim.b1", "true", "float"),
        ("objective.regress_end", "1", "bool"),
        ("data.mixture", "data/demo", "tuple"),
        ("data.mixture", "{}", "tuple"),
        ("seed", "", "int"),
        ("seed", "__import__('os')", "int"),
    ],
)
def test_a_wrong_type_names_the_field_and_the_type(key, text, kind):
    with pytest.raises(
        UserError, match=rf"'{key}' must be of type {kind}, like .*; it was given ['\"]"
    ):
        load(f"--config.{key}={text}")


@pytest.mark.parametrize(
    ("key", "nearest"),
    [
        ("optim.step", "optim.steps"),
        ("optim.warmpu", "optim.warmup"),
        ("data.num_stream", "data.num_streams"),
        ("worktree", "workdir"),
        ("batch", "data.batch"),
        ("rope_base", "model.llama.rope_base"),
        ("model.lama.width", "model.llama.width"),
        ("optim.steps.x", "optim.steps"),
    ],
)
def test_an_unknown_field_names_the_nearest(key, nearest):
    with pytest.raises(
        UserError, match=rf"the config has no field '{key}'; did you mean '{nearest}'\?"
    ):
        load(f"--config.{key}=1")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([BASE, "--config.zzzzqqq=1"], r"the config has no field 'zzzzqqq'$"),
        ([BASE, "--config.=1"], "the config has no field ''"),
        (
            [BASE, "--config.optim=1"],
            r"'optim' is a group of fields \(.*, clip, .*\); set one of them: --config.optim.accumulate=",
        ),
        (
            [BASE, "--optim.steps=1"],
            "unknown flag --optim.steps; a field of the config is set by --config.FIELD=VALUE",
        ),
        (
            [BASE, "optim.steps=1"],
            "unexpected argument 'optim.steps=1'; flags look like --config.optim.steps=100",
        ),
        ([BASE, "--config.seed"], r"--config.seed needs a value: --config.seed=\.\.\."),
        ([], "give one config file, for example --config=configs/pretrain.py"),
        ([BASE, BASE], "give one config file"),
        (
            ["--config=configs/nothing.py"],
            "no config file 'configs/nothing.py'; there are configs/pretrain.py",
        ),
        (["--config=configs"], "no config file 'configs'"),
        (
            ["--config=configs/base.py:emu-3b"],
            "config 'configs/base.py:emu-3b': no model size 'emu-3b'; there are emu-14b, emu-7b,",
        ),
        (["--config=configs/sizes.py"], "config 'configs/sizes.py': .*get_config"),
    ],
)
def test_bad_arguments_are_one_line(arguments, message):
    with pytest.raises(UserError, match=message) as error:
        config.load(arguments)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "text",
    [
        "def get_config(:",
        "import nothing_of_that_name",
        "def get_config(): return undefined",
        "def get_config(): return {}",
        "def get_config(): return {}['a']",
        "def get_config(): open('/nothing/there')",
    ],
)
def test_a_config_file_that_fails_is_one_line(tmp_path, text):
    path = tmp_path / "mine.py"
    path.write_text(text)
    with pytest.raises(UserError, match=f"^config '{path}': .") as error:
        config.load([f"--config={path}"])
    assert "\n" not in str(error.value)


def test_a_config_of_ones_own_may_import_ours(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text(
        "from configs.base import get_config as base\ndef get_config():\n    c = base('debug')\n    c.seed = 5\n    return c\n"
    )
    assert config.load([f"--config={path}"]).seed == 5


def test_a_config_is_locked():
    with pytest.raises(AttributeError, match="step"):
        load().optim.step = 3
    with pytest.raises(AttributeError, match="step"):
        config.from_dict(config.to_dict(load())).optim.step = 3


@pytest.mark.parametrize(
    "path",
    sorted(path for path in Path("configs").glob("*.py") if "def get_config" in path.read_text()),
    ids=str,
)
def test_every_config_comes_back_from_json(path):
    c = config.load([f"--config={path}"])
    again = config.from_dict(json.loads(json.dumps(config.to_dict(c))))
    assert again == c and again.to_dict() == c.to_dict()
