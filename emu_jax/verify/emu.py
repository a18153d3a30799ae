"""Compare Emu with its release: towers, losses, gradients and generation.

Read next: golden.py for the files and their weights, ../weights/emu1.py for the names.
"""

import json
import re
from collections.abc import Iterator
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange

from emu_jax import stages, tree
from emu_jax.config import UserError
from emu_jax.data.tokenizer import END_IMG, Tokenizer
from emu_jax.generate.generation_config import GenerationConfig
from emu_jax.generate.processor import Prompt
from emu_jax.generate.session import Session
from emu_jax.models import emu, module
from emu_jax.models.llama import LlamaConfig
from emu_jax.models.lora import LoraConfig
from emu_jax.models.resampler import ResamplerConfig
from emu_jax.models.vision import VisionConfig
from emu_jax.types import Batch
from emu_jax.verify.golden import Quantity, compare, parameter_shapes, weights
from emu_jax.weights import convert, emu1, peft

TOLERANCE = 1e-4
GRADIENT_TOLERANCE = 5e-4
# Maximum length of the answers that the release generated.
NEW_TOKENS = 12
# Arrays that a file must have.
NEEDED = (
    "config",
    "seed",
    "eos_row_scale",
    "special_ids",
    "parameter_names",
    "parameter_shapes",
    "images",
    "input_ids",
    "attention_mask",
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
    "grad_names",
    "grad_norms",
)
# Outputs with a value for each position of a row.
PER_TOKEN = ("hidden", "logits_sum", "logits_first8", "logits_logsumexp")
# Arrays that are inputs, and so are not compared.
INPUTS = {
    "config",
    "seed",
    "eos_row_scale",
    "instruct",
    "special_ids",
    "parameter_names",
    "parameter_shapes",
    "images",
    "input_ids",
    "attention_mask",
    "texts",
    "grad_names",
    "prompt_text_only_ids",
    "prompt_interleaved_ids",
    "decode_prompt_ids",
}


def read_config(file: dict[str, np.ndarray]) -> emu.EmuConfig:
    """The model's config, from `config` and the shapes in a file.

    Raises UserError if something is missing.
    """
    try:
        c = json.loads(str(file["config"]))
        special = _special_ids(file)
        rows = next(
            shape[0]
            for name, shape in parameter_shapes(file).items()
            if name.endswith("embed_tokens.weight") and "cformer" not in name
        )
        vision = VisionConfig(
            image=c["image_size"],
            patch=c["patch"],
            width=c["vit_width"],
            depth=c["vit_layers"],
            heads=c["vit_width"] // c["vit_head_width"],
            ffn=int(c["vit_width"] * c["vit_mlp_ratio"]),
            mean=(0.0, 0.0, 0.0),
            std=(1.0, 1.0, 1.0),
            remat="none",
        )
        resampler = ResamplerConfig(
            tokens=c["n_causal"],
            width=c["t5_d_model"],
            depth=c["t5_layers"],
            heads=c["t5_heads"],
            head_width=c["t5_d_kv"],
            ffn=c["t5_d_ff"],
            buckets=32,
            max_distance=128,
            dropout=0.1,
            remat="none",
        )
        llama = LlamaConfig(
            vocab=special["pad"],
            added=rows - special["pad"],
            width=c["llm_width"],
            depth=c["llm_layers"],
            heads=c["llm_heads"],
            kv_heads=0,
            ffn=c["llm_ff"],
            eps=1e-6,
            rope_base=10000.0,
            rope_scaling=(),
            rope_dtype="bfloat16",
            tied=False,
            remat="none",
        )
        return emu.EmuConfig(
            vision=vision,
            resampler=resampler,
            llama=llama,
            compute="float32",
            attention="dense",
            standardise=False,
            lora=_lora(file),
        )
    except (KeyError, StopIteration, json.JSONDecodeError) as error:
        raise UserError(f"golden file: its config or special_ids lack {error}") from error


def _lora(file: dict[str, np.ndarray]) -> LoraConfig:
    """The config of the file's adapter, whose alpha is its rank; rank 0 if it has none."""
    _, adapter = emu1.split_lora(parameter_shapes(file))
    rank = peft.infer_config(adapter, {})["lora.rank"]
    if not rank:
        return LoraConfig()
    targets = peft.default_config(adapter, {})["lora.targets"]
    return LoraConfig(rank=rank, alpha=float(rank), dropout=0.0, targets=targets)


def quantities(file: dict[str, np.ndarray]) -> Iterator[Quantity]:
    """Quantities of an Emu file, each with its error, or None if not covered.

    Raises UserError if arrays of NEEDED are missing.
    """
    if missing := [name for name in NEEDED if name not in file]:
        raise UserError(f"golden file: missing {', '.join(missing)}")
    config = read_config(file)
    params = _import_weights(file, config)
    batch, images = make_batch(file)
    ours = _outputs(config, params, batch, images)

    # Outputs at padding have no meaning.
    is_token = file["attention_mask"].astype(bool)
    for name in file:
        if name in PER_TOKEN:
            yield compare(name, file[name][is_token], ours[name][is_token], TOLERANCE)
        elif name in ours:
            yield compare(name, file[name], ours[name], TOLERANCE)
    yield from _generated(file, config, params, ours["visual_tokens"])
    gradient = jax.device_get(_gradient(config, params, batch, images))
    yield from _gradient_norms(file, config, gradient)

    compared = {*ours, *INPUTS, "grad_norms"}
    for name in file:
        if name not in compared and not name.startswith(("generate_image_", "decode_")):
            yield Quantity(name, None, TOLERANCE)


def _special_ids(file: dict[str, np.ndarray]) -> dict[str, int]:
    """Ids of the special tokens by name: "pad", "img", "end_img", "image", "eos", ..."""
    return json.loads(str(file["special_ids"]))


def _import_weights(file: dict[str, np.ndarray], config: emu.EmuConfig) -> tree.Tree:
    """Our parameters, with LoRA if the file has an adapter."""
    plain, adapter = emu1.split_lora(weights(file))
    return tree.merge(
        convert.from_theirs(emu1.table(config), plain),
        convert.from_theirs(peft.table(config), adapter),
    )


def make_batch(file: dict[str, np.ndarray]) -> tuple[Batch, jax.Array]:
    """The file's rows as a Batch without pixels, and its normalised images [M, h, w, 3]."""
    ids = np.asarray(file["input_ids"])
    segments = np.asarray(file["attention_mask"]).astype(np.int32)
    B, T = ids.shape
    special = _special_ids(file)
    slots_by_row = [np.flatnonzero(row == special["img"]) + 1 for row in ids]
    image_slots = np.full((B, max(map(len, slots_by_row))), T)
    for row, slots in zip(image_slots, slots_by_row, strict=True):
        row[: len(slots)] = slots
    is_image = np.isin(ids, [special["img"], special["end_img"], special["image"]])
    is_label = (segments > 0) & ~is_image
    # Nothing predicts <s>.
    is_label[:, 0] = False
    arrays = dict(
        tokens=ids.astype(np.int32),
        segments=segments,
        positions=np.tile(np.arange(T), (B, 1)),
        text_weights=is_label.astype(np.float32),
        images=np.zeros((*image_slots.shape, 0, 0, 3), np.uint8),
        image_slots=image_slots,
        image_weights=(image_slots < T).astype(np.float32),
        sources=np.zeros_like(segments),
    )
    batch = Batch(**jax.tree.map(jnp.asarray, arrays))
    return batch, jnp.asarray(rearrange(file["images"], "m c h w -> m h w c"))


def _forward(model: emu.Emu, batch: Batch, images: jax.Array) -> dict[str, jax.Array]:
    """Outputs of the towers, and the visual tokens [B, I, N, D] of each row as `visual`."""
    features = model.vision(images, kernel="dense")
    normed = model.ln_visual(features)
    tokens = model.resampler(normed, kernel="dense")
    # The file's images are in reading order: the k-th slot in use has image k.
    has_image = batch.has_image
    image_index = (jnp.cumsum(has_image.ravel()) - 1).reshape(has_image.shape)
    visual = tokens[jnp.maximum(image_index, 0)]
    visual = jnp.where(has_image[..., None, None], visual, 0)
    embeddings = model.interleave(batch.tokens, visual, batch.image_slots)
    hidden, _ = model.llama(embeddings, batch.positions, batch.segments, kernel="dense")
    return dict(
        vision_features=features,
        vision_normed=normed,
        visual_tokens=tokens,
        hidden=hidden,
        visual=visual,
    )


def _losses(model, out, batch, *, regress_end: bool):
    """(loss, metrics) of the stage `emu`, from the outputs of `_forward`."""
    objective = dict(
        text_weight=1.0, image_weight=1.0, regress_end=regress_end, chunk=16, sources=1
    )
    totals = stages.emu_sums(batch)
    return stages.next_element(model, out["hidden"], out["visual"], batch, totals, objective)


def _outputs(
    config: emu.EmuConfig, params: tree.Tree, batch: Batch, images: jax.Array
) -> dict[str, np.ndarray]:
    """Our outputs of the forward pass and the losses, under the file's names."""

    def mean(total_and_weight):
        total, weight = total_and_weight
        return total / weight

    @jax.jit
    def compute(params):
        model = module.bind(emu.Emu, config, params)
        out = _forward(model, batch, images)
        _, metrics = _losses(model, out, batch, regress_end=False)
        _, metrics_with_end = _losses(model, out, batch, regress_end=True)
        head = jnp.concatenate(list(model.llama.head().values()))
        logits = jnp.einsum("btD,vD->btv", out["hidden"], head, precision="highest")
        return dict(
            vision_features=out["vision_features"],
            vision_normed=out["vision_normed"],
            visual_tokens=out["visual_tokens"],
            hidden=out["hidden"],
            logits_sum=logits.sum(-1),
            logits_first8=logits[..., :8],
            logits_logsumexp=jax.nn.logsumexp(logits, -1),
            text_loss=mean(metrics["text_loss"]),
            regression_loss_visual_only=mean(metrics["image_loss"]),
            regression_loss_with_end=mean(metrics_with_end["image_loss"]),
            regress_predictions=_regress_predictions(model, out["hidden"], batch),
            regress_targets=_regress_targets(model, out["visual"]),
        )

    outputs = {name: np.asarray(value) for name, value in compute(params).items()}
    # The file has one row per target of each image, in reading order.
    has_image = np.asarray(batch.has_image)
    for name in ("regress_predictions", "regress_targets"):
        outputs[name] = outputs[name][has_image].reshape(-1, config.llama.width)
    # The file counts <s> as a target, although nothing predicts it.
    is_target = np.asarray(batch.text_weights, bool)
    is_target[:, 0] = True
    outputs["text_targets"] = np.where(is_target, np.asarray(batch.tokens), -100)
    return outputs


def _regress_predictions(model: emu.Emu, hidden: jax.Array, batch: Batch) -> jax.Array:
    """Predictions [B, I, N + 1, D] of the visual tokens and of the embedding of [/IMG]."""
    targets = model.config.resampler.tokens + 1
    # Each target is predicted from the position before it.
    positions = batch.image_slots[..., None] - 1 + jnp.arange(targets)
    positions = rearrange(positions, "B I N -> B (I N) 1")
    before = jnp.take_along_axis(hidden, positions, 1, mode="clip")
    return rearrange(model.regress_head(before), "B (I N) D -> B I N D", N=targets)


def _regress_targets(model: emu.Emu, visual: jax.Array) -> jax.Array:
    """Targets [B, I, N + 1, D]: the visual tokens, then the embedding of [/IMG]."""
    end_id = model.config.llama.vocab + END_IMG
    end = model.llama.embeddings(jnp.full((1, 1), end_id), jnp.float32)
    B, I, _, D = visual.shape
    return jnp.concatenate([visual, jnp.broadcast_to(end, (B, I, 1, D))], 2)


def _generated(
    file: dict[str, np.ndarray], config: emu.EmuConfig, params: tree.Tree, visual: np.ndarray
) -> Iterator[Quantity]:
    """Compare images and texts that a Session generates.

    visual: the visual tokens of the file's images.
    """
    session = Session(config, params, Tokenizer(config.llama.vocab, list, str), context=1 << 20)
    for name in file:
        if name.startswith("generate_image_"):
            ids = name.replace("generate_image", "prompt") + "_ids"
            # generate_images appends [IMG], which the file's prompts already have.
            prompts = [
                replace(prompt, tokens=prompt.tokens[:-1]) for prompt in _prompts(file, ids, visual)
            ]
            yield compare(name, file[name], session.generate_images(prompts), TOLERANCE)
    for name in file:
        if name.startswith("decode_") and name != "decode_prompt_ids":
            prompts = _prompts(file, "decode_prompt_ids", visual)
            ids = session.generate_ids(prompts, _generation_config(name), added=True)
            ours = _padded(ids, _special_ids(file))
            same = ours.shape == file[name].shape and (ours == file[name]).all()
            yield Quantity(name, 0.0 if same else float("inf"), 0.0)


def _prompts(file: dict[str, np.ndarray], name: str, visual: np.ndarray) -> list[Prompt]:
    """Prompts from the ids in the array `name`; each shows the first of the file's images."""
    special = _special_ids(file)
    image_start = [special["img"], special["image"]]
    prompts = []
    for row in np.asarray(file[name]):
        ids = row[row != special["pad"]].tolist()
        slots = [
            position + 1
            for position in range(len(ids) - 1)
            if ids[position : position + 2] == image_start
        ]
        prompts.append(Prompt(ids, list(visual[: len(slots)]), slots))
    return prompts


def _generation_config(name: str) -> GenerationConfig:
    """Options of "decode_greedy", or of "decode_beam5_lpm1" (beams 5, length penalty -1)."""
    options = GenerationConfig(max_new_tokens=NEW_TOKENS)
    match = re.fullmatch(r"decode_beam(\d+)_lp(m?)([\d.]+)", name)
    if not match:
        return options
    sign = -1 if match[2] else 1
    return replace(options, beams=int(match[1]), length_penalty=sign * float(match[3]))


def _padded(ids: list[list[int]], special: dict[str, int]) -> np.ndarray:
    """Generated ids as the release returns them: with </s>, padded to the longest row."""
    rows = [(row + [special["eos"]])[:NEW_TOKENS] for row in ids]
    longest = max(map(len, rows))
    return np.array([row + [special["pad"]] * (longest - len(row)) for row in rows])


def _gradient_norms(
    file: dict[str, np.ndarray], config: emu.EmuConfig, gradient: tree.Tree
) -> Iterator[Quantity]:
    """Compare the norms of gradients. Raises UserError for a name that does not train."""
    gradients = _export(emu1.table(config), gradient) | _export(peft.table(config), gradient)
    for name, norm in zip(map(str, file["grad_names"]), file["grad_norms"], strict=True):
        plain, adapter = emu1.split_lora({name: None})
        (key,) = plain | adapter
        if key not in gradients:
            raise UserError(
                f"golden file: grad_names has {name!r}, which is not a trainable parameter"
            )
        ours = np.linalg.norm(gradients[key].astype(np.float64))
        yield compare(f"grad_norm {name}", norm, ours, GRADIENT_TOLERANCE)


def _export(table: convert.Table, gradient: tree.Tree) -> dict[str, np.ndarray]:
    """Gradients under the table's foreign names; rows of frozen parameters are left out."""
    trained = {path for path, _ in tree.leaves(gradient)}
    rows = tuple(row for row in table.rows if row.ours in trained)
    return dict(convert.to_theirs(table._replace(rows=rows), convert.reader(gradient)))


def _gradient(config: emu.EmuConfig, params: tree.Tree, batch: Batch, images) -> tree.Tree:
    """Gradients of the parameters that the release trains.

    These are all parameters, or with LoRA, those of LoRA and of the towers before the LLM.
    """
    trains = {
        path: not config.lora.rank
        or path.endswith(("/a", "/b"))
        or not path.startswith(("llama/", "regress_head/"))
        for path, _ in tree.leaves(params)
    }
    trainable, frozen = tree.split(params, tree.unflatten(trains))

    def loss(trainable):
        model = module.bind(emu.Emu, config, tree.merge(trainable, frozen))
        return _losses(model, _forward(model, batch, images), batch, regress_end=False)[0]

    return jax.jit(jax.grad(loss))(trainable)
