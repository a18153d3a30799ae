"""Tiny benchmarks in their official layouts: annotation files, and images or videos."""

import csv
import json
from fractions import Fraction
from pathlib import Path

import numpy as np
from PIL import Image

ANSWERS = ["yes", "yes", "yes", "no", "2", "two", "a dog", "the dog", "dog", "yes"]


def picture(path: Path, seed: int) -> None:
    """Write an image of noise."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (20, 24, 3), np.uint8)).save(path)


def video(path: Path, seed: int) -> None:
    """Write a video of ten frames."""
    import av

    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w") as out:
        stream = out.add_stream("mpeg4", rate=Fraction(10))
        stream.width = 32
        stream.height = 32
        stream.pix_fmt = "yuv420p"
        for k in range(10):
            frame = (
                np.random.default_rng(100 * seed + k)
                .integers(0, 256, (4, 4, 3), np.uint8)
                .repeat(8, 0)
                .repeat(8, 1)
            )
            for packet in stream.encode(av.VideoFrame.from_ndarray(frame, "rgb24")):
                out.mux(packet)
        for packet in stream.encode():
            out.mux(packet)


def put(path: Path, value) -> Path:
    """Write a JSON file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value), encoding="utf-8")
    return path


def karpathy(root: Path, dataset: str, count: int = 3) -> Path:
    """Captions of `count` test images and of as many training images."""
    images = []
    for k in range(2 * count):
        split = ("test", "train")[k // count]
        name = f"{dataset}_{k:012}.jpg"
        image: dict = {"filename": name, "imgid": k}
        folder = "flickr30k-images"
        if dataset == "coco":
            folder = "val2014"
            image |= {"filepath": folder, "cocoid": 100 + k}
        picture(root / folder / name, k)
        images.append(
            image
            | {
                "split": split,
                "sentids": [k],
                "sentences": [
                    {"raw": f"A dog {word} number {k}.", "tokens": ["a"], "imgid": k, "sentid": k}
                    for word in ("runs", "sits")
                ],
            }
        )
    return put(root / f"dataset_{dataset}.json", {"dataset": dataset, "images": images})


def coco_prompts(root: Path, count: int = 4) -> Path:
    """COCO's captions, one per image, as prompts for text to image."""
    for k in range(count):
        picture(root / "val2014" / f"COCO_val2014_{k:012}.jpg", k)
    return put(
        root / "captions_val2014.json",
        {
            "info": {},
            "images": [{"id": k, "file_name": f"COCO_val2014_{k:012}.jpg"} for k in range(count)],
            "annotations": [
                {"id": 500 + k, "image_id": k, "caption": f"a dog {k}. "} for k in range(count)
            ],
        },
    )


def nocaps(root: Path, count: int = 3) -> Path:
    """Two captions of each image, in two domains."""
    for k in range(count):
        picture(root / "val" / f"0{k}.jpg", k)
    return put(
        root / "nocaps_val_4500_captions.json",
        {
            "info": {},
            "licenses": [],
            "images": [
                {
                    "id": k,
                    "file_name": f"0{k}.jpg",
                    "coco_url": "",
                    "domain": ("in-domain", "out-domain")[k % 2],
                    "width": 24,
                    "height": 20,
                }
                for k in range(count)
            ],
            "annotations": [
                {"id": 10 * k + n, "image_id": k, "caption": f"A cat {n} on a mat, {k}."}
                for k in range(count)
                for n in range(2)
            ],
        },
    )


def vqa(root: Path, name: str, count: int = 4) -> tuple[Path, Path]:
    """Questions and annotations of VQAv2 ("v2_") or OK-VQA (""), of val2014 and train2014."""
    for split in ("train2014", "val2014"):
        for k in range(2):
            picture(root / split / f"COCO_{split}_{k:012}.jpg", k + (split == "train2014") * 10)
        answers = [
            {"answer_id": n, "answer": text, "answer_confidence": "yes"}
            | ({} if name else {"raw_answer": text + "s"})
            for n, text in enumerate(ANSWERS, 1)
        ]
        questions = put(
            root / f"{name}OpenEnded_mscoco_{split}_questions.json",
            {
                "info": {},
                "data_type": "mscoco",
                "data_subtype": split,
                "task_type": "Open-Ended",
                "license": {},
                "questions": [
                    {"image_id": k % 2, "question": f"Is there a dog {k}?", "question_id": 1000 + k}
                    for k in range(count)
                ],
            },
        )
        annotations = put(
            root / f"{name}mscoco_{split}_annotations.json",
            {
                "info": {},
                "data_type": "mscoco",
                "data_subtype": split,
                "license": {},
                "annotations": [
                    {
                        "question_type": "is",
                        "answer_type": ("yes/no", "other")[k % 2],
                        "image_id": k % 2,
                        "question_id": 1000 + k,
                        "answers": answers,
                    }
                    | ({"multiple_choice_answer": "yes"} if name else {"confidence": 3})
                    for k in range(count)
                ],
            },
        )
    return questions, annotations


def vizwiz(root: Path, count: int = 3) -> Path:
    """Questions of train and val; every other one is answerable."""
    for split in ("train", "val"):
        for k in range(count):
            picture(root / split / f"VizWiz_{split}_{k:08}.jpg", k)
        path = put(
            root / f"{split}.json",
            [
                {
                    "image": f"VizWiz_{split}_{k:08}.jpg",
                    "question": "What is this?",
                    "answerable": k % 2,
                    "answer_type": ("unanswerable", "other")[k % 2],
                    "answers": [
                        {"answer": ("unanswerable", text)[k % 2], "answer_confidence": "yes"}
                        for text in ANSWERS
                    ],
                }
                for k in range(count)
            ],
        )
    return path


def visdial(root: Path, count: int = 2, rounds: int = 2, candidates: int = 5) -> tuple[Path, Path]:
    """Dialogs, and graded relevance of their last rounds."""
    for k in range(count):
        picture(root / "VisualDialog_val2018" / f"VisualDialog_val2018_{k:012}.jpg", k)
    answers = [f"answer {n}" for n in range(candidates + 2)]
    dialogs = [
        {
            "image_id": k,
            "caption": "a dog on a beach",
            "dialog": [
                {
                    "question": n,
                    "answer": n + 1,
                    "answer_options": list(range(candidates)),
                    "gt_index": n + 1,
                }
                for n in range(rounds)
            ],
        }
        for k in range(count)
    ]
    dense = put(
        root / "visdial_1.0_val_dense_annotations.json",
        [
            {
                "image_id": k,
                "round_id": rounds,
                "gt_relevance": [0.0, 1.0, 0.5, 0.0, 0.0][:candidates],
            }
            for k in range(count)
        ],
    )
    return put(
        root / "visdial_1.0_val.json",
        {
            "version": "1.0",
            "split": "val",
            "data": {
                "questions": ["is it red", "how many"],
                "answers": answers,
                "dialogs": dialogs,
            },
        },
    ), dense


def video_qa(root: Path, benchmark: str, count: int = 3) -> Path:
    """Questions of MSVD-QA ("msvd") or MSRVTT-QA ("msrvtt") about two videos."""
    for split in ("train", "test"):
        rows = [
            {
                "answer": ("dog", "two")[k % 2],
                "id": k + 50 * (split == "train"),
                "question": f"what runs {k}?",
                "video_id": k % 2 + 1,
            }
            | ({"category_id": 3} if benchmark == "msrvtt" else {})
            for k in range(count)
        ]
        path = put(root / f"{split}_qa.json", rows)
    for k in (1, 2):
        video(
            root
            / (f"TrainValVideo/video{k}.mp4" if benchmark == "msrvtt" else f"video/vid{k}.avi"),
            k,
        )
    return path


def nextqa(root: Path, count: int = 3) -> Path:
    """Questions of NExT-QA about two videos, with second answers about one of them."""
    for split in ("train", "val"):
        path = root / f"{split}.csv"
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path, "w", newline="", encoding="utf-8") as file:
            out = csv.writer(file)
            out.writerow(
                [
                    "video",
                    "frame_count",
                    "width",
                    "height",
                    "question",
                    "answer",
                    "qid",
                    "type",
                    "additional_ref_answer",
                ]
            )
            for k in range(count):
                out.writerow(
                    [
                        f"40{k % 2}",
                        10,
                        32,
                        32,
                        f"why does the dog run {k}?",
                        "to eat",
                        k,
                        ("CW", "TN", "DC")[k % 3],
                        "",
                    ]
                )
        put(
            root / f"add_reference_answer_{split}.json",
            {"400": {str(k): "chase cat" for k in range(count)}},
        )
    for k in range(2):
        video(root / "videos" / f"40{k}.mp4", k)
    return path


def mmvet(root: Path, count: int = 3) -> Path:
    """Questions of MM-Vet."""
    for k in range(count):
        picture(root / "images" / f"v1_{k}.png", k)
    return put(
        root / "mm-vet.json",
        {
            f"v1_{k}": {
                "imagename": f"v1_{k}.png",
                "question": "What is x?",
                "answer": "-1<AND>-5",
                "imagesource": "x",
                "capability": ["ocr", "math"],
            }
            for k in range(count)
        },
    )
