"""Text to image: generate images of COCO's captions; compute their FID and CLIP score.

Read next: metrics/fid.py, metrics/clip_score.py.
"""

import zlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from jaxtyping import UInt8
from PIL import Image
from tqdm import tqdm

from emu_jax import checkpoint
from emu_jax.config import UserError
from emu_jax.evaluate import score
from emu_jax.evaluate.annotations import Example
from emu_jax.evaluate.metrics import clip_score, fid
from emu_jax.evaluate.plan import BenchmarkPlan, BenchmarkSettings
from emu_jax.evaluate.predict import Prediction
from emu_jax.evaluate.score import Scores
from emu_jax.generate import diffusion_decoder
from emu_jax.generate.session import Session

# A parameter that no other network than FID's Inception has, which identifies its checkpoint.
INCEPTION_PARAM = "Mixed_7c/branch_pool/w"


class ImagePredictor:
    """Generates images of captions as PNG files; each example has its own random seed."""

    def __init__(self, session: Session, settings: BenchmarkSettings, out: Path):
        self.session = session
        self.out = out
        self.decoder = diffusion_decoder.load(
            settings.decoder,
            session.model_config,
            mesh=session.mesh,
            empty_prompt=lambda: session.generate_images([[]])[0],
        )
        (out / "pictures").mkdir(parents=True, exist_ok=True)

    def predict(self, examples: Sequence[Example]) -> list[Prediction]:
        """Generate a batch of images; a prediction is the path of an image in the folder."""
        visual = self.session.generate_images([[example.references[0]] for example in examples])
        seeds = np.array([zlib.crc32(example.id.encode()) % 2**31 for example in examples])
        predictions = []
        for example, pixels in zip(examples, self.decoder(visual, seeds), strict=True):
            path = image_path(example)
            Image.fromarray(pixels).save(self.out / path)
            predictions.append(Prediction(example.id, "", path, 0))
        return predictions


def image_path(example: Example) -> str:
    """Path of an example's generated image within the run's folder."""
    return f"pictures/{example.id}.png"


def check_models(inception_dir: str, clip_dir: str | None) -> None:
    """Raise UserError unless the checkpoints are FID's Inception and, if given, a CLIP."""
    if INCEPTION_PARAM not in checkpoint.param_shapes(inception_dir):
        raise UserError(f"the checkpoint in '{inception_dir}' is not FID's Inception; {fid.WHERE}")
    if clip_dir:
        clip_score.check(clip_dir)


def score_images(
    plan: BenchmarkPlan, out: Path, inception_dir: str, clip_dir: str | None
) -> Scores:
    """FID of the generated images and, if `clip_dir` is given, the CLIP score of each."""
    distance = _fid(plan, out, inception_dir)
    scores = Scores({"count": len(plan.examples), "fid": distance}, {})
    if not clip_dir:
        return scores
    images = {example.id: out / image_path(example) for example in plan.examples}
    captions = {example.id: example.references for example in plan.examples}
    clip_scores = score.clip_scores(clip_score.load(clip_dir), images, captions)
    return Scores(scores.numbers | clip_scores.numbers, clip_scores.each)


def _fid(plan: BenchmarkPlan, out: Path, inception_dir: str) -> float:
    """FID against the images that the captions describe."""
    names = dict.fromkeys(example.media for example in plan.examples)
    real = [plan.paths[name] for name in names if name in plan.paths]
    if len(real) < 2:
        raise UserError(
            "FID needs at least two of the images that the captions describe; "
            f"{len(real)} of them exist"
        )
    params = checkpoint.restore_params(inception_dir)

    def statistics(paths: Sequence[Path], label: str) -> fid.Statistics:
        progress = tqdm(paths, label, unit=" images", disable=None)
        return fid.statistics(fid.features(params, map(read_image, progress)))

    cache = out / f"inception-{len(real)}.npz"
    real_statistics = fid.cached_statistics(cache, lambda: statistics(real, "real images"))
    generated = [out / image_path(example) for example in plan.examples]
    return fid.distance(statistics(generated, "generated images"), real_statistics)


def read_image(path: Path) -> UInt8[np.ndarray, "h w 3"]:
    """RGB pixels of an image file. Raises UserError if it cannot be read."""
    try:
        with Image.open(path) as image:
            return np.array(image.convert("RGB"))
    except (OSError, ValueError) as error:
        raise UserError(f"'{path}': {error}") from error
