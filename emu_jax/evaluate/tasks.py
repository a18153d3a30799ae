"""The table of benchmarks: their files, prompts, generation settings and metrics.

Read next: plan.py, benchmark.py.
"""

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from emu_jax.config import UserError
from emu_jax.evaluate import annotations, prompts
from emu_jax.evaluate.annotations import Example
from emu_jax.generate.generation_config import GenerationConfig

# The release's settings for captions and for short answers.
CAPTION = GenerationConfig(max_new_tokens=20, min_new_tokens=8, beams=5, length_penalty=-1.0)
ANSWER = GenerationConfig(max_new_tokens=20, min_new_tokens=1, beams=5, length_penalty=-1.0)
# Generation settings for MM-Vet, whose answers may have any length; the release's are unpublished.
FREE = GenerationConfig(max_new_tokens=128, beams=5)


@dataclass(frozen=True)
class Task:
    """A benchmark."""

    description: str
    # What is predicted: a text (a key of prompts.CHAT), the ranks of a dialog's candidates, or an
    # image.
    kind: Literal["caption", "answer", "free", "dialog", "image"]
    # Names of the annotation files, in which {split} stands for the split.
    files: tuple[str, ...]
    # (paths of the files) -> examples; if one file holds all splits, also takes the split.
    reader: Callable[..., list[Example]]
    # The default split.
    split: str
    metric: Literal["captions", "vqa", "exact_match", "wups", "visdial", "judge", "fid"]
    # Predictions by id, in the benchmark's submission format.
    results: Callable[[Mapping[str, Any]], Any]
    generation: GenerationConfig = ANSWER
    # Annotation files that the reader also takes, if they exist.
    optional_files: tuple[str, ...] = ()
    # Whether one file holds all splits.
    one_file: bool = False
    # The split that few-shot examples come from; "": the task has no few-shot examples.
    shots_split: str = ""
    # The task that few-shot examples come from; "": this one.
    shots_task: str = ""
    # Whether the questions are about videos.
    video: bool = False
    # VisDial: an optional file with graded relevance of the candidates, for NDCG.
    relevance_file: str = ""

    def clean(self, text: str) -> str:
        """The part of a generated text that counts."""
        if self.kind == "caption":
            return prompts.clean_caption(text)
        if self.kind == "answer":
            return prompts.clean_answer(text)
        return text.strip()


def _karpathy(dataset: str, name: str) -> Task:
    return Task(
        f"captions of {name} (Karpathy's split)",
        "caption",
        files=(f"dataset_{dataset}.json",),
        reader=lambda path, split: annotations.karpathy(path, dataset, split),
        one_file=True,
        split="test",
        shots_split="train",
        metric="captions",
        results=annotations.caption_results,
        generation=CAPTION,
    )


def _vqa(name: str, prefix: str, reader: Callable[..., list[Example]]) -> Task:
    return Task(
        name,
        "answer",
        files=(f"{prefix}OpenEnded_mscoco_{{split}}_questions.json",),
        optional_files=(f"{prefix}mscoco_{{split}}_annotations.json",),
        reader=reader,
        split="val2014",
        shots_split="train2014",
        metric="vqa",
        results=annotations.vqa_results,
    )


def _video_qa(benchmark: str, name: str) -> Task:
    return Task(
        name,
        "answer",
        files=("{split}_qa.json",),
        reader=lambda path: annotations.video_qa(path, benchmark),
        video=True,
        split="test",
        shots_split="train",
        metric="exact_match",
        results=annotations.video_qa_results,
    )


TASKS = {
    "coco-caption": _karpathy("coco", "COCO"),
    "flickr30k": _karpathy("flickr30k", "Flickr30k"),
    "nocaps": Task(
        "captions of NoCaps",
        "caption",
        files=("nocaps_{split}_4500_captions.json",),
        reader=annotations.nocaps,
        split="val",
        shots_task="coco-caption",
        shots_split="train",
        metric="captions",
        results=annotations.caption_results,
        generation=CAPTION,
    ),
    "vqav2": _vqa("VQAv2", "v2_", annotations.vqav2),
    "okvqa": _vqa("OK-VQA", "", annotations.okvqa),
    "vizwiz": Task(
        "VizWiz-VQA; asks first whether the answer is known",
        "answer",
        files=("{split}.json",),
        reader=annotations.vizwiz,
        split="val",
        shots_split="train",
        metric="vqa",
        results=annotations.vizwiz_results,
    ),
    "visdial": Task(
        "VisDial 1.0: candidates ranked by the language model's loss",
        "dialog",
        files=("visdial_1.0_{split}.json",),
        relevance_file="visdial_1.0_{split}_dense_annotations.json",
        reader=annotations.visdial,
        split="val",
        metric="visdial",
        results=annotations.visdial_results,
    ),
    "msvd-qa": _video_qa("msvd", "MSVD-QA"),
    "msrvtt-qa": _video_qa("msrvtt", "MSRVTT-QA"),
    "nextqa": Task(
        "NExT-QA, open-ended; needs --wordnet, takes --tagger",
        "answer",
        files=("{split}.csv",),
        optional_files=("add_reference_answer_{split}.json",),
        reader=annotations.nextqa,
        video=True,
        split="test",
        shots_split="train",
        metric="wups",
        results=annotations.nextqa_results,
    ),
    "mmvet": Task(
        "MM-Vet: writes the answers for its judge",
        "free",
        files=("mm-vet.json",),
        reader=lambda path, split: annotations.mmvet(path),
        one_file=True,
        split="all",
        metric="judge",
        results=annotations.mmvet_results,
        generation=FREE,
    ),
    "coco-t2i": Task(
        "images for 30,000 captions of COCO: needs --decoder and --inception, takes --clip",
        "image",
        files=("captions_{split}.json",),
        reader=annotations.coco_prompts,
        split="val2014",
        metric="fid",
        results=dict,
    ),
}


class Folder:
    """The files in a benchmark's folder by name, at any depth.

    If two files have the same name, the first one counts. Raises UserError if the folder does not
    exist.
    """

    def __init__(self, root: str):
        self.root = Path(root)
        if not self.root.is_dir():
            raise UserError(
                f"no folder {root!r}: --data=DIR must contain the published annotation files and "
                "images of the benchmark"
            )
        self._paths: dict[str, Path] = {}
        for folder, subfolders, names in os.walk(self.root, followlinks=True):
            subfolders.sort()
            for name in names:
                self._paths.setdefault(name, Path(folder, name))

    def find(self, name: str) -> Path | None:
        """The path of the file with this name; None if it does not exist."""
        return self._paths.get(name)

    def annotation_files(self, task_name: str, split: str) -> list[Path]:
        """The paths of a task's files, and of those optional files that exist.

        Raises UserError, which names the missing ones.
        """
        task = TASKS[task_name]
        required = [name.format(split=split) for name in task.files]
        missing = [name for name in required if name not in self._paths]
        if missing:
            message = (
                f"{self.root}: no {' and no '.join(missing)} anywhere in it, "
                f"which --task={task_name} reads"
            )
            others = [name for name in TASKS if name != task_name and self._has_files_of(name)]
            if others:
                message += f"; it looks like --task={others[0]}"
            if not task.one_file:
                message += " (another --split has another name)"
            raise UserError(message)
        optional = [name.format(split=split) for name in task.optional_files]
        return [self._paths[name] for name in (*required, *optional) if name in self._paths]

    def media(self, example: Example) -> Path | None:
        """The path of an example's image or video; None if it does not exist.

        Videos of MSVD and NExT-QA may also have their original names, if the benchmark's table of
        names is in the folder.
        """
        name = Path(example.media)
        return self.find(name.name) or self.find(f"{self._aliases.get(name.stem)}{name.suffix}")

    def _has_files_of(self, task_name: str) -> bool:
        task = TASKS[task_name]
        return all(name.format(split=task.split) in self._paths for name in task.files)

    @cached_property
    def _aliases(self) -> dict[str, str]:
        """Video -> original name, without suffixes.

        The tables are MSVD's youtube_mapping.txt, with lines "NAME vid1", and NExT-QA's
        map_vid_vidorID.json, which is {video: "FOLDER/NAME"}.
        """
        aliases: dict[str, str] = {}
        if path := self.find("youtube_mapping.txt"):
            for line in path.read_text(errors="replace").splitlines():
                columns = line.split()
                if len(columns) == 2:
                    aliases[columns[1]] = columns[0]
        if path := self.find("map_vid_vidorID.json"):
            table = annotations.read_json(path)
            if isinstance(table, dict):
                for video, source in table.items():
                    aliases[video] = str(source).rpartition("/")[2]
        return aliases


def read_examples(task_name: str, folder: Folder, split: str) -> list[Example]:
    """Read the examples of a task's split.

    Raises UserError if files are missing or belong to another benchmark.
    """
    task = TASKS[task_name]
    paths = [str(path) for path in folder.annotation_files(task_name, split)]
    return task.reader(*paths, split) if task.one_file else task.reader(*paths)
