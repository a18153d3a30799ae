"""Compare Emu with its release: towers, losses, gradients and generation."""

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
from emu_jax.verify.golden import Quantity, compare, weights
from emu_jax.weights import convert, emu1, peft

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
    """The model's config, from a file's `config` and vocabulary. Raises UserError."""
    try:
        c = json.loads(str(file["config"]))
        special = json.loads(str(file["special_ids"]))
        rows = next(
            json.loads(str(shape))[0]
            for name, shape in zip(file["parameter_names"], file["parameter_shapes"], strict=True)
            if str(name).endswith("embed_tokens.weight") and "cformer" not in str(name)
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
    names = map(str, file["parameter_names"])
    shapes = map(json.loads, map(str, file["parameter_shapes"]))
    _, adapter = emu1.split_lora(dict(zip(names, map(tuple, shapes), strict=False)))
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
    table = emu1.table(config)
    foreign = weights(file)
    plain, adapter = emu1.split_lora(foreign)
    params = tree.merge(
        convert.from_theirs(table, plain), convert.from_theirs(peft.table(config), adapter)
    )
    batch, images = make_batch(file, config)
    ours = _run(config, params, batch, images)

    seen = file["attention_mask"].astype(bool)
    reference = {name: np.asarray(file[name]) for name in ours}
    # Outputs at padding have no meaning.
    for name in ("hidden", "logits_sum", "logits_first8", "logits_logsumexp"):
        ours[name] = ours[name][seen]
        reference[name] = reference[name][seen]
    yield from (compare(name, reference[name], ours[name], 1e-4) for name in file if name in ours)

    yield from _generated(file, config, params, ours["visual_tokens"])

    gradient = _gradient(config, params, batch, images)
    theirs = _theirs(table, gradient) | _theirs(peft.table(config), gradient)
    for name, norm in zip(map(str, file["grad_names"]), file["grad_norms"], strict=True):
        key = next(key for part in emu1.split_lora({name: None}) for key in part)
        if key not in theirs:
            raise UserError(
                f"golden file: grad_names has {name!r}, which is not a trainable parameter"
            )
        yield compare(
            f"grad_norm {name}", norm, np.linalg.norm(theirs[key].astype(np.float64)), 5e-4
        )
    yield from (
        Quantity(name, None, 1e-4)
        for name in file
        if name not in ours
        and name not in INPUTS | {"grad_norms"}
        and not name.startswith(("generate_image_", "decode_"))
    )


def _generated(
    file: dict[str, np.ndarray], config: emu.EmuConfig, params: dict, visual: np.ndarray
) -> Iterator[Quantity]:
    """Generation by a Session from the file's ids and its images' visual tokens."""
    session = Session(config, params, Tokenizer(config.llama.vocab, list, str), context=1 << 20)
    special = json.loads(str(file["special_ids"]))

    def prompts(name: str) -> list[Prompt]:
        rows = [row[row != special["pad"]].tolist() for row in np.asarray(file[name])]
        slots = [
            [
                at + 1
                for at in range(len(row) - 1)
                if row[at : at + 2] == [special["img"], special["image"]]
            ]
            for row in rows
        ]
        return [
            Prompt(row, list(visual[: len(at)]), at) for row, at in zip(rows, slots, strict=True)
        ]

    for name in (name for name in file if name.startswith("generate_image_")):
        given = prompts(name.replace("generate_image", "prompt") + "_ids")
        # Without [IMG], which generate_images appends.
        opened = [replace(prompt, tokens=prompt.tokens[:-1]) for prompt in given]
        yield compare(name, file[name], session.generate_images(opened), 1e-4)
    for name in (
        name for name in file if name.startswith("decode_") and name != "decode_prompt_ids"
    ):
        options = GenerationConfig(max_new_tokens=12)
        if found := re.fullmatch(r"decode_beam(\d+)_lp(m?)([\d.]+)", name):
            options = replace(
                options,
                beams=int(found[1]),
                length_penalty=float(found[3]) * (-1 if found[2] else 1),
            )
        ids = session.generate_ids(prompts("decode_prompt_ids"), options, added=True)
        rows = [(row + [special["eos"]])[:12] for row in ids]
        longest = max(map(len, rows))
        ours = np.array([row + [special["pad"]] * (longest - len(row)) for row in rows])
        same = ours.shape == file[name].shape and (ours == file[name]).all()
        yield Quantity(name, 0.0 if same else float("inf"), 0.0)


def make_batch(file: dict[str, np.ndarray], config: emu.EmuConfig) -> tuple[Batch, jax.Array]:
    """The file's rows as a Batch without pixels, and its normalised images [M, h, w, 3]."""
    ids = np.asarray(file["input_ids"])
    seen = np.asarray(file["attention_mask"]).astype(np.int32)
    B, T = ids.shape
    img, end, slot = (
        json.loads(str(file["special_ids"]))[name] for name in ("img", "end_img", "image")
    )
    starts = [np.flatnonzero(row == img) + 1 for row in ids]
    slots = np.full((B, max(map(len, starts))), T)
    for row, at in zip(slots, starts, strict=True):
        row[: len(at)] = at
    counts = (seen > 0) & ~np.isin(ids, (img, end, slot))
    counts[:, 0] = False
    arrays = dict(
        tokens=ids.astype(np.int32),
        segments=seen,
        positions=np.tile(np.arange(T), (B, 1)),
        text_weights=counts.astype(np.float32),
        images=np.zeros((*slots.shape, 0, 0, 3), np.uint8),
        image_slots=slots,
        image_weights=(slots < T).astype(np.float32),
        sources=np.zeros_like(seen),
    )
    batch = Batch(**jax.tree.map(jnp.asarray, arrays))
    return batch, jnp.asarray(rearrange(file["images"], "m c h w -> m h w c"))


def _forward(model: emu.Emu, batch: Batch, images) -> dict[str, jax.Array]:
    features = model.vision(images, kernel="dense")
    normed = model.ln_visual(features)
    tokens = model.resampler(normed, kernel="dense")
    # Images in reading order.
    held = batch.image_slots < batch.tokens.shape[1]
    place = (jnp.cumsum(held.ravel()) - 1).reshape(held.shape)
    visual = jnp.where(held[..., None, None], tokens[jnp.maximum(place, 0)], 0)
    hidden = model.llama(
        model.interleave(batch.tokens, visual, batch.image_slots),
        batch.positions,
        batch.segments,
        kernel="dense",
    )[0]
    return dict(
        vision_features=features,
        vision_normed=normed,
        visual_tokens=tokens,
        hidden=hidden,
        visual=visual,
    )


def _losses(model, out, batch, *, regress_end: bool):
    objective = dict(
        text_weight=1.0, image_weight=1.0, regress_end=regress_end, chunk=16, sources=1
    )
    return stages.next_element(
        model, out["hidden"], out["visual"], batch, stages.emu_sums(batch), objective
    )


def _run(config: emu.EmuConfig, params: dict, batch: Batch, images) -> dict[str, np.ndarray]:
    """Our forward quantities, under the file's names."""

    def run(params):
        model = module.bind(emu.Emu, config, params)
        out = _forward(model, batch, images)
        (_, metrics), (_, with_end) = (
            _losses(model, out, batch, regress_end=end) for end in (False, True)
        )
        head = jnp.concatenate(list(model.llama.head().values()))
        logits = jnp.einsum("btD,vD->btv", out["hidden"], head, precision="highest")
        N = config.resampler.tokens
        places = (batch.image_slots[..., None] - 1 + jnp.arange(N + 1)).reshape(
            len(batch.tokens), -1
        )
        predictions = model.regress_head(
            jnp.take_along_axis(out["hidden"], places[..., None], 1, mode="clip")
        )
        end = model.llama.embeddings(jnp.full((1, 1), config.llama.vocab + END_IMG), jnp.float32)[
            None
        ]
        targets = jnp.concatenate(
            [
                out["visual"],
                jnp.broadcast_to(end, (*batch.image_slots.shape, 1, config.llama.width)),
            ],
            2,
        )

        def mean(pair):
            return pair[0] / pair[1]

        return {
            name: out[name]
            for name in ("vision_features", "vision_normed", "visual_tokens", "hidden")
        } | dict(
            logits_sum=logits.sum(-1),
            logits_first8=logits[..., :8],
            logits_logsumexp=jax.nn.logsumexp(logits, -1),
            text_loss=mean(metrics["text_loss"]),
            regression_loss_visual_only=mean(metrics["image_loss"]),
            regression_loss_with_end=mean(with_end["image_loss"]),
            regress_predictions=predictions,
            regress_targets=targets,
        )

    ours = {name: np.asarray(value) for name, value in jax.jit(run)(params).items()}
    held = np.asarray(batch.image_slots) < batch.tokens.shape[1]
    ours["regress_predictions"] = ours["regress_predictions"].reshape(
        *held.shape, -1, config.llama.width
    )
    for name in ("regress_predictions", "regress_targets"):
        ours[name] = ours[name][held].reshape(-1, config.llama.width)
    # The files also count <s>, although nothing predicts it.
    counts = np.asarray(batch.text_weights, bool) | (np.arange(batch.tokens.shape[1]) == 0)
    ours["text_targets"] = np.where(counts, np.asarray(batch.tokens), -100)
    return ours


def _theirs(table: convert.Table, gradient: tree.Tree) -> dict[str, np.ndarray]:
    """The gradients of trained parameters, under the table's names."""
    there = {path for path, _ in tree.leaves(gradient)}
    rows = tuple(row for row in table.rows if row.ours in there)
    return dict(convert.to_theirs(table._replace(rows=rows), convert.reader(gradient)))


def _gradient(config: emu.EmuConfig, params: tree.Tree, batch: Batch, images) -> tree.Tree:
    """The gradient of every parameter, or with LoRA, of LoRA and all before the LLM.

    The release freezes the rest.
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
