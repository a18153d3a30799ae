"""Laws of the LLaMA.

Zero gradients prove that a token sees neither later tokens nor other documents. Rotary positions
agree with values by hand, and only their differences matter.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from emu_jax.config import UserError
from emu_jax.models import emu, module
from emu_jax.models.llama import frequencies, rotary, rotate
from tests.support import make

P = make.program(make.cfg("model.llama.rope_dtype=float32"))
PARAMS = make.random_params(P)
X = np.random.default_rng(1).standard_normal((1, 6, 32)).astype(np.float32)
SEGMENTS = np.array([[1, 1, 1, 2, 2, 0]])


def run(x, positions, segments):
    return module.bind(emu.Emu, P.model_config, PARAMS).llama(x, positions, segments)[0]


def weighted(x, segments):
    weights = np.random.default_rng(2).standard_normal(32).astype(np.float32)
    return (run(x, jnp.arange(6)[None], segments) @ weights)[0]


hidden = jax.jit(run)
jacobian_once = jax.jit(jax.jacrev(weighted))


@pytest.mark.parametrize(
    ("segments", "sees"),
    [
        ([[1, 1, 1, 1, 1, 1]], np.tril(np.ones((6, 6), bool))),
        (
            [[1, 1, 1, 2, 2, 0]],
            np.array(
                [
                    [1, 0, 0, 0, 0, 0],
                    [1, 1, 0, 0, 0, 0],
                    [1, 1, 1, 0, 0, 0],
                    [0, 0, 0, 1, 0, 0],
                    [0, 0, 0, 1, 1, 0],
                    [0, 0, 0, 0, 0, 1],
                ],
                bool,
            ),
        ),
    ],
)
def test_a_position_sees_its_own_document_up_to_itself(segments, sees):
    jacobian = jacobian_once(X, np.array(segments))
    np.testing.assert_array_equal(np.asarray(jacobian)[:, 0].any(-1), sees)


def test_only_differences_of_positions_matter():
    at = np.arange(6)[None]
    y = np.asarray(hidden(X, at, np.ones_like(at)))
    np.testing.assert_allclose(hidden(X, at + 100, np.ones_like(at)), y, atol=2e-4)
    assert np.abs(hidden(X, 2 * at, np.ones_like(at)) - y).max() > 0.01


def test_packed_documents_are_as_alone():
    packed = np.asarray(hidden(X, np.array([[0, 1, 2, 0, 1, 0]]), SEGMENTS))
    np.testing.assert_allclose(
        packed[:, :3], hidden(X[:, :3], np.array([[0, 1, 2]]), np.ones((1, 3), int)), atol=1e-5
    )
    np.testing.assert_allclose(
        packed[:, 3:5], hidden(X[:, 3:5], np.array([[0, 1]]), np.ones((1, 2), int)), atol=1e-5
    )


def test_rotary_by_hand():
    # The frequencies are 1 and 1 / 10.
    cos, sin = rotary(jnp.array([[0, 3]]), 4, 100.0, "float32")
    assert cos.shape == (1, 2, 1, 2)
    np.testing.assert_allclose(cos[0, :, 0], [[1, 1], [np.cos(3), np.cos(0.3)]], atol=1e-6)
    np.testing.assert_allclose(sin[0, :, 0], [[0, 0], [np.sin(3), np.sin(0.3)]], atol=1e-6)
    x = jnp.array([1.0, 2, 3, 4]).reshape(1, 1, 1, 4)
    # At position 3, elements 1 and 3 are turned by 3 radians, and elements 2 and 4 by 0.3.
    turned = rotate(jnp.tile(x, (1, 2, 1, 1)), (cos, sin))[0, :, 0]
    np.testing.assert_allclose(turned[0], [1, 2, 3, 4])
    np.testing.assert_allclose(
        turned[1],
        [
            np.cos(3) - 3 * np.sin(3),
            2 * np.cos(0.3) - 4 * np.sin(0.3),
            3 * np.cos(3) + np.sin(3),
            4 * np.cos(0.3) + 2 * np.sin(0.3),
        ],
        rtol=1e-5,
    )


def test_rotary_frequencies_are_rounded_and_angles_are_not():
    """The release rounds the frequencies, not the angles, to bfloat16.

    10000^(-2/128) = 0.8660 becomes 0.8672. The angle at position 2047 is not rounded.
    """
    cos, _ = rotary(jnp.array([[2047]]), 128, 10000.0, "bfloat16")
    np.testing.assert_allclose(cos[0, 0, 0, 1], np.cos(2047 * 0.8671875), atol=1e-4)
    cos, _ = rotary(jnp.array([[2047]]), 128, 10000.0, "float32")
    np.testing.assert_allclose(cos[0, 0, 0, 1], np.cos(2047 * 10000 ** (-2 / 128)), atol=1e-3)


def test_embeddings_are_rows_of_both_tables():
    embed = jax.device_get(PARAMS["llama"]["embed"])
    model = module.bind(emu.Emu, P.model_config, PARAMS)
    got = jax.jit(lambda ids: model.llama.embeddings(ids, jnp.float32))(
        np.array([[0, 511, 512, 515]])
    )
    np.testing.assert_array_equal(
        got[0],
        np.stack([embed["base"][0], embed["base"][511], embed["added"][0], embed["added"][3]]),
    )


def test_grouped_heads_are_repeated_heads():
    """Two key and value heads for four query heads equal four heads that are equal in pairs."""
    grouped = make.program(make.cfg("model.llama.kv_heads=2"))
    params = make.random_params(grouped)
    attn = params["llama"]["blocks"]["attn"]
    assert attn["q"]["w"].shape == (2, 32, 4, 8) and attn["k"]["w"].shape == attn["v"][
        "w"
    ].shape == (2, 32, 2, 8)
    repeated = {
        "q": attn["q"],
        "o": attn["o"],
        **{name: {"w": np.repeat(attn[name]["w"], 2, axis=2)} for name in "kv"},
    }
    full = params | {
        "llama": params["llama"] | {"blocks": params["llama"]["blocks"] | {"attn": repeated}}
    }

    def outputs(config, params, *inputs):
        return module.bind(emu.Emu, config, params).llama(*inputs)[0]

    one, two = (
        jax.jit(partial(outputs, p.model_config))(tree, X, np.arange(6)[None], SEGMENTS)
        for p, tree in ((grouped, params), (make.program(make.cfg()), full))
    )
    np.testing.assert_allclose(one, two, atol=1e-5)


def test_a_tied_head_is_the_input_table():
    tied = make.program(make.cfg("model.llama.tied=true"))
    params = make.random_params(tied)
    assert "lm_head" not in params["llama"]
    head = module.bind(emu.Emu, tied.model_config, params).llama.head()
    np.testing.assert_array_equal(head["base"], params["llama"]["embed"]["base"])
    np.testing.assert_array_equal(
        module.bind(emu.Emu, P.model_config, PARAMS).llama.head()["added"],
        PARAMS["llama"]["lm_head"]["added"],
    )


def test_scaled_frequencies_by_hand():
    """Width 4 and base 100 give two frequencies, 1 and 0.1 radians per token.

    In 8 pi tokens they make 4 turns and 0.4 turns.
    """
    np.testing.assert_allclose(frequencies(4, 100.0, ()), [1, 0.1])
    np.testing.assert_allclose(frequencies(4, 100.0, ("linear", 4.0)), [0.25, 0.025])

    def scaled(low, high):
        return frequencies(4, 100.0, ("llama3", 8.0, low, high, 8 * np.pi))

    np.testing.assert_allclose(scaled(1.0, 4.0), [1, 0.1 / 8])
    np.testing.assert_allclose(scaled(0.2, 0.4), [1, 0.1])
    # 4 turns and 0.4 turns lie half and a twentieth of the way from 0 to 8.
    np.testing.assert_allclose(scaled(0.0, 8.0), [0.5 + 0.5 / 8, 0.1 * (0.05 + 0.95 / 8)])
    with pytest.raises(UserError, match=r"rope_scaling=\('yarn', 2.0\) must be"):
        frequencies(4, 100.0, ("yarn", 2.0))


@pytest.mark.parametrize("overrides", [("model.llama.kv_heads=3",), ("model.llama.heads=5",)])
def test_heads_that_do_not_divide_are_one_line(overrides):
    with pytest.raises(UserError, match="model.llama: width 32 must be a multiple of heads"):
        make.program(make.cfg(*overrides))
