"""Documents of any kind, written as a tensorflow-datasets dataset in ArrayRecord files, with a data
card. No TensorFlow.

One unit of the input is one task and one output shard, written beside its place and renamed when
whole; metadata comes last. So a build that was killed is called again: it skips what is whole, and
the result is the same, byte by byte. Tasks run in processes here, or under any runner of Apache
Beam. Read next: card.py.
"""

import contextlib
import io
import itertools
import json
import multiprocessing
import os
import re
import shutil
import threading
import uuid
from collections import Counter
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

import tensorflow_datasets as tfds
from array_record.python.array_record_module import ArrayRecordWriter
from tensorflow_datasets.core.example_serializer import ExampleSerializer
from tensorflow_datasets.core.registered import skip_registration
from tqdm import tqdm

from emu_jax.config import UserError
from emu_jax.data import images
from emu_jax.data.builders import card
from emu_jax.data.documents import Document, Picture, Skipped, images_of, texts_of
from emu_jax.data.sources import kinds, records
from emu_jax.data.sources.options import SourceOptions
from emu_jax.data.sources.tables import InputShard

VERSION = "1.0.0"
# shards that give documents to the card
SAMPLED = 24
# how many each
SAMPLES = 2
COUNTS = ("documents", "skipped", "dropped", "images", "texts", "text_bytes", "bytes")
# of the card's estimate of tokens
BYTES_A_TOKEN = 4
IMAGE_TOKENS = 34


@dataclass(frozen=True)
class Task:
    """One shard: `unit` read as `kind`, written to `to`. `label` makes the ids of its documents
    unique in the set.
    """

    kind: str
    unit: InputShard
    label: str
    options: SourceOptions
    to: Path
    number: int
    of: int

    @property
    def shard(self) -> Path:
        return self.to / f"{self.kind}-train.array_record-{self.number:05}-of-{self.of:05}"

    @property
    def part(self) -> Path:
        """What the shard counted, for the card; written before the shard has its name."""
        return self.to / "parts" / f"{self.number:05}.json"


def build(
    kind: str,
    sources: list[Path],
    to: Path,
    options: SourceOptions,
    workers: int = 0,
    runner: str = "",
    rest: list[str] | None = None,
) -> dict[str, int]:
    """Writes the dataset into `to` and returns its counts. `workers` processes (0: one a core; 1:
    this one), or a Beam `runner` with its options `rest`.

    Raises UserError if `to` holds another build, if there is nothing to read, and if a task's
    process dies twice.
    """
    tasks = plan_tasks(kind, sources, to, options)
    (to / "parts").mkdir(exist_ok=True)
    # of a build that was killed
    for half in [*to.glob("*.new"), *(to / "parts").glob("*.new")]:
        shutil.rmtree(half) if half.is_dir() else half.unlink()
    todo = [task for task in tasks if not task.shard.exists()]
    if runner:
        _under_beam(todo, runner, rest or [])
    else:
        _here(todo, len(tasks), workers or len(os.sched_getaffinity(0)))
    return _finish(kind, sources, to, options, tasks)


def plan_tasks(kind: str, sources: list[Path], to: Path, options: SourceOptions) -> list[Task]:
    """The tasks of a build, the same whenever it is called again; `to`/plan.json holds them."""
    found = [(unit, root) for root in sources for unit in kinds.KINDS[kind].list_shards(root)]
    rows = [
        {
            "label": _label(unit, root),
            "path": str(unit.path),
            "names": len(unit.names),
            "first": unit.first,
            "bytes": unit.path.stat().st_size if unit.path.is_file() else 0,
        }
        for unit, root in found
    ]
    paths: dict[str, str] = {}
    for row in rows:
        if paths.setdefault(row["label"], row["path"]) != row["path"]:
            raise UserError(
                f"two inputs have the name '{row['label']}', and so would their documents; give the folder that holds both to --from"
            )
    wanted = json.dumps({"kind": kind, "options": asdict(options), "units": rows}, indent=1) + "\n"
    to.mkdir(parents=True, exist_ok=True)
    file = to / "plan.json"
    if file.exists() and file.read_text() != wanted:
        raise UserError(
            f"'{to}' holds a build of other input or with other settings ({file}); name another directory, or delete that one"
        )
    if not file.exists():
        # but for what a build killed right here has left
        if any(path.suffix != ".new" for path in to.iterdir()):
            raise UserError(
                f"'{to}' is not empty and holds no build of ours; name another directory"
            )
        _whole(file, wanted)
    return [
        Task(kind, unit, row["label"], options, to, number, len(found))
        for number, ((unit, _), row) in enumerate(zip(found, rows))
    ]


def _label(unit: InputShard, root: Path) -> str:
    """The first half of the ids of a unit's documents: the path of its file below `root`, without
    suffixes.
    """
    name = (
        unit.path.relative_to(root).as_posix()
        if unit.path != root and unit.path.is_relative_to(root)
        else unit.path.name
    )
    return name.split(".")[0] or name


def write(task: Task) -> None:
    """The whole of a task: the shard of its unit. What it writes depends on the task alone."""
    new = _beside(task.shard)
    features = records.features()
    serializer = ExampleSerializer(features.get_serialized_info())
    counts = Counter(dict.fromkeys(COUNTS, 0))
    skipped = Counter()
    dropped = Counter()
    samples = []
    histograms = {name: Counter() for name in ("tokens", "images", "side")}
    writer = ArrayRecordWriter(str(new), "group_size:1")
    for document in kinds.read_documents(task.kind, task.unit, task.options):
        if isinstance(document, Skipped):
            counts["skipped"] += 1
            skipped[general_reason(document.reason)] += 1
            continue
        raw = _serialized(document, task, features, serializer)
        writer.write(raw)
        _count(document, len(raw), counts, histograms)
        dropped.update(map(general_reason, document.dropped))
        if task.number < SAMPLED and len(samples) < SAMPLES:
            samples.append(card.document_card(document, 400))
    writer.close()
    counts["dropped"] = dropped.total()
    part = {
        "counts": counts,
        "skipped": skipped,
        "dropped": dropped,
        "histograms": histograms,
        "samples": samples,
    }
    _whole(task.part, json.dumps(part, sort_keys=True))
    new.replace(task.shard)


def general_reason(reason: str) -> str:
    """A reason without what differs from record to record: names and numbers."""
    return re.sub(r"\d+(?:\.\d+)?", "#", re.sub(r"'[^']*'", "'…'", reason))


def _serialized(
    document: Document,
    task: Task,
    features: tfds.features.FeaturesDict,
    serializer: ExampleSerializer,
) -> bytes:
    example = records.document_example(document, f"{task.label}/{document.id}", task.kind)
    return serializer.get_tf_example(features.encode_example(example)).SerializeToString(
        deterministic=True
    )


def _count(document: Document, size: int, counts: Counter, histograms: dict[str, Counter]) -> None:
    said = sum(len(text.text.encode()) for text in texts_of(document))
    shown = list(images_of(document))
    counts.update(
        documents=1,
        images=len(shown),
        texts=sum(1 for _ in texts_of(document)),
        text_bytes=said,
        bytes=size,
    )
    histograms["tokens"][_floor(said // BYTES_A_TOKEN + IMAGE_TOKENS * len(shown) + 2)] += 1
    histograms["images"][_floor(len(shown))] += 1
    for picture in shown:
        data = picture.data if isinstance(picture, Picture) else picture
        histograms["side"][
            _floor(min(images.header_size(data) if isinstance(data, bytes) else data.shape[:2]))
        ] += 1


def _floor(value: int) -> int:
    """The power of two at or below `value`; 0 for 0."""
    return 1 << value.bit_length() - 1 if value else 0


def _here(todo: list[Task], total: int, workers: int) -> None:
    """The tasks in processes of this machine; a shard whose process dies is tried once more,
    alone.
    """
    with tqdm(
        total=total, initial=total - len(todo), desc="shards", unit=" shards", disable=None
    ) as bar:
        if workers == 1:
            for task in todo:
                write(task)
                bar.update()
            return
        # a fork would copy the locks of our threads
        context = multiprocessing.get_context("spawn")
        for again in (False, True):
            for batch in [todo] if not again else [[task] for task in todo]:
                with (
                    contextlib.suppress(BrokenProcessPool),
                    ProcessPoolExecutor(
                        min(workers, len(batch) or 1), context, _end_with_parent
                    ) as pool,
                ):
                    for done in as_completed([pool.submit(write, task) for task in batch]):
                        done.result()
                        bar.update()
            todo = [task for task in todo if not task.shard.exists()]
            if not todo:
                return
    raise UserError(
        f"the process that reads '{todo[0].unit.path}' dies (of {todo[0].label}; a decoder crashes, or the memory is too small); "
        "the other shards are whole: mend or remove it and call again"
    )


def _end_with_parent() -> None:
    """A process of the pool whose parent was killed would wait for it for ever: it ends instead."""

    def watch(parent: int) -> None:
        wait([parent])
        os._exit(1)

    threading.Thread(
        target=watch, args=(multiprocessing.parent_process().sentinel,), daemon=True
    ).start()


def _under_beam(todo: list[Task], runner: str, rest: list[str]) -> None:
    try:
        import apache_beam as beam
        from apache_beam.options.pipeline_options import PipelineOptions
    except ImportError as error:
        raise UserError(
            "--runner needs Apache Beam: pip install -r requirements-beam.txt"
        ) from error
    try:
        with beam.Pipeline(runner=runner, options=PipelineOptions(rest)) as pipeline:
            _ = pipeline | beam.Create(todo) | beam.Reshuffle() | beam.Map(write)
    # an unknown runner, a missing option of it
    except ValueError as error:
        raise UserError(f"--runner={runner}: {' '.join(str(error).split())}") from error


class _Documents(tfds.core.GeneratorBasedBuilder):
    """What tensorflow-datasets knows of the set: the features and who wrote them."""

    VERSION = tfds.core.Version(VERSION)

    def _info(self):
        return tfds.core.DatasetInfo(
            builder=self,
            features=records.features(),
            description=__doc__,
            metadata=tfds.core.MetadataDict(records.METADATA),
        )

    def _split_generators(self, dl_manager):
        raise UserError("the shards are written by emu_jax.data.builders.build")

    def _generate_examples(self):
        raise NotImplementedError


def _finish(
    kind: str, sources: list[Path], to: Path, options: SourceOptions, tasks: list[Task]
) -> dict[str, int]:
    """Card, features and, last of all, dataset_info.json, by which a dataset is known to be
    whole.
    """
    parts = [json.loads(task.part.read_text()) for task in tasks]
    summary = summed(kind, [str(path) for path in sources], to.name, options, parts)
    if not summary["counts"]["documents"]:
        raise UserError(
            f"no record became a document: {'; '.join(f'{count} x {reason}' for reason, count in list(summary['skipped'].items())[:3])}"
        )
    _whole(to / "card.json", json.dumps(summary, indent=1, ensure_ascii=False) + "\n")
    _whole(
        to / "card.html",
        card.page(
            summary,
            list(itertools.chain.from_iterable(part["samples"] for part in parts))[: 2 * SAMPLED],
        ),
    )
    if not (to / "dataset_info.json").exists():
        _describe(kind, to, tasks, [part["counts"] for part in parts])
    return summary["counts"]


def summed(
    kind: str, sources: list[str], name: str, options: SourceOptions, parts: list[dict[str, Any]]
) -> dict[str, Any]:
    """The card's numbers: the sums of what the shards counted."""

    def total(*path: str) -> Counter:
        sums: Counter = Counter()
        for part in parts:
            for key in path:
                part = part[key]
            sums.update(part)
        return sums

    def ranked(counts: Counter) -> dict[str, int]:
        return dict(sorted(counts.items(), key=lambda item: (-item[1], item[0])))

    counts = {name: total("counts")[name] for name in COUNTS} | {"shards": len(parts)}
    histograms = {
        name: dict(sorted(total("histograms", name).items(), key=lambda item: int(item[0])))
        for name in ("tokens", "images", "side")
    }
    return {
        "name": name,
        "kind": kind,
        "from": sources,
        "counts": counts,
        "skipped": ranked(total("skipped")),
        "dropped": ranked(total("dropped")),
        "histograms": histograms,
        "settings": asdict(options),
    }


def _describe(kind: str, to: Path, tasks: list[Task], counts: list[dict[str, int]]) -> None:
    new = to / "metadata.new"
    new.mkdir(exist_ok=True)
    # its name is the kind's, and a process may build two of a kind
    with skip_registration():
        builder = type(kind.capitalize(), (_Documents,), {"name": kind})(
            data_dir=str(new / "of"), file_format="array_record"
        )
    template = tfds.core.ShardedFileTemplate(
        data_dir=to, dataset_name=kind, split="train", filetype_suffix="array_record"
    )
    split = tfds.core.splits.SplitInfo(
        name="train",
        shard_lengths=[count["documents"] for count in counts],
        num_bytes=sum(count["bytes"] for count in counts),
        filename_template=template,
    )
    builder.info.set_splits(tfds.core.splits.SplitDict([split]))
    with contextlib.redirect_stdout(io.StringIO()):
        builder.info.write_to_directory(new)
    for file in sorted(
        new.iterdir(), key=lambda file: (file.name == "dataset_info.json", file.name)
    ):
        if file.is_file():
            file.replace(to / file.name)
    with contextlib.suppress(OSError):
        new.rmdir()


def _beside(file: Path) -> Path:
    """Where a file is written before it has its name: no two processes write the same, for one may
    have outlived a build that was killed.
    """
    return file.with_name(f"{file.name}.{uuid.uuid4().hex}.new")


def _whole(file: Path, text: str) -> None:
    """Writes a file so that it is there whole or not at all."""
    new = _beside(file)
    new.write_text(text, encoding="utf-8")
    new.replace(file)
