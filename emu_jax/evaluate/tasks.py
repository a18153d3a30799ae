"""The benchmarks: their files, what a model is asked in each, and how what it says is submitted and
scored. Read next: benchmark.py.
"""

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from emu_jax.config import UserError
from emu_jax.evaluate import annotations, prompts
from emu_jax.evaluate.annotations import Example
from emu_jax.generate.generation_config import GenerationConfig

BEAMS = 5
CAPTION = GenerationConfig(max_new_tokens=20, min_new_tokens=8, beams=BEAMS, length_penalty=-1.0)
ANSWER = GenerationConfig(max_new_tokens=20, min_new_tokens=1, beams=BEAMS, length_penalty=-1.0)
# unpublished
FREE = GenerationConfig(max_new_tokens=128, beams=BEAMS)


@dataclass(frozen=True)
class Task:
    what: str
    # of prompts.CHAT; or "dialog", or "image"
    kind: str
    # names of its annotation files; {split} stands for the split
    files: tuple[str, ...]
    # further ones, that may be missing
    more: tuple[str, ...]
    # of their paths; with `split` where all splits are in one file
    read: Callable[..., list[Example]]
    split: str
    # the split that few-shot examples come from; "" for none
    examples: str
    # "captions", "vqa", "exact_match", "wups", "visdial", "judge" or "fid"
    metric: str
    # predictions by id, as they are submitted
    results: Callable[[Mapping[str, Any]], Any]
    options: GenerationConfig = ANSWER
    video: bool = False
    # of all splits
    one_file: bool = False
    # a file that only its score reads, and that may be missing
    marks: str = ""
    # the task that few-shot examples come from, where it is another
    fewshot: str = ""

    def clean(self, text: str) -> str:
        """What is kept of what a model says."""
        return (
            prompts.clean_caption(text)
            if self.kind == "caption"
            else prompts.clean_answer(text)
            if self.kind == "answer"
            else text.strip()
        )


def _karpathy(what: str, dataset: str) -> Task:
    return Task(
        f"captions of {what} (Karpathy's split)",
        "caption",
        (f"dataset_{dataset}.json",),
        (),
        lambda path, split: annotations.karpathy(path, dataset, split),
        "test",
        "train",
        "captions",
        annotations.caption_results,
        CAPTION,
        one_file=True,
    )


def _vqa(what: str, prefix: str, read: Callable[..., list[Example]]) -> Task:
    return Task(
        what,
        "answer",
        (f"{prefix}OpenEnded_mscoco_{{split}}_questions.json",),
        (f"{prefix}mscoco_{{split}}_annotations.json",),
        read,
        "val2014",
        "train2014",
        "vqa",
        annotations.vqa_results,
    )


def _video_qa(what: str, benchmark: str) -> Task:
    return Task(
        what,
        "answer",
        ("{split}_qa.json",),
        (),
        lambda path: annotations.video_qa(path, benchmark),
        "test",
        "train",
        "exact_match",
        annotations.video_qa_results,
        video=True,
    )


TASKS = {
    "coco-caption": _karpathy("COCO", "coco"),
    "flickr30k": _karpathy("Flickr30k", "flickr30k"),
    "nocaps": Task(
        "captions of NoCaps",
        "caption",
        ("nocaps_{split}_4500_captions.json",),
        (),
        annotations.nocaps,
        "val",
        "train",
        "captions",
        annotations.caption_results,
        CAPTION,
        fewshot="coco-caption",
    ),
    "vqav2": _vqa("VQAv2", "v2_", annotations.vqav2),
    "okvqa": _vqa("OK-VQA", "", annotations.okvqa),
    "vizwiz": Task(
        "VizWiz-VQA: first, whether the answer is known",
        "answer",
        ("{split}.json",),
        (),
        annotations.vizwiz,
        "val",
        "train",
        "vqa",
        annotations.vizwiz_results,
    ),
    "visdial": Task(
        "VisDial 1.0: candidates ranked by the LLM's loss",
        "dialog",
        ("visdial_1.0_{split}.json",),
        (),
        annotations.visdial,
        "val",
        "",
        "visdial",
        annotations.visdial_results,
        marks="visdial_1.0_{split}_dense_annotations.json",
    ),
    "msvd-qa": _video_qa("MSVD-QA", "msvd"),
    "msrvtt-qa": _video_qa("MSRVTT-QA", "msrvtt"),
    "nextqa": Task(
        "NExT-QA, open-ended; needs --wordnet, takes --tagger",
        "answer",
        ("{split}.csv",),
        ("add_reference_answer_{split}.json",),
        annotations.nextqa,
        "test",
        "train",
        "wups",
        annotations.nextqa_results,
        video=True,
    ),
    "mmvet": Task(
        "MM-Vet: a file of answers for its judge",
        "free",
        ("mm-vet.json",),
        (),
        lambda path, split: annotations.mmvet(path),
        "all",
        "",
        "judge",
        annotations.mmvet_results,
        FREE,
        one_file=True,
    ),
    "coco-t2i": Task(
        "30,000 captions of COCO drawn, and FID; needs --decoder and --inception, takes --clip",
        "image",
        ("captions_{split}.json",),
        (),
        annotations.coco_prompts,
        "val2014",
        "",
        "fid",
        dict,
    ),
}


class Folder:
    """What lies in a benchmark's folder, wherever in it, by name."""

    def __init__(self, root: str):
        """Raises UserError where there is no such folder."""
        self.root = Path(root)
        self._paths = {}
        if not self.root.is_dir():
            raise UserError(
                f"no folder {root!r}: --data=DIR holds a benchmark's annotation files and pictures, as they are published"
            )
        for folder, inner, names in os.walk(self.root, followlinks=True):
            inner.sort()
            for name in names:
                # of two, the first
                self._paths.setdefault(name, Path(folder, name))

    def find(self, name: str) -> Path | None:
        return self._paths.get(name)

    def annotations(self, name: str, split: str) -> list[Path]:
        """The files that the task of this name needs, and those of its further ones that are there.
        Raises UserError that names what is missing.
        """
        task = TASKS[name]
        wanted = [file.format(split=split) for file in task.files]
        if missing := [file for file in wanted if file not in self._paths]:

            def there(other):
                return all(
                    file.format(split=TASKS[other].split) in self._paths
                    for file in TASKS[other].files
                )

            others = [other for other in TASKS if other != name and there(other)]
            raise UserError(
                f"{self.root}: no {' and no '.join(missing)} anywhere in it, which --task={name} reads"
                + (f"; it looks like --task={others[0]}" if others else "")
                + ("" if task.one_file else " (another --split has another name)")
            )
        return [self._paths[file] for file in wanted] + list(
            filter(None, (self.find(file.format(split=split)) for file in task.more))
        )

    def picture(self, example: Example) -> Path | None:
        """The file of an example's picture or video. The videos of MSVD and NExT-QA may have the
        names that they have on the web, where the table that comes with the benchmark is there
        too.
        """
        name = Path(example.picture)
        return self.find(name.name) or self.find(f"{self._aliases.get(name.stem)}{name.suffix}")

    @cached_property
    def _aliases(self) -> dict[str, str]:
        """MSVD's youtube_mapping.txt ("NAME vid1") and NExT-QA's map_vid_vidorID.json ({video:
        "FOLDER/NAME"}).
        """
        found = {}
        if path := self.find("youtube_mapping.txt"):
            found |= {
                row[1]: row[0]
                for row in map(str.split, path.read_text(errors="replace").splitlines())
                if len(row) == 2
            }
        if path := self.find("map_vid_vidorID.json"):
            table = annotations.load(path)
            found |= (
                {video: str(where).rpartition("/")[2] for video, where in table.items()}
                if isinstance(table, dict)
                else {}
            )
        return found


def examples_of(name: str, folder: Folder, split: str) -> list[Example]:
    """Raises UserError for files that are missing, or another benchmark's."""
    task = TASKS[name]
    paths = map(str, folder.annotations(name, split))
    return task.read(*paths, split) if task.one_file else task.read(*paths)
