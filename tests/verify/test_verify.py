"""The released Emu's numbers, ours beside them: every quantity of both golden files is covered and ok; and verify can fail."""
import numpy as np
import pytest

from emu_jax import verify
from emu_jax.verify import golden


@pytest.mark.parametrize("name", ["emu1_pretrained", "emu1_instruct"])
def test_every_quantity_is_ok(name):
    found = list(verify.quantities(golden.load(f"tests/golden/{name}.npz")))
    assert [row.name for row in found if not row.ok] == []
    names = {row.name for row in found}
    assert {"hidden", "text_loss", "decode_greedy", "decode_beam5_lpm1"} <= names
    assert ("generate_image_interleaved" in names) == (name == "emu1_pretrained")


def test_a_changed_file_fails():
    file = golden.load("tests/golden/emu1_pretrained.npz")
    file["decode_greedy"] = file["decode_greedy"] + (np.arange(12) == 5)
    file["generate_image_text_only"] = file["generate_image_text_only"] * 1.001
    file["decode_beam5_lp1"] = file["decode_beam5_lp1"][:, :-1]
    failed = {row.name for row in verify.quantities(file) if not row.ok}
    assert failed == {"decode_greedy", "generate_image_text_only", "decode_beam5_lp1"}
