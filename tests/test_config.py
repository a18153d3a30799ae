"""Every field is known, typed and documented; a mistake is one line that names the remedy."""

import json
import sys
from pathlib import Path

import pytest
from ml_collections import ConfigDict

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
            r"'optim' is a group of fields \(.*, clip, .*\); "
            "set one of them: --config.optim.accumulate=",
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
            "no config file 'configs/nothing.py'; there are configs/base.py, configs/clip.py, .*",
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


OWN = """from configs.base import get_config as base
def get_config():
    c = base('debug')
    c.seed = 5
    return c
"""


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("def get_config(:", ", line 1: SyntaxError: "),
        ("import nothing_of_that_name", ", line 1: ModuleNotFoundError: No module named 'nothing"),
        ("def get_config():\n  return undefined", ", line 2: NameError: "),
        ("def get_config():\n  return {}['a']", ", line 2: KeyError: 'a'"),
        ("def get_config():\n  raise ValueError", ", line 2: ValueError: "),
        (OWN.replace("c.seed", "c.optim.seed.x"), ", line 4: AttributeError: "),
        ("def get_config(): pass", ": get_config returned NoneType, not a ConfigDict; "),
        ("def get_config(): return {}", ": get_config returned dict, not a ConfigDict; "),
        (
            "from ml_collections import ConfigDict as get_config",
            " lacks 'checkpoint': let get_config start from configs.base.get_config()",
        ),
        (
            OWN.replace("c.seed", "c.optim.stesp"),
            " sets 'optim.stesp', which is not a field; did you mean 'optim.steps'?",
        ),
        (OWN.replace("c.seed", "c.sede"), " sets 'sede', which is not a field; did you mean 'seed"),
    ],
)
def test_a_config_file_that_fails_is_one_line(tmp_path, text, told):
    path = tmp_path / "mine.py"
    path.write_text(text)
    with pytest.raises(UserError) as error:
        config.load([f"--config={path}"])
    assert str(error.value).startswith(f"config '{path}'{told}")
    assert "\n" not in str(error.value)


def test_a_config_file_may_add_groups(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text(OWN.replace("c.seed = 5", "c.notes = dict(author='me')"))
    assert config.load([f"--config={path}"]).notes.author == "me"


def test_a_config_file_is_a_python_file(tmp_path):
    path = tmp_path / "mine.txt"
    path.write_text(OWN)
    with pytest.raises(UserError, match="is not a Python file: its name must end in .py"):
        config.load([f"--config={path}"])


def test_a_config_elsewhere_may_import_ours(tmp_path, monkeypatch):
    path = tmp_path / "mine.py"
    path.write_text(OWN)
    assert config.load([f"--config={path}"]).seed == 5
    monkeypatch.chdir(tmp_path)
    assert config.load(["--config=mine.py"]).seed == 5


def test_files_next_to_a_config_come_first(tmp_path):
    """A config imports from its own folder first, even if that is called `configs` as ours."""
    for folder in ("configs", "experiments"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "shared.py").write_text(OWN.replace("configs.base", "configs.decoder"))
        (tmp_path / folder / "mine.py").write_text(
            f"from {folder}.shared import get_config as base\ndef get_config(): return base()"
        )
        assert config.load([f"--config={tmp_path}/{folder}/mine.py"]).stage == "decoder"


def test_our_configs_are_found_from_anywhere(tmp_path, monkeypatch):
    here = config.load([BASE])
    monkeypatch.chdir(tmp_path)
    assert config.load([BASE]) == here
    with pytest.raises(UserError, match="there are configs/base.py, .*, configs/pretrain.py$"):
        config.load(["--config=configs/nothing.py"])


def test_loading_leaves_nothing_behind():
    path = list(sys.path)
    modules = {name: sys.modules[name] for name in sys.modules if name.startswith("configs")}
    config.load(["--config=configs/decoder.py:debug"])
    assert sys.path == path
    assert modules == {n: sys.modules[n] for n in sys.modules if n.startswith("configs")}


@pytest.mark.parametrize("name", ["base", "decoder", "clip"])
def test_every_field_is_documented(name):
    file = f"configs/{name}.py"
    fields = config.fields(file)
    assert all(field.comment for field in fields), [f.path for f in fields if not f.comment]
    assert len({field.path for field in fields}) == len(fields)
    documented = {field.path for field in fields}
    assert documented | set(config._paths(load())) >= set(
        config._paths(config.load([f"--config={file}"]))
    )


def test_fields_are_in_reading_order_with_their_defaults():
    fields = {field.path: field for field in config.fields()}
    names = list(fields)
    assert names[0] == "stage" and names.index("optim") + 1 == names.index("optim.steps")
    assert fields["optim.warmup"].default == 0.2
    assert fields["optim.warmup"].comment.startswith("Length of the linear warm-up")
    assert fields["model.vision.image"].default == 224


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


def test_the_help_text_lists_every_field_at_100_columns():
    text = config.help_text("usage: train")
    assert text.startswith("usage: train\n")
    assert max(map(len, text.splitlines())) <= 100
    for field in config.fields():
        if not isinstance(field.default, ConfigDict):
            assert f"\n  --config.{field.path}=" in text
