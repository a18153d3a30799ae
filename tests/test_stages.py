"""The losses against NumPy and by hand: weights, gradients, packing and negatives."""

import chex
import jax
import numpy as np
import pytest

from emu_jax import stages
from emu_jax.data.sequence import Document, SequenceBuilder
from emu_jax.data.tokenizer import Tokenizer
from tests.support import make
from tests.support.trees import assert_close

C = make.cfg()
P = make.program(C)
PARAMS = make.random_params(P)
BATCH = jax.device_put(make.batch(C))
N = C.model.resampler.tokens
V = C.model.llama.vocab
T = C.data.tokens


def loss(params, batch, objective=P.objective):
    return P.stage.loss(P.bind(params), batch, None, P.stage.loss_weights(batch), objective)


weights_once = jax.jit(P.stage.loss_weights)


@pytest.fixture(scope="module")
def value_and_grad():
    """batch -> ((loss, metrics), gradients) of PARAMS."""
    compiled = jax.jit(jax.value_and_grad(loss, has_aux=True))
    return lambda batch: jax.device_get(compiled(PARAMS, batch))


@pytest.fixture(scope="module")
def forward():
    """(hidden, visual tokens) of BATCH."""
    return jax.jit(lambda: P.bind(PARAMS)(BATCH))()


def sequences(documents, labels=C.data.labels):
    """Sequences of documents, which are given as tuples of parts; "a" has id 3."""
    letters = Tokenizer(V, lambda text: [3 + ord(letter) - 97 for letter in text], lambda ids: "")
    build = SequenceBuilder(
        letters, n_visual=N, max_tokens=T, max_images=3, image_first=1.0, labels=labels
    )
    return [
        build(Document(f"d{k}", parts), rng=np.random.default_rng(0))
        for k, parts in enumerate(documents)
    ]


# Next element


def by_hand(hidden, visual, batch, regress_end):
    """[(nll, source) of every label], [(error, source) of every image], from the ids alone."""
    hidden, visual, batch = jax.tree.map(
        lambda x: np.asarray(x, np.float64 if x.dtype == np.float32 else None),
        (hidden, visual, batch),
    )

    def table(name):
        return np.concatenate([PARAMS["llama"][name][part] for part in ("base", "added")]).astype(
            np.float64
        )

    head = table("lm_head")
    end = table("embed")[V + 2]
    project = np.asarray(PARAMS["regress_head"]["w"], np.float64)
    words = []
    images = []
    for b in range(len(hidden)):
        for t in range(1, T):
            # Labels are tokens that are neither special nor <s>.
            if batch.segments[b, t] and batch.tokens[b, t] < V and batch.tokens[b, t] != 1:
                logits = head @ hidden[b, t - 1]
                words.append(
                    (
                        np.log(np.exp(logits - logits.max()).sum())
                        + logits.max()
                        - logits[batch.tokens[b, t]],
                        batch.sources[b, t],
                    )
                )
        # Images start at [IMG].
        starts = [t for t in range(T) if batch.tokens[b, t] == V + 1]
        for k, t in enumerate(starts):
            targets = [*visual[b, k], *([end] if regress_end else [])]
            errors = [
                ((hidden[b, t + n] @ project - target) ** 2).mean()
                for n, target in enumerate(targets)
            ]
            images.append((np.mean(errors), batch.sources[b, t]))
    return words, images


@pytest.mark.parametrize("regress_end", [True, False])
def test_loss_and_metrics_by_hand(forward, value_and_grad, regress_end):
    words, images = by_hand(*forward, BATCH, regress_end)
    objective = P.objective.copy(
        {"regress_end": regress_end, "text_weight": 0.3, "image_weight": 2.0}
    )
    value, metrics = jax.jit(
        lambda hidden, visual: stages.next_element(
            P.bind(PARAMS), hidden, visual, BATCH, P.stage.loss_weights(BATCH), objective
        )
    )(*forward)

    def mean(found):
        return np.mean([x for x, _ in found])

    np.testing.assert_allclose(value, 0.3 * mean(words) + 2.0 * mean(images), rtol=1e-5)
    for name, found in (("text_loss", words), ("image_loss", images)):
        assert len({source for _, source in found}) == 2
        np.testing.assert_allclose(metrics[name], (sum(x for x, _ in found), len(found)), rtol=1e-5)
        by_source = [
            np.array([x for x, source in found if source == number]) for number in range(2)
        ]
        want = [[values.sum() for values in by_source], [len(values) for values in by_source]]
        np.testing.assert_allclose(metrics[f"{name}_by_source"], want, rtol=1e-5)
    present = np.asarray(forward[1], np.float64)[np.asarray(BATCH.image_slots) < T]
    np.testing.assert_allclose(
        metrics["visual_variance"], (present.var(0).mean() * len(present), len(present)), rtol=1e-5
    )
    # The config has regress_end, so `value_and_grad` uses it.
    if regress_end:
        np.testing.assert_allclose(
            value_and_grad(BATCH)[0][0], mean(words) + mean(images), rtol=1e-5
        )


@pytest.mark.parametrize(
    ("labels", "count"),
    [
        (("text", "</s>"), 5 + 2),
        (("text",), 5),
        ((), 0),
        (("text", "</s>", "[IMG]"), 5 + 2 + 2),
        (("text", "</s>", "[IMG]", "[/IMG]"), 5 + 2 + 2 + 2),
    ],
)
def test_labels_follow_the_grammar(labels, count):
    """Five letters, two documents, two images."""
    image = np.zeros((28, 28, 3), np.uint8)
    batch = make.pack(C, [sequences([("ab", image, "c"), (image, "de")], labels)])
    totals = weights_once(batch)
    assert (float(totals["text"]), float(totals["image"])) == (count, 2)


def test_an_images_weight_and_a_texts_count(value_and_grad):
    """A weight of 0 takes an image or a word out of the means; empty image slots never count."""
    batch = jax.device_get(BATCH)
    images = np.where(batch.has_image, batch.image_weights, np.float32(5))
    images[:4] = 0
    text = batch.text_weights.copy()
    text[4:] = 0
    (value, metrics), _ = value_and_grad(batch.replace(image_weights=images, text_weights=text))
    whole = [make.pack(C, [[]] * 8)] * 2
    halves = [
        jax.tree.map(lambda x, empty: np.concatenate([x[rows], empty[:4]]), batch, empty)
        for rows, empty in zip((slice(4, 8), slice(0, 4)), whole, strict=True)
    ]
    (_, only_images), (_, only_text) = (value_and_grad(half)[0] for half in halves)
    np.testing.assert_allclose(metrics["image_loss"], only_images["image_loss"], rtol=1e-5)
    np.testing.assert_allclose(metrics["text_loss"], only_text["text_loss"], rtol=1e-5)
    np.testing.assert_allclose(
        value,
        sum(total / weight for total, weight in (metrics["text_loss"], metrics["image_loss"])),
        rtol=1e-5,
    )


def test_an_empty_batch_has_zero_loss_and_gradient(value_and_grad):
    (value, metrics), grads = value_and_grad(make.pack(C, [[]] * 8))
    assert value == 0 and all(not np.any(x) for x in jax.tree.leaves((metrics, grads)))


def test_targets_are_detached(forward):
    """Fixed hidden states leave visual tokens and [/IMG]'s embedding without a gradient.

    The head gets one.
    """
    hidden, visual = forward
    objective = P.objective.copy({"regress_end": True, "text_weight": 0.0})

    def image_loss(params, visual):
        return stages.next_element(
            P.bind(params), hidden, visual, BATCH, P.stage.loss_weights(BATCH), objective
        )[0]

    by_params, by_visual = jax.device_get(
        jax.jit(jax.grad(image_loss, argnums=(0, 1)))(PARAMS, visual)
    )
    assert not by_visual.any() and not any(
        leaf.any() for leaf in jax.tree.leaves(by_params["llama"])
    )
    assert np.abs(by_params["regress_head"]["w"]).max() > 1e-3


def test_the_encoder_learns_through_the_inputs_alone(forward):
    """Visual tokens are inputs and targets; constant targets give the same gradient."""

    def image_loss(bias, constants):
        project = PARAMS["resampler"]["project"] | {"bias": bias}
        model = P.bind(PARAMS | {"resampler": PARAMS["resampler"] | {"project": project}})
        hidden, visual = model(BATCH)
        targets = forward[1] if constants else visual
        return stages.next_element(
            model,
            hidden,
            targets,
            BATCH,
            P.stage.loss_weights(BATCH),
            P.objective.copy({"text_weight": 0.0}),
        )[0]

    bias = PARAMS["resampler"]["project"]["bias"]
    ours, want = jax.jit(
        lambda bias: [jax.grad(image_loss)(bias, constants) for constants in (False, True)]
    )(bias)
    np.testing.assert_allclose(ours, want, rtol=1e-4, atol=1e-6)
    assert np.abs(want).min() > 1e-4


def test_packed_rows_are_separate_documents(value_and_grad):
    """Eight documents have the same loss and gradient packed in three rows as in a row each.

    tests/models/test_emu.py compares the outputs.
    """
    packed, separate, _ = make.packed_and_separate(C)
    ((value, metrics), grads), ((value_alone, metrics_alone), grads_alone) = (
        value_and_grad(batch) for batch in (packed, separate)
    )
    np.testing.assert_allclose(value, value_alone, rtol=1e-5)
    for name in ("text_loss", "image_loss", "visual_variance"):
        np.testing.assert_allclose(metrics[name], metrics_alone[name], rtol=1e-4)
    # Gradients that are 0 except for rounding are compared with a tolerance of 1e-6.
    assert_close(grads, grads_alone, tolerance=1e-4, floor=0.01)


# Contrastive

WARM = make.warm_cfg()
WARM_P = make.program(WARM)
WARM_PARAMS = make.random_params(WARM_P)
TEXTS = ("ab", "cd", "ab", "efg", "ba")


def warm_batch():
    """An image-text pair for each text in TEXTS, two pairs a row; no two images are alike."""
    rng = np.random.default_rng(0)
    found = sequences([(rng.integers(0, 256, (32, 32, 3), np.uint8), text) for text in TEXTS])
    return jax.device_put(make.pack(WARM, [found[2 * row : 2 * row + 2] for row in range(4)]))


def warm_loss(params, batch, key=None, **objective):
    return stages.contrastive(
        WARM_P.bind(params),
        batch,
        key,
        stages.image_sums(batch),
        WARM_P.objective.copy(objective),
    )


@pytest.fixture(scope="module")
def warm():
    """batch -> ((loss, metrics), gradients)."""
    compiled = jax.jit(jax.value_and_grad(warm_loss, has_aux=True))
    return lambda batch: jax.device_get(compiled(WARM_PARAMS, batch))


def features(batch):
    """(visual tokens, unit image features, unit text features) of the batch's real images."""
    model = WARM_P.bind(WARM_PARAMS)
    there = np.asarray(batch.image_slots).ravel() < T
    both = jax.jit(
        lambda: (
            model.encode(batch.images.reshape(-1, 32, 32, 3)),
            model.contrast.text(batch).reshape(-1, 32),
        )
    )()
    visual, text = (np.asarray(x, np.float64)[there] for x in both)
    project = jax.device_get(WARM_PARAMS["contrast"]["image"])
    image = np.einsum("mnD,nDE->mE", visual, project["w"]) + project["bias"]

    def unit(x):
        return x / np.linalg.norm(x, axis=-1, keepdims=True)

    return visual, unit(image), unit(text)


def test_contrastive_by_hand_and_equal_texts_are_no_negatives(warm):
    batch = warm_batch()
    (value, metrics), _ = warm(batch)
    visual, u, w = features(batch)
    logits = u @ w.T / 0.07
    texts = np.array(TEXTS)
    rival = (texts[:, None] != texts) | np.eye(len(texts), dtype=bool)
    assert rival.sum() == 25 - 2

    def lse(x):
        return np.log(np.exp(x).sum())

    nll = [
        (lse(logits[i][rival[i]]) + lse(logits[:, i][rival[:, i]])) / 2 - logits[i, i]
        for i in range(5)
    ]
    np.testing.assert_allclose(metrics["contrastive_loss"], (sum(nll), 5), rtol=1e-4)
    np.testing.assert_allclose(
        metrics["top1"], (sum(np.where(rival, logits, -np.inf).argmax(1) == np.arange(5)), 5)
    )

    pixels = (
        np.asarray(batch.images)[np.asarray(batch.image_slots) < T]
        .reshape(5, 16, 2, 16, 2, 3)
        .mean((2, 4))
        / 127.5
        - 1
    )
    head = jax.device_get(WARM_PARAMS["contrast"]["readout"])
    readout = (
        (
            (np.einsum("mnD,nDp->mp", visual, head["w"]) + head["bias"]).reshape(5, 16, 16, 3)
            - pixels
        )
        ** 2
    ).mean((1, 2, 3))
    np.testing.assert_allclose(metrics["readout_loss"], (readout.sum(), 5), rtol=1e-4)

    deviation = visual.std(0)
    z = (visual - visual.mean(0)) / np.sqrt(deviation**2 + 1e-6)
    correlation = np.einsum("mnd,mne->nde", z, z) / 5
    spill = np.mean([(c**2).sum() - (np.diag(c) ** 2).sum() for c in correlation]) / 32
    lack = np.maximum(1 - deviation, 0).mean()
    np.testing.assert_allclose(metrics["correlation"], (5 * spill, 5), rtol=1e-4)
    np.testing.assert_allclose(
        value, np.mean(nll) + 100.0 * readout.mean() + 10.0 * lack + 0.5 * spill, rtol=1e-4
    )
    np.testing.assert_allclose(
        metrics["visual_variance"], (5 * (deviation**2).mean(), 5), rtol=1e-4
    )


def test_images_that_are_not_there_count_nothing(warm):
    (value, metrics), grads = warm(warm_batch())
    batch = warm_batch()
    absent = (np.asarray(batch.image_slots) == T)[..., None, None, None]
    assert absent.sum() == 12 - len(TEXTS)
    (value_other, metrics_other), grads_other = warm(
        batch.replace(images=np.where(absent, np.uint8(200), batch.images))
    )
    np.testing.assert_allclose(value_other, value, rtol=1e-6)
    chex.assert_trees_all_close(metrics_other, metrics, rtol=1e-5)
    assert_close(grads_other, grads, tolerance=1e-4, floor=0.01)


# Moved images


def test_images_move_by_the_key_and_repeat_their_edges():
    batch = BATCH
    shifted = jax.jit(lambda key: stages.shifted(batch, key, 3).images)

    def move(seed):
        return np.asarray(shifted(jax.random.key(seed)))

    found = []
    for before, after in zip(
        np.asarray(batch.images).reshape(-1, 28, 28, 3), move(0).reshape(-1, 28, 28, 3), strict=True
    ):
        if before.any():
            padded = np.pad(before, ((3, 3), (3, 3), (0, 0)), "edge")
            found += [
                (y - 3, x - 3)
                for y in range(7)
                for x in range(7)
                if (padded[y : y + 28, x : x + 28] == after).all()
            ]
    assert (
        len(found) == np.asarray(batch.images).any((2, 3, 4)).sum()
        and len(set(found)) > len(found) / 2
    )
    assert all(min(way) < 0 < max(way) for way in zip(*found, strict=True)) and {-3, 3} <= {
        move for ways in found for move in ways
    }
    np.testing.assert_array_equal(move(0), move(0))
    assert (move(1) != move(0)).any()


@pytest.mark.parametrize(("key", "pixels"), [(None, 3), (0, 0)])
def test_images_do_not_move_without_a_key_or_pixels(key, pixels):
    assert stages.shifted(BATCH, None if key is None else jax.random.key(key), pixels) is BATCH


@pytest.mark.parametrize(
    ("program", "params", "batch"),
    [(P, PARAMS, BATCH), (WARM_P, WARM_PARAMS, warm_batch())],
    ids=["emu", "contrastive"],
)
def test_a_stage_moves_its_images(program, params, batch):
    """Without dropout, the key only moves the images, and another key changes the loss."""
    totals = program.stage.loss_weights(batch)
    objective = program.objective.copy({"shift": 2})
    value = jax.jit(
        lambda key: program.stage.loss(program.bind(params), batch, key, totals, objective)[0]
    )
    assert value(jax.random.key(0)) == value(jax.random.key(0)) != value(jax.random.key(1))
