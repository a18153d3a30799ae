"""Write documents of any kind as a dataset of ArrayRecord files with a data card.

tensorflow-datasets can read the dataset; neither side needs TensorFlow.

One task reads one input shard and writes one output shard, atomically; metadata is written last.
To resume a killed build, run it again: it skips finished shards, and the result is the same byte
for byte. Tasks run in local processes, or under any Apache Beam runner. Read next: card.py.
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
from collections import Counter
from collections.abc import Generator
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

from emu_jax import cli
from emu_jax.config import UserError
from emu_jax.data import images, video
from emu_jax.data.builders import card
from emu_jax.data.documents import Document, Skipped, Text, flat_parts
from emu_jax.data.sources import kinds, records
from emu_jax.data.sources.options import SourceOptions
from emu_jax.data.sources.tables import InputShard
from emu_jax.data.tokenizer import BYTES_PER_TOKEN, TOKENS_PER_IMAGE
from emu_jax.files import PART, commit, one_line, part_of

VERSION = "1.0.0"
# Suffixes of half-written files; version 0.1 of the package used .new.
UNFINISHED = (PART, ".new")
# The card shows the first SAMPLES_PER_SHARD documents of the first SAMPLED_SHARDS shards, and at
# most MAX_SAMPLES in total.
SAMPLED_SHARDS = 24
SAMPLES_PER_SHARD = 2
MAX_SAMPLES = 48
COUNTS = ("documents", "skipped", "dropped", "images", "texts", "text_bytes", "bytes")
HISTOGRAMS = ("tokens", "images", "side")


@dataclass(frozen=True)
class Task:
    """Output shard `number` of `of` in the folder `to`, read from `source` as `kind`."""

    kind: str
    source: InputShard
    # Prefix of its documents' ids, which makes them unique in the dataset.
    label: str
    options: SourceOptions
    to: Path
    number: int
    of: int

    @property
    def output(self) -> Path:
        return self.to / f"{self.kind}-train.array_record-{self.number:05}-of-{self.of:05}"

    @property
    def counts(self) -> Path:
        """File of the shard's numbers for the card, written before the shard itself appears."""
        return self.to / "parts" / f"{self.number:05}.json"


def build(
    kind: str,
    sources: list[Path],
    to: Path,
    options: SourceOptions,
    workers: int = 0,
    runner: str = "",
    rest: list[str] | None = None,
) -> dict[str, Any]:
    """Write the dataset into `to` and return the numbers of its card (`summarise`).

    workers: number of processes (0: one per core; 1: this process only). runner: an Apache Beam
    runner to use instead, with its options `rest`. Raises UserError if `to` holds a different
    build, if there is nothing to read, or if the process of a task dies twice.
    """
    tasks = plan_tasks(kind, sources, to, options)
    (to / "parts").mkdir(exist_ok=True)
    _remove_unfinished(to)
    todo = [task for task in tasks if not task.output.exists()]
    if runner:
        _run_beam(todo, runner, rest or [])
    else:
        _run_local(todo, len(tasks), workers or len(os.sched_getaffinity(0)))
    return _finish(kind, sources, to, options, tasks)


def _remove_unfinished(to: Path) -> None:
    """Delete the half-written files of a killed build."""
    for path in [*to.iterdir(), *(to / "parts").iterdir()]:
        if path.suffix not in UNFINISHED:
            continue
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()


def plan_tasks(kind: str, sources: list[Path], to: Path, options: SourceOptions) -> list[Task]:
    """The tasks of a build, recorded in `to`/plan.json so that it can be continued.

    Raises UserError if `to` holds something else, or if two inputs would give the same ids.
    """
    shards = [(shard, root) for root in sources for shard in kinds.KINDS[kind].list_shards(root)]
    labels = [_label(shard, root) for shard, root in shards]
    paths: dict[str, Path] = {}
    for label, (shard, _) in zip(labels, shards):
        if paths.setdefault(label, shard.path) != shard.path:
            raise UserError(
                f"two inputs have the name '{label}', so their documents would have the same ids; "
                "give --from the folder that contains both"
            )
    rows = [
        {
            "label": label,
            "path": str(shard.path),
            "names": len(shard.names),
            "first": shard.first,
            "bytes": shard.path.stat().st_size if shard.path.is_file() else 0,
        }
        for label, (shard, _) in zip(labels, shards)
    ]
    _claim(to, json.dumps({"kind": kind, "options": asdict(options), "units": rows}, indent=1))
    return [
        Task(kind, shard, label, options, to, number, len(shards))
        for number, (label, (shard, _)) in enumerate(zip(labels, shards))
    ]


def _claim(to: Path, plan: str) -> None:
    """Write plan.json into a new or empty folder, or check that it is there and the same."""
    to.mkdir(parents=True, exist_ok=True)
    file = to / "plan.json"
    if file.exists():
        if file.read_text() != plan + "\n":
            raise UserError(
                f"'{to}' holds a build from different input or with different settings ({file}); "
                "choose another directory, or delete that one"
            )
        return
    if any(path.suffix not in UNFINISHED for path in to.iterdir()):
        raise UserError(f"'{to}' is not empty and does not hold a build; choose another directory")
    _write_text(file, plan + "\n")


def _label(shard: InputShard, root: Path) -> str:
    """The path of a shard's file relative to `root`, without suffixes: a prefix of its ids."""
    name = shard.path.name
    if shard.path != root and shard.path.is_relative_to(root):
        name = shard.path.relative_to(root).as_posix()
    return name.split(".")[0] or name


def write_shard(task: Task) -> None:
    """Write the output shard and the counts of a task. Both are functions of the task only."""
    part = part_of(task.output)
    features = records.features()
    serializer = ExampleSerializer(features.get_serialized_info())
    counts = Counter(dict.fromkeys(COUNTS, 0))
    skipped: Counter[str] = Counter()
    dropped: Counter[str] = Counter()
    # Reason -> id of the first record with it.
    examples: dict[str, str] = {}
    samples = []
    histograms: dict[str, Counter] = {name: Counter() for name in HISTOGRAMS}
    writer = ArrayRecordWriter(str(part), "group_size:1")
    for document in kinds.read_documents(task.kind, task.source, task.options):
        if isinstance(document, Skipped):
            reason = general_reason(document.reason)
            counts["skipped"] += 1
            skipped[reason] += 1
            examples.setdefault(reason, document.id)
            continue
        raw = _serialized(document, task, features, serializer)
        with _one_line_errors(task):
            writer.write(raw)
        _count(document, len(raw), counts, histograms)
        for reason in map(general_reason, document.dropped):
            dropped[reason] += 1
            examples.setdefault(reason, document.id)
        if task.number < SAMPLED_SHARDS and len(samples) < SAMPLES_PER_SHARD:
            samples.append(card.document_card(document, 400))
    with _one_line_errors(task):
        writer.close()
    counts["dropped"] = dropped.total()
    numbers = {
        "counts": counts,
        "skipped": skipped,
        "dropped": dropped,
        "examples": examples,
        "histograms": histograms,
        "samples": samples,
    }
    _write_text(task.counts, json.dumps(numbers, sort_keys=True))
    commit(part, task.output)


@contextlib.contextmanager
def _one_line_errors(task: Task) -> Generator[None]:
    """Raise a UserError that names the folder if a shard cannot be written."""
    try:
        yield
    # ArrayRecord raises nothing else, for example if the disk is full.
    except RuntimeError as error:
        reason = " ".join(str(error).split()).removeprefix("write() failed: ").partition(";")[0]
        raise UserError(
            f"cannot write into '{task.to}': {reason}; once that is mended, the same command "
            "continues the build"
        ) from error


def general_reason(reason: str) -> str:
    """A reason with names and numbers masked, so that equal reasons can be counted."""
    without_names = re.sub(r"'[^']*'", "'…'", reason)
    # The 8 of UTF-8 is part of a name.
    return re.sub(r"(?<![A-Za-z]-)\d+(?:\.\d+)?", "#", without_names)


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
    parts = list(flat_parts(document))
    texts = [part.text.encode() for part in parts if isinstance(part, Text)]
    pictures = [part.data for part in parts if not isinstance(part, Text)]
    text_bytes = sum(map(len, texts))
    counts.update(
        documents=1, images=len(pictures), texts=len(texts), text_bytes=text_bytes, bytes=size
    )
    # The 2 are <s> and </s>.
    tokens = text_bytes // BYTES_PER_TOKEN + TOKENS_PER_IMAGE * len(pictures) + 2
    histograms["tokens"][_power_of_two(tokens)] += 1
    histograms["images"][_power_of_two(len(pictures))] += 1
    for data in pictures:
        sides = images.header_size(data) if isinstance(data, bytes) else data.shape[:2]
        assert sides is not None, "kinds.py has decoded every image"
        histograms["side"][_power_of_two(min(sides))] += 1


def _power_of_two(value: int) -> int:
    """The power of two at or below `value`; 0 for 0."""
    return 1 << value.bit_length() - 1 if value else 0


def _run_local(todo: list[Task], total: int, workers: int) -> None:
    """Run the tasks in processes of this machine.

    A process that dies takes its pool down with it; each unfinished task then gets one more try in
    a process of its own.
    """
    with tqdm(
        total=total, initial=total - len(todo), desc="shards", unit=" shards", disable=None
    ) as bar:
        if workers == 1:
            for task in todo:
                write_shard(task)
                bar.update()
            return
        _run_pool(todo, workers, bar)
        for task in todo:
            if not task.output.exists():
                _run_pool([task], 1, bar)
    dead = [task for task in todo if not task.output.exists()]
    if dead:
        raise UserError(
            f"the process that reads '{dead[0].source.path}' died twice (shard {dead[0].label}: "
            "a decoder crashed, or memory ran out); the other shards are written: repair or "
            "remove that input and run the command again"
        )


def _run_pool(tasks: list[Task], workers: int, bar: tqdm) -> None:
    """Run tasks in new processes until all are done or one of the processes dies."""
    if not tasks:
        return
    # A fork would copy locks that other threads hold.
    context = multiprocessing.get_context("spawn")
    with (
        contextlib.suppress(BrokenProcessPool),
        ProcessPoolExecutor(min(workers, len(tasks)), context, _start_worker) as pool,
    ):
        for done in as_completed([pool.submit(write_shard, task) for task in tasks]):
            done.result()
            bar.update()


def _start_worker() -> None:
    images.silence_pillow()
    video.silence_ffmpeg()
    _end_with_parent()


def _end_with_parent() -> None:
    """Exit when the parent process is killed, instead of waiting for work forever."""
    parent = multiprocessing.parent_process()
    assert parent is not None, "only called in a worker of a pool"

    def watch(sentinel: int) -> None:
        wait([sentinel])
        os._exit(1)

    threading.Thread(target=watch, args=(parent.sentinel,), daemon=True).start()


def _run_beam(todo: list[Task], runner: str, rest: list[str]) -> None:
    import apache_beam as beam
    from apache_beam.options.pipeline_options import PipelineOptions

    try:
        with beam.Pipeline(runner=runner, options=PipelineOptions(rest)) as pipeline:
            _ = pipeline | beam.Create(todo) | beam.Reshuffle() | beam.Map(write_shard)
    # Beam raises ValueError for an unknown runner or a missing option.
    except ValueError as error:
        raise UserError(f"--runner={runner}: {one_line(error)}") from error


class _Documents(tfds.core.GeneratorBasedBuilder):
    """Describes the dataset to tensorflow-datasets: its features and metadata."""

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
) -> dict[str, Any]:
    """Write the card and the metadata, and return the card's numbers.

    dataset_info.json comes last and marks completion.
    """
    parts = [json.loads(task.counts.read_text()) for task in tasks]
    summary = summarise(kind, [str(path) for path in sources], to.name, options, parts)
    if not summary["counts"]["documents"]:
        most_common = list(summary["skipped"].items())[:3]
        reasons = "; ".join(f"{count} x {reason}" for reason, count in most_common)
        raise UserError(f"no record became a document: {reasons or 'the input has no records'}")
    samples = list(itertools.chain.from_iterable(part["samples"] for part in parts))
    _write_text(to / "card.json", json.dumps(summary, indent=1, ensure_ascii=False) + "\n")
    _write_text(to / "card.html", card.card_page(summary, samples[:MAX_SAMPLES]))
    if not (to / "dataset_info.json").exists():
        _describe(kind, to, [part["counts"] for part in parts])
    return summary


def summarise(
    kind: str, sources: list[str], name: str, options: SourceOptions, parts: list[dict[str, Any]]
) -> dict[str, Any]:
    """The numbers of the card: sums over the counts of all shards, in `parts`."""

    def total(*path: str) -> Counter:
        sums: Counter = Counter()
        for part in parts:
            for key in path:
                part = part[key]
            sums.update(part)
        return sums

    def ranked(counts: Counter) -> dict[str, int]:
        return dict(sorted(counts.items(), key=lambda item: (-item[1], item[0])))

    examples: dict[str, str] = {}
    for part in parts:
        # Earlier versions wrote no examples.
        examples = part.get("examples", {}) | examples
    counts = {name: total("counts")[name] for name in COUNTS} | {"shards": len(parts)}
    histograms = {
        name: dict(sorted(total("histograms", name).items(), key=lambda item: int(item[0])))
        for name in HISTOGRAMS
    }
    return {
        "name": name,
        "kind": kind,
        "from": sources,
        "counts": counts,
        "skipped": ranked(total("skipped")),
        "dropped": ranked(total("dropped")),
        "examples": examples,
        "histograms": histograms,
        "settings": asdict(options),
    }


def _describe(kind: str, to: Path, counts: list[dict[str, int]]) -> None:
    """Write the metadata files of tensorflow-datasets into `to`, dataset_info.json last."""
    part = to / f"metadata{PART}"
    part.mkdir(exist_ok=True)
    # The builder is named after the kind, and one process may build two datasets of a kind.
    with skip_registration():
        builder_type = type(kind.capitalize(), (_Documents,), {"name": kind})
        builder = builder_type(data_dir=str(part / "of"), file_format="array_record")
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
        builder.info.write_to_directory(part)
    files = [file for file in part.iterdir() if file.is_file()]
    for file in sorted(files, key=lambda file: (file.name == "dataset_info.json", file.name)):
        commit(file, to / file.name)
    with contextlib.suppress(OSError):
        part.rmdir()


def _write_text(file: Path, text: str) -> None:
    with cli.output_file(file) as opened:
        opened.write(text)
