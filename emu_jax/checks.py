"""Checks of files, precomputed arrays and memory before a run starts.

Every failure is a UserError of one line. Read next: plan.py, which checks the config itself.
"""

import os
from pathlib import Path

import jax
from ml_collections import ConfigDict

from emu_jax import profiler
from emu_jax.config import SEEDS, UserError
from emu_jax.data import precomputed
from emu_jax.data.mixture import check_rows
from emu_jax.files import made_by
from emu_jax.generate import diffusion_decoder
from emu_jax.hardware import GIB
from emu_jax.plan import RunPlan, latent_metadata
from emu_jax.stages import Stage


def check_run(plan: RunPlan) -> None:
    """Raise UserError if the model, its precomputed data and the devices do not fit together.

    `check_paths`, which needs no plan, looks for missing files.
    """
    c = plan.config
    stage = plan.program.stage
    lowest, highest = SEEDS
    if not lowest <= c.seed <= highest:
        raise UserError(f"seed={c.seed} must be at least {lowest} and at most {highest}")
    profiler.parse_steps(c.profile.steps)
    check_precomputed(c, stage)
    if stage.draws:
        diffusion_decoder.check_sampling(plan.program.model_config.diffusion, c.drawing.to_dict())
    check_memory(plan)


def check_paths(c: ConfigDict) -> None:
    """Raise UserError that names every missing folder and file."""
    for field in ("mixture", "eval_mixture"):
        check_rows(c.data[field], field)
    sources = [(name, path) for name, _, path, *_ in (*c.data.mixture, *c.data.eval_mixture)]
    # What is missing, and its path.
    missing: list[tuple[str, str]] = []
    if not c.workdir:
        missing.append(("a workdir (--config.workdir=DIR)", ""))
    if not Path(c.data.tokenizer).is_file():
        needed = (
            f"the tokenizer {c.data.tokenizer!r} "
            "(--config.data.tokenizer=LLaMA's tokenizer.model or a tokenizer.json)"
        )
        missing.append((needed, c.data.tokenizer))
    if not sources:
        needed = "data (--config.data.mixture=\"(('NAME', WEIGHT, 'FOLDER:SPLIT'), ...)\")"
        missing.append((needed, ""))
    for name, path in sources:
        folder, _, _ = path.rpartition(":")
        if not Path(folder).is_dir():
            missing.append((f"the source {name!r} at {path!r}", path))
    for directory in filter(None, c.init.split(",")):
        # A bucket is looked up later.
        if "://" not in directory and not Path(directory).is_dir():
            missing.append((f"the checkpoint init={directory!r}", directory))
    if missing:
        names = "; ".join(name for name, _ in missing)
        raise UserError(f"missing: {names}{made_by(*(path for _, path in missing))}")
    if "://" in c.workdir:
        raise UserError(
            f"workdir={c.workdir!r} is a bucket, but metrics are written to a folder: set "
            f"--config.workdir=DIR, and --config.checkpoint.to={c.workdir} for the checkpoints"
        )


def check_precomputed(c: ConfigDict, stage: Stage) -> None:
    """Raise UserError for conditions or latents that are missing, unused or not this model's."""
    wanted = stage.draws and c.model.decoder.condition == "generated"
    if wanted and not c.data.conditions:
        raise UserError(
            "model.decoder.condition='generated' needs data.conditions=DIR, made by: "
            "python -m emu_jax.generate precompute --config=FILE --to=DIR"
        )
    if c.data.conditions and not wanted:
        raise UserError(
            f"data.conditions={c.data.conditions!r}: only model.decoder.condition='generated' "
            "reads them"
        )
    if wanted:
        found = tuple(precomputed.read_metadata(Path(c.data.conditions), "conditions")["shape"])
        needed = (c.model.resampler.tokens, c.model.llama.width)
        if found != needed:
            raise UserError(
                f"data.conditions={c.data.conditions!r} are visual tokens {list(found)}, and the "
                f"model's are {list(needed)}"
            )
    if c.data.latents:
        notes = precomputed.read_metadata(Path(c.data.latents), "latents")
        differ = [
            f"{name} {notes.get(name)}, not {value}"
            for name, value in latent_metadata(c).items()
            if notes.get(name) != value
        ]
        if differ:
            raise UserError(
                f"data.latents={c.data.latents!r} were made for other images than this config's: "
                f"{'; '.join(differ)}"
            )


def check_memory(plan: RunPlan) -> None:
    """Raise UserError if the training state and its gradient do not fit the devices."""
    needed = plan.state_bytes + plan.gradient_bytes
    memory = device_memory()
    if needed > memory:
        raise UserError(
            f"the model's state needs {needed / GIB:.1f} GiB per device and a device has "
            f"{memory / GIB:.1f} GiB: use more devices (mesh.fsdp), or a smaller model "
            "(--config=configs/pretrain.py:emu-1b)"
        )


def device_memory() -> int:
    """Bytes of memory of one local device; CPU devices share the machine's memory."""
    stats = jax.local_devices()[0].memory_stats() or {}
    if limit := stats.get("bytes_limit"):
        return limit
    machine = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return machine // jax.local_device_count()
