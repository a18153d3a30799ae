"""Golden numbers of the released code, failing quantities, exit codes and bad files."""

import numpy as np
import pytest

from emu_jax import verify
from emu_jax.config import UserError
from emu_jax.verify import emu, golden
from emu_jax.verify.__main__ import main
from emu_jax.verify.golden import Quantity
from emu_jax.weights.__main__ import main as weights_main

FILES = {name: f"tests/golden/{name}.npz" for name in ("emu1_pretrained", "emu1_instruct")}
FORWARD = {
    "vision_features",
    "vision_normed",
    "visual_tokens",
    "hidden",
    "logits_sum",
    "logits_first8",
    "logits_logsumexp",
    "text_targets",
    "text_loss",
    "regress_targets",
    "regress_predictions",
    "regression_loss_with_end",
    "regression_loss_visual_only",
}


@pytest.mark.parametrize("name", FILES)
def test_the_released_numbers_are_ours(name, capsys):
    """Forward, losses and images within 1e-4, gradient norms within 5e-4, ids exactly."""
    code = main([FILES[name]])
    rows = [line.split("  ") for line in capsys.readouterr().out.splitlines()[2:-1]]
    told = {row[0].strip(): row[-1].strip() for row in rows}
    file = golden.load(FILES[name])
    gradients = {f"grad_norm {name}" for name in map(str, file["grad_names"])}
    assert (
        len(gradients) > 40
        and FORWARD | gradients | {"decode_greedy", "decode_beam5_lpm1"} <= told.keys()
    )
    assert ("generate_image_interleaved" in told) == (name == "emu1_pretrained")
    assert set(told.values()) == {"ok"} and code == 0
    # Every quantity of the file is compared.
    assert {name for name in file if name not in emu.INPUTS | {"grad_norms"}} <= told.keys()


def test_tolerances_are_the_issues():
    for error, ok in (
        (0.0, True),
        (0.9e-4, True),
        (1.1e-4, False),
        (np.nan, False),
        (np.inf, False),
    ):
        assert golden.compare("x", np.ones(3), np.full(3, 1 + error), 1e-4).ok == ok
    # Errors are relative to the largest element.
    big = golden.compare("x", np.array([1e-6, 100.0]), np.array([2e-6, 100.0]), 1e-4)
    assert big.ok and big.error == pytest.approx(1e-8)
    with pytest.raises(UserError, match=r"x has shape \(3,\), its config makes \(2,\)"):
        golden.compare("x", np.ones(3), np.ones(2), 1e-4)


@pytest.mark.parametrize(
    ("quantities", "code", "last"),
    [
        ([Quantity("a", 0.0, 1e-4)], 0, "1 ok, 0 failed, 0 not covered"),
        (
            [Quantity("a", 0.0, 1e-4), Quantity("b", 2e-4, 1e-4), Quantity("c", None, 1e-4)],
            1,
            "1 ok, 1 failed, 1 not covered",
        ),
        (
            [Quantity("a", 1e-4, 1e-4), Quantity("c", None, 1e-4)],
            3,
            "1 ok, 0 failed, 1 not covered",
        ),
        ([Quantity("b", float("inf"), 1e-4)], 1, "0 ok, 1 failed, 0 not covered"),
    ],
)
def test_exit_codes(monkeypatch, capsys, quantities, code, last):
    monkeypatch.setattr(verify, "quantities", lambda file: iter(quantities))
    assert main([FILES["emu1_instruct"]]) == code
    assert capsys.readouterr().out.splitlines()[-1] == last


def test_a_number_that_was_tampered_with_fails(tmp_path, capsys, monkeypatch):
    """Tamper with forward and generated quantities and a gradient norm.

    The gradient itself is replaced, to save time.
    """
    file = golden.load(FILES["emu1_instruct"])
    monkeypatch.setattr(emu, "_gradient", lambda model_config, params, batch, images: params)
    gradient = next(
        f"grad_norm {name}" for name in map(str, file["grad_names"]) if ".lora_" not in name
    )
    file["hidden"][0, 3, 5] += 1e-3 * np.abs(file["hidden"]).max()
    file["text_loss"] = file["text_loss"] * np.float32(1.001)
    file["decode_greedy"] = file["decode_greedy"] + (np.arange(12) == 5)
    file["decode_beam5_lp1"] = file["decode_beam5_lp1"][:, :-1]
    np.savez(tmp_path / "tampered.npz", **file)
    assert main([str(tmp_path / "tampered.npz")]) == 1
    told = {line.split("  ")[0].strip(): line for line in capsys.readouterr().out.splitlines()}
    assert all(
        "FAILED" in told[name]
        for name in ("hidden", "text_loss", "decode_greedy", "decode_beam5_lp1", gradient)
    )
    assert "FAILED" not in told["logits_sum"] + told["visual_tokens"]


def test_weights_verify_is_the_same_command(monkeypatch, capsys):
    monkeypatch.setattr(verify, "quantities", lambda file: iter([Quantity("a", 0.0, 1e-4)]))
    assert weights_main(["verify", FILES["emu1_instruct"]]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "1 ok, 0 failed, 0 not covered"


# Bad input


def rewritten(change):
    def write(path):
        file = golden.load(FILES["emu1_pretrained"])
        change(file)
        np.savez(path, **file)

    return write


@pytest.mark.parametrize(
    ("write", "told"),
    [
        (
            rewritten(lambda file: [file.pop(name) for name in ("hidden", "grad_norms")]),
            "golden file: missing hidden, grad_norms",
        ),
        (
            rewritten(lambda file: file.update(config=np.array('{"patch": 14}'))),
            "golden file: its config or special_ids lack 'image_size'",
        ),
        (
            rewritten(lambda file: file.update(config=np.array("{patch"))),
            "golden file: its config or special_ids lack",
        ),
        (
            rewritten(
                lambda file: file.update(
                    {name: file[name][:-1] for name in ("parameter_names", "parameter_shapes")}
                )
            ),
            "1 tensors missing: ",
        ),
        (
            lambda path: path.write_bytes(open(FILES["emu1_pretrained"], "rb").read()[:100_000]),
            "is not a readable .npz of plain arrays",
        ),
        (
            lambda path: path.write_text("a golden file"),
            "is not a readable .npz of plain arrays: it has other contents",
        ),
        (
            lambda path: np.savez(path, config=np.array([{}], object)),
            "is not a readable .npz of plain arrays",
        ),
        (lambda path: None, "no golden file"),
    ],
)
def test_what_is_no_golden_file_is_one_line(tmp_path, capsys, write, told):
    write(tmp_path / "file.npz")
    assert main([str(tmp_path / "file.npz")]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1 and told in error


def test_other_kinds_of_files_are_not_covered(tmp_path, capsys):
    np.savez(
        tmp_path / "other.npz", parameter_names=np.array(["a"]), one=np.ones(2), another=np.ones(2)
    )
    assert main([str(tmp_path / "other.npz")]) == 3
    assert "0 ok, 0 failed, 2 not covered" in capsys.readouterr().out
