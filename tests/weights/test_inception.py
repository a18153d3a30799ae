"""FID's Inception: an import of the standard file's tensors computes torch-fidelity's features; an
export of it is that file.
"""

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

# one process: what its tests share is made once
pytestmark = pytest.mark.xdist_group("inception")

FILE = golden.load("tests/golden/inception.npz")


@pytest.fixture(scope="module")
def foreign(tmp_path_factory):
    """(the file, its tensors): the released one's names and shapes."""
    path = tmp_path_factory.mktemp("foreign")
    tensors = rule.weights(FILE)
    tensors |= {
        name.replace("running_var", "num_batches_tracked"): np.int64(0).reshape(())
        for name in tensors
        if name.endswith("running_var")
    }
    files.write(
        path,
        "inception",
        {name: (array.shape, array.dtype) for name, array in tensors.items()},
        iter(tensors.items()),
    )
    return path / "inception-00001-of-00001.safetensors", tensors


@pytest.fixture(scope="module")
def imported(foreign, tmp_path_factory):
    to = tmp_path_factory.mktemp("ours") / "inception"
    assert main(["import", "--family=inception", str(foreign[0]), f"--to={to}"]) == 0
    return to


def test_features_are_torch_fidelitys(imported):
    params = checkpoint.restore_params(str(imported))
    images = rearrange(FILE["images_noise32"], "m c h w -> m h w c")[:1]
    ours = fid.features(params, iter(images), batch=1)
    np.testing.assert_allclose(
        ours,
        FILE["features_noise32_2048"][:1],
        atol=1e-4 * np.abs(FILE["features_noise32_2048"]).max(),
    )


def test_an_export_is_the_file(imported, foreign, tmp_path):
    assert (
        main(["export", "--family=inception", f"--from={imported}", f"--to={tmp_path}/theirs"]) == 0
    )
    back = files.read([str(tmp_path / "theirs")]).tensors
    assert back.keys() == {name for name in foreign[1] if not name.endswith("num_batches_tracked")}
    for name in (
        "Conv2d_1a_3x3.conv.weight",
        "Mixed_7c.branch3x3dbl_3b.bn.running_var",
        "fc.weight",
    ):
        np.testing.assert_array_equal(np.asarray(back[name]), foreign[1][name])


def test_another_family_or_a_part_of_it_is_one_line(foreign, imported, tmp_path, capsys):
    assert main(["import", "--family=llama", str(foreign[0]), f"--to={tmp_path}/a"]) == 2
    assert "it looks like inception: --family=inception" in capsys.readouterr().err
    some = {name: array for name, array in foreign[1].items() if not name.startswith("Mixed_5")}
    (tmp_path / "some").mkdir()
    files.write(
        tmp_path / "some",
        "x",
        {name: (array.shape, array.dtype) for name, array in some.items()},
        iter(some.items()),
    )
    assert main(["import", "--family=inception", str(tmp_path / "some"), f"--to={tmp_path}/a"]) == 2
    error = capsys.readouterr().err.splitlines()
    assert "105 missing" in error[-1] and not (tmp_path / "a").exists()
    with pytest.raises(UserError, match="FID needs images, but got none"):
        fid.features({"x": jnp.zeros(1)}, iter(()))
