"""Import and export of checkpoints, one tensor at a time.

An import writes a checkpoint for `config.init=DIR`. Towers that no source has are left out, and
training initialises them. An export writes files that the family's own library can load. Read next:
convert.py, ../checkpoint.
"""

import copy
import json
import re
import shlex
import shutil
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from functools import partial, reduce
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict
from tqdm import tqdm

from emu_jax import checkpoint, config, sharding
from emu_jax.config import UserError
from emu_jax.files import commit, part_of
from emu_jax.models import lora
from emu_jax.models.lora import LoraConfig
from emu_jax.weights import convert, emu1, eva_clip, files, peft
from emu_jax.weights.convert import Table
from emu_jax.weights.families import FAMILIES, guess
from emu_jax.weights.family import Family


class Source(NamedTuple):
    """Tensors of one family that the user named."""

    family: Family
    # By the table's names.
    tensors: dict[str, Any]
    foreign: files.Foreign


class Part(NamedTuple):
    """One family's share of an import."""

    family: Family
    # What the user named, for messages.
    where: str
    # By the table's names.
    tensors: dict[str, Any]
    table: Table
    # By the paths of our leaves.
    dtypes: dict[str, np.dtype]
    # Files to copy unchanged.
    extra_files: list[Path]


# Leaves whose first axis is the layer; a merge reads and writes them one layer at a time.
_STACKED = re.compile(r"(vision|resampler|llama)/(.*/)?blocks/")
# (field of config.model, its value in the files, its value in the config, regex of its leaves)
Override = tuple[str, Any, Any, str]


class ImportPlan(NamedTuple):
    """What an import will write."""

    config: ConfigDict
    parts: list[Part]
    # All leaves that are written, by path.
    leaves: dict[str, jax.ShapeDtypeStruct]
    # Paths of the model's leaves that no source has.
    left_out: list[str]
    # Fields of config.model that the sources do not determine; they keep the default values.
    assumed: list[str]
    # Fields in which the files override the given config.
    overrides: list[Override]


class Misfit(UserError):
    """Some tensors do not fit; `lines` has one line for each."""

    def __init__(self, problems: list[tuple[str, str]]):
        self.lines = [f"{where}: {line}" for where, line in problems]
        counts = []
        for kind in ("missing", "unexpected", "misshapen", "not a float"):
            count = sum(line.startswith(kind) for _, line in problems)
            if count:
                counts.append(f"{count} {kind}")
        first = " ".join(self.lines[0].split())
        super().__init__(f"the tensors do not fit: {', '.join(counts)}; the first: {first}")


def make_plan(
    sources: list[tuple[str, list[str]]],
    c: ConfigDict,
    *,
    given: bool,
    image_size: int | None = None,
) -> ImportPlan:
    """Plan the import of [(family, files or folders)] into the model of `c`.

    given: whether the user chose `c`, so that the sources must agree with it; otherwise their sizes
    are written into it. image_size: interpolate position embeddings to images of this size. Raises
    Misfit, which lists every tensor that does not fit, and UserError for other bad input.
    """
    # An import is not quantised and has no moving average.
    c.model.lora.storage = ""
    c.optim.ema = 0.0
    keep_lora = c.model.lora.rank > 0
    found: list[Source] = []
    for name, paths in sources:
        found += _open(name, paths, keep_lora=keep_lora)
    if image_size:
        c.model.vision.image = image_size
    assumed: list[str] = []
    overrides: list[Override] = []
    for source in found:
        fields = _infer(source)
        if image_size:
            fields.pop("vision.image", None)
        if given:
            overrides += _check_agreement(c, source, fields)
        else:
            assumed += _adopt(c, source, fields)
    if image_size:
        _check_image_size(c, found, image_size)
    parts, shapes = _make_parts(c, found, image_size)
    leaves = {
        path: jax.ShapeDtypeStruct(shapes[path], dtype)
        for part in parts
        for path, dtype in part.dtypes.items()
    }
    left_out = [path for path in shapes if path not in leaves]
    return ImportPlan(c, parts, leaves, left_out, assumed, overrides)


def _check_image_size(c: ConfigDict, found: list[Source], image_size: int) -> None:
    has_encoder = any(eva_clip.POSITIONS in source.tensors for source in found)
    if image_size % c.model.vision.patch or not has_encoder:
        raise UserError(
            f"--image-size={image_size} must be a multiple of the patch of "
            f"{c.model.vision.patch}, and a source must have an encoder"
        )


def _make_parts(
    c: ConfigDict, found: list[Source], image_size: int | None
) -> tuple[list[Part], dict[str, tuple[int, ...]]]:
    """Match each source with its table: (parts, shapes of all leaves of the model)."""
    shapes: dict[str, tuple[int, ...]] = {}
    parts: list[Part] = []
    # Leaf -> the source that has it.
    homes: dict[str, str] = {}
    problems: list[tuple[str, str]] = []
    for family, tensors, foreign in found:
        try:
            model_config = family.make_config(c.model.to_dict())
            shapes |= family.shapes(model_config)
        except (TypeError, ValueError, ArithmeticError) as error:
            reason = " ".join(str(error).split())
            raise UserError(
                f"{foreign.where}: no model of these sizes is possible: {reason}"
            ) from error
        if image_size and eva_clip.POSITIONS in tensors:
            tensors = eva_clip.resized(tensors, image_size // c.model.vision.patch)
        table = family.table(model_config)
        if misfits := convert.problems(table, tensors, shapes):
            problems += [(foreign.where, line) for line in misfits]
            continue
        dtypes = convert.dtypes(table, tensors)
        if twice := [path for path in dtypes if path in homes]:
            raise UserError(
                f"{twice[0].split('/')[0]} comes from {homes[twice[0]]} and from {foreign.where}; "
                "remove one of them"
            )
        homes |= dict.fromkeys(dtypes, foreign.where)
        extra = [foreign.folder / name for name in family.extra_files]
        extra = [path for path in extra if path.is_file()]
        parts.append(Part(family, foreign.where, tensors, table, dtypes, extra))
    if problems:
        raise Misfit(problems)
    return parts, shapes


def write(plan: ImportPlan, to: str) -> None:
    """Write the checkpoint of a plan, with its config, to the directory `to`.

    Raises UserError if that fails, and then leaves no files behind.
    """
    needed = sum(leaf.size * leaf.dtype.itemsize for leaf in plan.leaves.values())
    folder = Path(to).absolute()
    free = shutil.disk_usage(
        next(parent for parent in (folder, *folder.parents) if parent.exists())
    ).free
    if needed > free:
        raise UserError(
            f"{to} needs {needed / 2**30:.1f} GiB and the disk has {free / 2**30:.1f} GiB"
        )
    stacked = set().union(*(convert.stacked(part.table) for part in plan.parts))
    with checkpoint.param_writer(to, plan.leaves, stacked, config.to_dict(plan.config)) as put:
        for part in plan.parts:
            needs = convert.uses(part.table, importing=True)
            bar = tqdm(
                desc=part.family.name,
                total=sum(map(len, needs.values())),
                unit="leaf",
                disable=None,
            )
            for path, layer, piece in convert.pieces(part.table, part.tensors):
                put(path, layer, piece.astype(part.dtypes[path], copy=False))
                bar.update()
                # Free the piece before the next one is read.
                del piece
            bar.close()
            for path in part.extra_files:
                shutil.copyfile(path, folder / path.name)


def export(
    name: str,
    directory: str,
    to: str,
    *,
    ema: bool = False,
    dtype: str | None = None,
    shard: int = files.SHARD,
) -> dict[str, int]:
    """Write a checkpoint in a family's format to the new folder `to`; returns {file: bytes}.

    ema: export the moving averages of the weights. dtype: that of the tensors; None: the
    checkpoint's. shard: maximum bytes of a file. Raises UserError for a damaged checkpoint or one
    without the family's parameters, and then leaves no files behind.
    """
    family = FAMILIES[name]
    folder = Path(to).absolute()
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{to} exists and is not empty; choose another directory")
    # The family `peft` takes the LoRA itself. All other families take matrices with it merged.
    reader = checkpoint.ParamReader if family is peft.FAMILY else MergedReader
    source = reader(directory, ema=ema)
    model = config.from_dict(source.config["model"]).to_dict()
    ours = {path: shape for path, (_, shape) in source.shapes.items()}
    try:
        table = family.table(family.make_config(model))
        shapes = convert.foreign_shapes(table, ours)
    except UserError as error:
        raise UserError(f"{directory} does not hold a complete {name}: {error}") from error
    # This can only be the family `peft`, if the model has no LoRA.
    if not shapes:
        raise UserError(f"{directory} holds no LoRA")
    dtypes = _dtypes(table, source, dtype)
    layout = {tensor: (shape, dtypes[tensor]) for tensor, shape in shapes.items()}
    part = part_of(folder)
    try:
        part.mkdir(parents=True)
        for component in family.components or ("",):
            (part / component).mkdir(exist_ok=True)
            _write_tensors(part / component, family, component, layout, table, source, shard)
        _write_json(part, family, model, source.config["data"]["tokens"], dtypes)
        source.check()
        commit(part, folder)
    except OSError as error:
        raise UserError(f"{to} could not be written: {error}; nothing is left of it") from error
    finally:
        shutil.rmtree(part, ignore_errors=True)
    written = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    return {str(path.relative_to(folder)): path.stat().st_size for path in written}


def _write_tensors(
    folder: Path,
    family: Family,
    component: str,
    layout: files.Layout,
    table: Table,
    source: "checkpoint.ParamReader | MergedReader",
    shard: int,
) -> None:
    """Write the tensors of a component into `folder`, without its prefix; "" for all tensors."""
    prefix = f"{component}." if component else ""
    layout = {
        tensor.removeprefix(prefix): entry
        for tensor, entry in layout.items()
        if tensor.startswith(prefix)
    }

    def arrays() -> Iterator[tuple[str, np.ndarray]]:
        bar = tqdm(desc=component or family.name, total=len(layout), unit="tensor", disable=None)
        for tensor, array in convert.to_theirs(table, source.read, prefix):
            tensor = tensor.removeprefix(prefix)
            _, dtype = layout[tensor]
            yield tensor, array.astype(dtype, copy=False)
            bar.update()
        bar.close()

    files.write(folder, family.stem, layout, arrays(), shard, bare=family.stem != "model")


def _write_json(
    folder: Path,
    family: Family,
    model: dict[str, Any],
    tokens: int,
    dtypes: dict[str, np.dtype],
) -> None:
    """Write the JSON files that the family's library needs next to the tensors."""
    contents = family.config_json(model, tokens)
    if family.stem == "model":
        widest = max(dtypes.values(), key=lambda dtype: dtype.itemsize)
        contents = {"config.json": contents | {"torch_dtype": str(widest)}}
    for file, values in contents.items():
        path = folder / file
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps(values, indent=1) + "\n")


class MergedReader:
    """Reads the parameters of a checkpoint with LoRA merged and matrices dequantized.

    It has the interface of checkpoint.ParamReader.
    """

    def __init__(self, directory: str, *, ema: bool = False):
        self._source = checkpoint.ParamReader(directory, ema=ema)
        self.config = copy.deepcopy(self._source.config)
        model = self.config["model"]
        fields = model.get("lora", {})
        self._lora = LoraConfig(**config.from_dict(fields).to_dict())
        model["lora"] = fields | {"rank": 0, "storage": ""}
        compute = np.dtype(jnp.dtype(model["compute"]))
        # Matrix -> the path of its quantized codes.
        self._codes: dict[str, str] = {}
        self.shapes: dict[str, tuple[np.dtype, tuple[int, ...]]] = {}
        for path, (dtype, shape) in self._source.shapes.items():
            if path.endswith(sharding.QUANTIZED):
                matrix = sharding.matrix_path(path)
                self._codes[matrix] = path
                # Each byte holds two NF4 codes.
                codes = shape[-1] * (2 if path.endswith("nf4") else 1)
                self.shapes[matrix] = compute, (*shape[:-1], codes)
            elif not path.endswith(("/absmax", "/a", "/b")):
                self.shapes[path] = dtype, shape

    @property
    def has_parts(self) -> bool:
        """Whether some matrix has LoRA, or is stored as codes."""
        return self._source.shapes.keys() != self.shapes.keys()

    def read(self, path: str, layer: int | None) -> np.ndarray:
        """Read a leaf, or its slice `layer`, merged and dequantized."""
        read = partial(self._source.read, layer=layer)
        dtype, _ = self.shapes[path]
        stem = path.removesuffix("/w")
        if path in self._codes:
            codes = jnp.asarray(read(self._codes[path]))
            w = lora.Quantized(codes, jnp.asarray(read(f"{stem}/absmax")))
        else:
            w = read(path)
        if path.endswith("/w") and f"{stem}/a" in self._source.shapes:
            merged = lora.merge(self._lora, w, read(f"{stem}/a"), read(f"{stem}/b"))
            return np.asarray(merged).astype(dtype)
        return np.asarray(w.dequantize(dtype)) if isinstance(w, lora.Quantized) else w

    def check(self) -> None:
        """Raise UserError if a leaf that was read in full differs from what was saved."""
        self._source.check()


def merge(directory: str, to: str) -> None:
    """Write the model in `directory` to `to`, with LoRA merged and matrices dequantized.

    Raises UserError if that fails, and then leaves no files behind.
    """
    source = MergedReader(directory)
    if not source.has_parts:
        raise UserError(
            f"{directory} has no LoRA and no quantized matrices: nothing is to be merged"
        )
    leaves = {
        path: jax.ShapeDtypeStruct(shape, dtype) for path, (dtype, shape) in source.shapes.items()
    }
    stacked = {path for path in leaves if _STACKED.match(path)}
    # The merged checkpoint has no moving average.
    merged_config = source.config | {"optim": source.config["optim"] | {"ema": 0.0}}
    with checkpoint.param_writer(to, leaves, stacked, merged_config) as put:
        for path, leaf in tqdm(leaves.items(), "merge", unit="leaf", disable=None):
            layers = range(leaf.shape[0]) if path in stacked else [None]
            for layer in layers:
                put(path, layer, source.read(path, layer))
        source.check()


def summary(plan: ImportPlan) -> Iterator[str]:
    """Yield lines that describe an import, tower by tower, and what it leaves out."""
    for part in plan.parts:
        for tower in dict.fromkeys(path.split("/")[0] for path in part.dtypes):
            leaves = [plan.leaves[path] for path in part.dtypes if path.split("/")[0] == tower]
            size = sum(leaf.size for leaf in leaves)
            dtypes = ", ".join(sorted({str(leaf.dtype) for leaf in leaves}))
            origin = f"{part.family.name} {part.where}"
            yield f"{tower:14}{size:>16,} parameters  {dtypes}  from {origin}"
        needed = convert.uses(part.table, importing=True)
        unused = [name for name in part.tensors if name not in needed]
        if unused:
            more = ", ..." if len(unused) > 4 else ""
            yield (
                f"not used: {len(unused)} tensors of {part.where}: {', '.join(unused[:4])}{more}"
            )
    for tower in dict.fromkeys(path.split("/")[0] for path in plan.left_out):
        missing = [path for path in plan.left_out if path.startswith(f"{tower}/")]
        complete = not any(path.startswith(f"{tower}/") for path in plan.leaves)
        what = tower if complete else ", ".join(missing)
        yield f"left out, initialised by training: {what}"
    for field, theirs, ours, regex in plan.overrides:
        fresh = [path for path in plan.leaves if re.fullmatch(regex, path)]
        yield (
            f"{field} is {theirs} in the files and {ours} in the config: the import has {theirs}, "
            f"and training with {ours} initialises {len(fresh)} leaves: {', '.join(fresh)}"
        )
    if plan.assumed:
        yield (
            "not determined by the files, so taken from the default config: "
            f"{', '.join(plan.assumed)}"
        )


def _open(name: str, paths: list[str], *, keep_lora: bool) -> list[Source]:
    """Open the files of a family as one source, or as two for a chat model whose LoRA is kept.

    Raises UserError, which suggests the right family, if they belong to another one.
    """
    family = FAMILIES[name]
    _check_components(family, paths)
    foreign = _open_files(paths)
    likely = guess({emu1.rename(tensor) for tensor in foreign.tensors})
    if likely is not family:
        raise UserError(_wrong_family(family, likely, foreign))
    if family is emu1.FAMILY and keep_lora:
        plain, adapter = emu1.split_lora(foreign.tensors)
        found = [Source(family, plain, foreign)]
        if adapter:
            part = files.Foreign(adapter, {}, foreign.where, foreign.folder)
            found.append(Source(peft.FAMILY, adapter, part))
        return found
    return [Source(family, family.canonical(foreign.tensors), foreign)]


def _has_component(paths: list[str], component: str) -> bool:
    return len(paths) == 1 and (Path(paths[0]) / component).is_dir()


def _check_components(family: Family, paths: list[str]) -> None:
    """Raise UserError if a family with components is not given one complete folder."""
    names = " and ".join(family.components)
    if family.components and len(paths) > 1:
        raise UserError(
            f"--family={family.name} takes one folder, with {names} in it, not {' '.join(paths)}"
        )
    missing = [name for name in family.components if not _has_component(paths, name)]
    # A folder with none of the components is of another family, which is reported later.
    if missing and len(missing) < len(family.components):
        raise UserError(f"{paths[0]} has no folder {missing[0]}; {family.name} needs {names}")


def _open_files(paths: list[str]) -> files.Foreign:
    for family in FAMILIES.values():
        there = tuple(name for name in family.components if _has_component(paths, name))
        if there:
            return files.read_components(paths[0], there)
    return files.read(paths)


def _wrong_family(family: Family, likely: Family | None, foreign: files.Foreign) -> str:
    layout = ""
    if family.components:
        layout = f", a diffusers folder with {' and '.join(family.components)} in it"
    if likely:
        hint = f"it looks like {likely.name}: --family={likely.name}"
    else:
        names = ", ".join(list(foreign.tensors)[:3])
        hint = f"it looks like none of {', '.join(FAMILIES)}; it holds {names}, ..."
    return f"{foreign.where} is not of the family {family.name}{layout}; {hint}"


def _infer(source: Source) -> dict[str, Any]:
    """The fields of config.model that a source should determine, with None for those it lacks."""
    with _config_errors(source):
        return source.family.infer_config(_shapes(source), source.foreign.config)


def _shapes(source: Source) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in source.tensors.items()}


@contextmanager
def _config_errors(source: Source) -> Generator[None]:
    """Report any error as a fault of the source's config.json, which may contain anything."""
    try:
        yield
    except (
        UserError,
        TypeError,
        ValueError,
        AttributeError,
        LookupError,
        ArithmeticError,
    ) as error:
        raise UserError(f"{source.foreign.where}: {error}") from error


def _differences(c: ConfigDict, fields: dict[str, Any]) -> dict[str, Any]:
    """Fields whose value in the files differs from the config's, with the value in the config.

    Fields that the files do not determine are left out.
    """
    ours = {field: _field(c, field) for field, value in fields.items() if value is not None}
    return {field: value for field, value in ours.items() if value != fields[field]}


def _check_agreement(c: ConfigDict, source: Source, fields: dict[str, Any]) -> list[Override]:
    """Raise UserError if the files contradict a given config.

    The family may allow one field to differ: that field is set in `c` to the value of the files,
    and returned.
    """
    where = source.foreign.where
    differ = _differences(c, fields)
    overrides: list[Override] = []
    if source.family.may_override:
        field, leaves = source.family.may_override
        if field in differ:
            overrides.append((field, fields[field], differ.pop(field), leaves))
            _set(c, field, fields[field], where)
    if not differ:
        return overrides
    differences = ", ".join(
        f"{field} is {fields[field]!r}, not {ours!r}" for field, ours in differ.items()
    )
    first = next(iter(differ))
    flag = shlex.quote(f"--config.model.{first}={fields[first]}")
    hint = ""
    if "vision.image" in differ:
        hint = "; --image-size interpolates its position embeddings"
    raise UserError(
        f"{where} does not match the config: {differences} ({flag}, or another --config){hint}"
    )


def _adopt(c: ConfigDict, source: Source, fields: dict[str, Any]) -> list[str]:
    """Set the fields that the files determine in a default config; returns the other fields.

    Raises UserError if the files do not determine all fields of a tower whose width differs from
    the default's, because the default values of the others would not fit it.
    """
    where = source.foreign.where
    unknown = [field for field, value in fields.items() if value is None]
    open_towers = {field.split(".")[0] for field in unknown}
    for field in _differences(c, fields):
        if field.endswith(".width") and field.split(".")[0] in open_towers:
            raise UserError(
                f"{where} does not determine {', '.join(unknown)}, and has no config.json that "
                "does: give --config=FILE"
            )
    with _config_errors(source):
        defaults = source.family.default_config(_shapes(source), source.foreign.config)
    known = {field: value for field, value in fields.items() if value is not None}
    for field, value in (defaults | known).items():
        _set(c, field, value, where)
    return unknown


def _field(c: ConfigDict, field: str) -> Any:
    try:
        return reduce(getattr, field.split("."), c.model)
    except AttributeError:
        raise UserError(
            f"the config has no model.{field}, which these files need; "
            "configs/decoder.py and configs/clip.py have more fields"
        ) from None


def _set(c: ConfigDict, field: str, value: Any, where: str) -> None:
    *parents, name = field.split(".")
    try:
        reduce(getattr, parents, c.model)[name] = value
    except (TypeError, ValueError) as error:
        raise UserError(f"{where}: {field} cannot be {value!r}") from error


def _dtypes(
    table: Table, source: checkpoint.ParamReader | MergedReader, dtype: str | None
) -> dict[str, np.dtype]:
    """Dtype of each foreign tensor: `dtype`, or else the widest dtype of the leaves in it."""
    found = {}
    for name, parts in convert.uses(table, importing=False).items():
        widest = np.result_type(*(source.shapes[use.row.ours][0] for use in parts))
        found[name] = np.dtype(jnp.dtype(dtype)) if dtype else widest
    return found
