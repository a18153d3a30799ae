"""FID's Inception: torch-fidelity's features after an import, its tensors after an export."""

import jax.numpy as jnp
import numpy as np
import pytest
from einops import rearrange

from emu_jax import checkpoint
from emu_jax.config import UserError
from emu_jax.evaluate.metrics import fid
from emu_jax.verify import golden
from emu_jax.verify import inception as rule
from emu_jax.weights import files
from emu_jax.weights.__main__ import main
from tests.support.foreign import export, import_, write

FILE = golden.load("tests/golden/inception.npz")


@pytest.fixture(scope="module")
def foreign(tmp_path_factory):
    """(file, tensors) with the names and shapes of the released ones."""
    path = tmp_path_factory.mktemp("foreign")
    weights = rule.weights(FILE)
    variances = [name for name in weights if name.endswith("running_var")]
    counters = [name.replace("running_var", "num_batches_tracked") for name in variances]
    tensors = weights | dict.fromkeys(counters, np.zeros((), np.int64))
    write(path, tensors, "inception")
    return path / "inception-00001-of-00001.safetensors", tensors


@pytest.fixture(scope="module")
def imported(foreign, tmp_path_factory):
    """The folder of an import of `foreign`."""
    to = tmp_path_factory.mktemp("ours") / "inception"
    import_(to, "--family=inception", foreign[0])
    return to


def test_features_are_torch_fidelitys(imported):
    params = checkpoint.restore_params(str(imported))
    images = rearrange(FILE["images_noise32"], "m c h w -> m h w c")[:1]
    ours = fid.features(params, iter(images), batch=1)
    theirs = FILE["features_noise32_2048"]
    np.testing.assert_allclose(ours, theirs[:1], atol=1e-4 * np.abs(theirs).max())


def test_export_of_import_has_the_files_tensors(imported, foreign, tmp_path):
    export("inception", imported, f"{tmp_path}/theirs")
    back = files.read([str(tmp_path / "theirs")]).tensors
    assert back.keys() == {name for name in foreign[1] if not name.endswith("num_batches_tracked")}
    for name in (
        "Conv2d_1a_3x3.conv.weight",
        "Mixed_7c.branch3x3dbl_3b.bn.running_var",
        "fc.weight",
    ):
        np.testing.assert_array_equal(np.asarray(back[name]), foreign[1][name])


def test_other_families_and_incomplete_files_are_refused(foreign, imported, tmp_path, capsys):
    assert main(["import", "--family=llama", str(foreign[0]), f"--to={tmp_path}/a"]) == 2
    assert "it looks like inception: --family=inception" in capsys.readouterr().err
    some = {name: array for name, array in foreign[1].items() if not name.startswith("Mixed_5")}
    (tmp_path / "some").mkdir()
    write(tmp_path / "some", some)
    assert main(["import", "--family=inception", str(tmp_path / "some"), f"--to={tmp_path}/a"]) == 2
    error = capsys.readouterr().err.splitlines()
    assert "105 missing" in error[-1]
    assert not (tmp_path / "a").exists()


def test_features_need_an_image():
    with pytest.raises(UserError, match="FID needs images, but got none"):
        fid.features({"x": jnp.zeros(1)}, iter(()))
