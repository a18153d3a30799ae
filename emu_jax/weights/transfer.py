"""Foreign checkpoints into ours and ours into theirs, one tensor at a time.

An import writes a checkpoint that `config.init=DIR` starts from; the towers that no source fills
are left out of it, and are fresh there. An export writes what the family's own library loads. Read
next: convert.py, ../checkpoint.py.
"""

import copy
import json
import re
import shlex
import shutil
from collections.abc import Iterator
from functools import reduce
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from ml_collections import ConfigDict
from tqdm import tqdm

from emu_jax import checkpoint, config, sharding
from emu_jax.config import UserError
from emu_jax.models import lora
from emu_jax.models.lora import LoraConfig
from emu_jax.weights import convert, emu1, eva_clip, files, peft
from emu_jax.weights.convert import Table
from emu_jax.weights.families import FAMILIES, guess
from emu_jax.weights.family import Family


class Part(NamedTuple):
    """One family's share of an import: its tensors under the table's names, and what they
    become.
    """

    family: Family
    where: str
    tensors: dict[str, Any]
    table: Table
    # of our leaves
    dtypes: dict[str, np.dtype]
    # files that go along as they are
    carried: list[Path]


class ImportPlan(NamedTuple):
    config: ConfigDict
    parts: list[Part]
    # all that is written, flat
    leaves: dict[str, jax.ShapeDtypeStruct]
    # leaves of the model that no source fills
    left_out: list[str]
    # fields of config.model that are the default config's, for the sources do not say
    assumed: list[str]
    # (field of config.model, its value in the files, in the given config, regex of its leaves)
    adapted: list[tuple[str, Any, Any, str]]


def make_plan(
    sources: list[tuple[str, list[str]]],
    c: ConfigDict,
    *,
    given: bool,
    image_size: int | None = None,
) -> ImportPlan:
    """What an import of [(family, files or folders)] into the model of `c` would do. Where `c` was
    `given`, the sources must agree with it; otherwise what they say of their towers is taken.
    image_size: interpolate the position embeddings to it.

    Raises Misfit, which lists every tensor that is missing, unexpected or misshapen, and UserError
    for all else.
    """
    # what comes in is whole; a run that starts from it rounds it
    c.model.lora.storage = ""
    found = [
        part
        for name, where in sources
        for part in _read(name, where, keep_lora=c.model.lora.rank > 0)
    ]
    if image_size:
        c.model.vision.image = image_size
    shapes = [
        {name: tuple(tensor.shape) for name, tensor in tensors.items()} for _, tensors, _ in found
    ]
    agreed = [
        _agree(c, family, those, foreign, given, image_size)
        for (family, _, foreign), those in zip(found, shapes)
    ]
    # what comes in has no average
    c.optim.ema = 0.0
    if image_size and (
        image_size % c.model.vision.patch
        or not any(eva_clip.POSITIONS in those for those in shapes)
    ):
        raise UserError(
            f"--image-size={image_size} must be a multiple of the patch of {c.model.vision.patch}, and a source must have an encoder"
        )
    ours: dict[str, tuple[int, ...]] = {}
    parts = []
    homes = {}
    problems = []
    for family, tensors, foreign in found:
        try:
            size = family.make_config(c.model.to_dict())
            ours |= family.shapes(size)
        except (TypeError, ValueError, ArithmeticError) as error:
            raise UserError(
                f"{foreign.where}: a model of such sizes cannot be: {' '.join(str(error).split())}"
            ) from error
        if image_size and eva_clip.POSITIONS in tensors:
            tensors = eva_clip.resized(tensors, image_size // c.model.vision.patch)
        table = family.table(size)
        if misfits := convert.problems(table, tensors, ours):
            problems += [(foreign.where, line) for line in misfits]
            continue
        carried = [path for name in family.extra_files if (path := foreign.folder / name).is_file()]
        part = Part(family, foreign.where, tensors, table, convert.dtypes(table, tensors), carried)
        if twice := [path for path in part.dtypes if path in homes]:
            raise UserError(
                f"{twice[0].split('/')[0]} comes from {homes[twice[0]]} and from {foreign.where}; one of them must go"
            )
        homes |= dict.fromkeys(part.dtypes, foreign.where)
        parts.append(part)
    if problems:
        raise Misfit(problems)
    leaves = {
        path: jax.ShapeDtypeStruct(ours[path], dtype)
        for part in parts
        for path, dtype in part.dtypes.items()
    }
    assumed, adapted = ([line for lines in column for line in lines] for column in zip(*agreed))
    return ImportPlan(
        c, parts, leaves, [path for path in ours if path not in leaves], assumed, adapted
    )


class Misfit(UserError):
    """Tensors that do not fit, a line each in `lines`."""

    def __init__(self, problems: list[tuple[str, str]]):
        counts = {
            kind: sum(line.startswith(kind) for _, line in problems)
            for kind in ("missing", "unexpected", "misshapen", "not a float")
        }
        self.lines = [f"{where}: {line}" for where, line in problems]
        super().__init__(
            f"the tensors do not fit: {', '.join(f'{count} {kind}' for kind, count in counts.items() if count)}; "
            f"the first: {' '.join(self.lines[0].split())}"
        )


def write(made: ImportPlan, to: str) -> None:
    """Carries a plan out: a checkpoint with the resolved config in `to`. Raises UserError, and then
    nothing is left of it.
    """
    needed = sum(leaf.size * leaf.dtype.itemsize for leaf in made.leaves.values())
    folder = Path(to).absolute()
    free = shutil.disk_usage(
        next(parent for parent in (folder, *folder.parents) if parent.exists())
    ).free
    if needed > free:
        raise UserError(
            f"{to} needs {needed / 2**30:.1f} GiB and the disk has {free / 2**30:.1f} GiB"
        )
    stacked = set().union(*(convert.stacked(part.table) for part in made.parts))
    with checkpoint.param_writer(to, made.leaves, stacked, config.to_dict(made.config)) as put:
        for part in made.parts:
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
                # before the next is read
                del piece
            bar.close()
            for path in part.carried:
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
    """Writes the family's tensors in the checkpoint in `directory` into the new folder `to`; {file:
    bytes}. ema: averaged. dtype: cast to it. Raises UserError for a checkpoint without them, or
    damaged, and then nothing is left.
    """
    family = FAMILIES[name]
    folder = Path(to).absolute()
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{to} is there and not empty; choose another directory")
    source = (
        checkpoint.ParamReader(directory, ema=ema)
        if family is peft.FAMILY
        else Merged(directory, ema=ema)
    )
    model = config.from_dict(source.config["model"]).to_dict()
    try:
        table = family.table(family.make_config(model))
        shapes = convert.foreign_shapes(
            table, {path: shape for path, (_, shape) in source.shapes.items()}
        )
    except UserError as error:
        raise UserError(f"{directory} holds no whole {name}: {error}") from error
    # of an adapter
    if not shapes:
        raise UserError(f"{directory} holds no LoRA")
    kinds = _dtypes(table, source, dtype)
    half = folder.with_name(f".{folder.name}.half")
    shutil.rmtree(half, ignore_errors=True)
    half.mkdir(parents=True)
    try:
        said = family.config_json(model, source.config["data"]["tokens"])
        for component in family.components or ("",):
            prefix = f"{component}." if component else ""
            layout = {
                tensor.removeprefix(prefix): (shape, kinds[tensor])
                for tensor, shape in shapes.items()
                if tensor.startswith(prefix)
            }
            arrays = convert.to_theirs(table, source.read, prefix)
            bar = tqdm(
                arrays, desc=component or name, total=len(layout), unit="tensor", disable=None
            )
            cast = (
                (tensor.removeprefix(prefix), array.astype(kinds[tensor], copy=False))
                for tensor, array in bar
            )
            (half / component).mkdir(exist_ok=True)
            files.write(
                half / component, family.stem, layout, cast, shard, bare=family.stem != "model"
            )
        if family.stem == "model":
            kind = max((kind for _, kind in layout.values()), key=lambda kind: kind.itemsize)
            said = {"config.json": said | {"torch_dtype": str(kind)}}
        for file, values in said.items():
            (half / file).parent.mkdir(exist_ok=True)
            (half / file).write_text(json.dumps(values, indent=1) + "\n")
        source.check()
        if folder.exists():
            folder.rmdir()
        half.rename(folder)
    except OSError as error:
        raise UserError(f"{to} could not be written: {error}; nothing is left of it") from error
    finally:
        shutil.rmtree(half, ignore_errors=True)
    return {
        str(path.relative_to(folder)): path.stat().st_size
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


class Merged:
    """The parameters in a checkpoint as those of a model without LoRA and with plain matrices; read
    like checkpoint.ParamReader.
    """

    def __init__(self, directory: str, *, ema: bool = False):
        self._source = checkpoint.ParamReader(directory, ema=ema)
        self.config = copy.deepcopy(self._source.config)
        self._size = LoraConfig(**config.from_dict(self.config["model"].get("lora", {})).to_dict())
        self.config["model"]["lora"] = self.config["model"].get("lora", {}) | {
            "rank": 0,
            "storage": "",
        }
        # matrix -> its codes
        self._codes: dict[str, str] = {}
        self.shapes: dict[str, tuple[np.dtype, tuple[int, ...]]] = {}
        for path, (dtype, shape) in self._source.shapes.items():
            if path.endswith(sharding.QUANTIZED):
                self._codes[sharding.matrix_path(path)] = path
                shape = (*shape[:-1], shape[-1] * (2 if path.endswith("nf4") else 1))
                self.shapes[sharding.matrix_path(path)] = (
                    np.dtype(jax.numpy.dtype(self.config["model"]["compute"])),
                    shape,
                )
            elif not path.endswith(("/absmax", "/a", "/b")):
                self.shapes[path] = dtype, shape

    def read(self, path: str, layer: int | None) -> np.ndarray:
        where = path.removesuffix("/w")
        read = self._source.read
        w = (
            lora.Quantized(read(self._codes[path], layer), read(f"{where}/absmax", layer))
            if path in self._codes
            else read(path, layer)
        )
        if path.endswith("/w") and f"{where}/a" in self._source.shapes:
            return np.asarray(
                lora.merge(self._size, w, read(f"{where}/a", layer), read(f"{where}/b", layer))
            ).astype(self.shapes[path][0])
        return np.asarray(w.dequantize(self.shapes[path][0])) if path in self._codes else w

    def check(self) -> None:
        self._source.check()


def merge(directory: str, to: str) -> None:
    """A checkpoint in `to` of the same model without LoRA and with plain matrices. Raises
    UserError, and then nothing is left of it.
    """
    source = Merged(directory)
    leaves = {
        path: jax.ShapeDtypeStruct(shape, dtype) for path, (dtype, shape) in source.shapes.items()
    }
    stacked = {
        path
        for path in leaves
        if path.split("/")[0] in ("vision", "resampler", "llama") and "/blocks/" in path
    }
    # what is written has no average
    told = source.config | {"optim": source.config["optim"] | {"ema": 0.0}}
    with checkpoint.param_writer(to, leaves, stacked, told) as put:
        for path, leaf in tqdm(leaves.items(), "merge", unit="leaf", disable=None):
            for layer in range(leaf.shape[0]) if path in stacked else [None]:
                put(path, layer, source.read(path, layer))
        source.check()


def summary(made: ImportPlan) -> Iterator[str]:
    """Lines that say what an import brings, tower by tower, and what it does not."""
    for part in made.parts:
        for tower in dict.fromkeys(path.split("/")[0] for path in part.dtypes):
            mine = [made.leaves[path] for path in part.dtypes if path.split("/")[0] == tower]
            kinds = ", ".join(sorted({str(leaf.dtype) for leaf in mine}))
            yield f"{tower:14}{sum(leaf.size for leaf in mine):>16,} parameters  {kinds}  from {part.family.name} {part.where}"
        needs = convert.uses(part.table, importing=True)
        idle = [name for name in part.tensors if name not in needs]
        if idle:
            yield f"not used: {len(idle)} tensors of {part.where}: {', '.join(idle[:4])}{', ...' if len(idle) > 4 else ''}"
    for tower in dict.fromkeys(path.split("/")[0] for path in made.left_out):
        mine = [path for path in made.left_out if path.startswith(f"{tower}/")]
        whole = not any(path.startswith(f"{tower}/") for path in made.leaves)
        yield f"left out, fresh where training starts from it: {tower if whole else ', '.join(mine)}"
    for field, theirs, ours, leaves in made.adapted:
        fresh = [path for path in made.leaves if re.fullmatch(leaves, path)]
        yield (
            f"{field} is {theirs} in the files and {ours} in the config: theirs is kept, and where training starts from it with {ours}, "
            f"{len(fresh)} leaves are fresh: {', '.join(fresh)}"
        )
    if made.assumed:
        yield f"not said by the files, and as in the default config: {', '.join(made.assumed)}"


def _read(
    name: str, where: list[str], *, keep_lora: bool
) -> list[tuple[Family, dict[str, Any], files.Foreign]]:
    """The sources of a family as its part; a chat model, of which LoRA is to be kept, as two.
    Raises UserError, which guesses the right family, where they are another's.
    """
    family = FAMILIES[name]
    if family.components and len(where) > 1:
        raise UserError(
            f"--family={name} takes one folder, with {' and '.join(family.components)} in it, not {' '.join(where)}"
        )

    def there(components):
        return [
            component
            for component in components
            if len(where) == 1 and (Path(where[0]) / component).is_dir()
        ]

    if there(family.components) and (
        lacking := [
            component
            for component in family.components
            if component not in there(family.components)
        ]
    ):
        raise UserError(
            f"{where[0]} has no folder {lacking[0]}; a {name} needs {' and '.join(family.components)}"
        )
    apart = next((other.components for other in FAMILIES.values() if there(other.components)), ())
    foreign = files.read_components(where[0], apart) if apart else files.read(where)
    likely = guess({emu1.rename(tensor) for tensor in foreign.tensors})
    if likely is not family:
        like = (
            f"it looks like {likely.name}: --family={likely.name}"
            if likely
            else f"it looks like none of {', '.join(FAMILIES)}; it holds {', '.join(list(foreign.tensors)[:3])}, ..."
        )
        layout = (
            f", which is a folder of diffusers' with {' and '.join(family.components)} in it"
            if family.components
            else ""
        )
        raise UserError(f"{foreign.where} is not of the family {name}{layout}; {like}")
    if family is emu1.FAMILY and keep_lora:
        plain, adapter = emu1.split_lora(foreign.tensors)
        return [
            (family, plain, foreign),
            *(
                [(peft.FAMILY, adapter, files.Foreign(adapter, {}, foreign.where, foreign.folder))]
                if adapter
                else []
            ),
        ]
    return [(family, family.canonical(foreign.tensors), foreign)]


def _agree(
    c: ConfigDict,
    family: Family,
    shapes: dict[str, tuple[int, ...]],
    foreign: files.Foreign,
    given: bool,
    image_size: int | None,
) -> tuple[list[str], list[tuple[str, Any, Any, str]]]:
    """What the files say of the model against the config, or into it where none was given: then,
    the fields of which they say nothing; and what of a given config gives way (ImportPlan.adapted).
    """
    try:
        said = family.infer_config(shapes, foreign.config)
        guessed = family.default_config(shapes, foreign.config)
    # a config.json may say anything
    except (
        UserError,
        TypeError,
        ValueError,
        AttributeError,
        LookupError,
        ArithmeticError,
    ) as error:
        raise UserError(f"{foreign.where}: {error}") from error
    if image_size:
        said.pop("vision.image", None)
    known = {field: value for field, value in said.items() if value is not None}
    differ = {field: ours for field, value in known.items() if (ours := _field(c, field)) != value}
    adapted = [
        (field, known[field], differ.pop(field), leaves)
        for field, leaves in filter(None, [family.may_override])
        if given and field in differ
    ]
    for field, theirs, _, _ in adapted:
        _set(c, field, theirs, foreign.where)
    if given and differ:
        differences = ", ".join(
            f"{field} is {known[field]!r}, not {ours!r}" for field, ours in differ.items()
        )
        first = next(iter(differ))
        raise UserError(
            f"{foreign.where} is of another model than the config: {differences}"
            + f" ({shlex.quote(f'--config.model.{first}={known[first]}')}, or another --config)"
            + (
                "; --image-size interpolates its position embeddings"
                if "vision.image" in differ
                else ""
            )
        )
    if given:
        return [], adapted
    unknown = [field for field in said if field not in known]
    other = [
        field
        for field in differ
        if field.endswith(".width")
        and any(lacking.split(".")[0] == field.split(".")[0] for lacking in unknown)
    ]
    if other:
        raise UserError(
            f"{foreign.where} does not say {', '.join(unknown)}, and has no config.json that does: give --config=FILE"
        )
    for field, value in (guessed | known).items():
        _set(c, field, value, foreign.where)
    return unknown, []


def _field(c: ConfigDict, field: str) -> Any:
    try:
        return reduce(getattr, field.split("."), c.model)
    except AttributeError:
        raise UserError(
            f"the config has no model.{field}, which these files fill (configs/decoder.py and configs/clip.py have more)"
        ) from None


def _set(c: ConfigDict, field: str, value: Any, where: str) -> None:
    *parents, name = field.split(".")
    try:
        reduce(getattr, parents, c.model)[name] = value
    except (TypeError, ValueError) as error:
        raise UserError(f"{where}: {field} cannot be {value!r}") from error


def _dtypes(
    table: Table, source: checkpoint.ParamReader | Merged, dtype: str | None
) -> dict[str, np.dtype]:
    """The dtype of each foreign tensor: as our leaves have it, or `dtype`."""
    return {
        name: np.dtype(jax.numpy.dtype(dtype))
        if dtype
        else np.result_type(*(source.shapes[use.row.ours][0] for use in parts))
        for name, parts in convert.uses(table, importing=False).items()
    }
