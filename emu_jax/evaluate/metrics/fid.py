"""Frechet inception distance (arXiv 1706.08500): how far two sets of images are apart, as Gaussians
of their Inception features.

Statistics of a set are (mean, covariance) and are cached in a file. Read next: models/inception.py.
"""

import zipfile
from collections.abc import Callable, Iterable
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, UInt8

from emu_jax.config import UserError
from emu_jax.models import inception


class Statistics(NamedTuple):
    mean: Float[np.ndarray, "C"]
    # unbiased
    cov: Float[np.ndarray, "C C"]


def statistics(features: Float[np.ndarray, "n C"]) -> Statistics:
    """Of the features of a set, in double precision. Raises UserError for fewer than two images."""
    if len(features) < 2:
        raise UserError(
            f"FID needs at least two images in each set; there {'is' if len(features) == 1 else 'are'} {len(features)}"
        )
    features = np.asarray(features, np.float64)
    return Statistics(features.mean(0), np.atleast_2d(np.cov(features, rowvar=False)))


def distance(a: Statistics, b: Statistics) -> float:
    """|mean - mean|^2 + tr(A + B - 2 (A B)^(1/2)).

    tr (A B)^(1/2) is the sum of the roots of the eigenvalues of A^(1/2) B A^(1/2), which is
    symmetric: nothing complex comes up where fewer images than features make the covariances
    singular, and no eps is added to them. Raises UserError for features of different widths.
    """
    if a.mean.shape != b.mean.shape:
        raise UserError(
            f"statistics of {len(a.mean)} and of {len(b.mean)} features cannot be compared; take both from the same layer"
        )
    values, vectors = np.linalg.eigh(a.cov)
    root = (vectors * np.sqrt(np.maximum(values, 0))) @ vectors.T
    cross = np.sqrt(np.maximum(np.linalg.eigvalsh(root @ b.cov @ root), 0)).sum()
    return float(((a.mean - b.mean) ** 2).sum() + np.trace(a.cov) + np.trace(b.cov) - 2 * cross)


def features(
    params: dict,
    images: Iterable[UInt8[np.ndarray, "h w 3"]],
    *,
    batch: int = 32,
    layer: str = "2048",
) -> Float[np.ndarray, "n C"]:
    """Inception features of RGB images of any sizes. Raises UserError where there is none."""
    run = jax.jit(lambda params, x: inception.apply(params, x)[layer])
    out = []
    images = iter(images)
    while some := [
        inception.prepare(jnp.asarray(image[None]))[0] for image in islice(images, batch)
    ]:
        # one shape, one compilation
        padded = jnp.stack(some + some[:1] * (batch - len(some)))
        out.append(np.asarray(run(params, padded))[: len(some)])
    if not out:
        raise UserError("FID: there are no images")
    return np.concatenate(out)


def cached(path: Path, make: Callable[[], Statistics]) -> Statistics:
    """The statistics in `path`; made and written if the file is not there."""
    if path.exists():
        return read(path)
    made = make()
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.part")
    with part.open("wb") as file:
        np.savez(file, mu=made.mean, sigma=made.cov)
    part.replace(path)
    return made


def read(path: Path) -> Statistics:
    """The statistics in an .npz with mu and sigma, as other FID codes write them too. Raises
    UserError for a file that holds something else.
    """
    try:
        with np.load(path, allow_pickle=False) as file:
            mean = file["mu"].astype(np.float64)
            cov = file["sigma"].astype(np.float64)
    except (ValueError, OSError, EOFError, KeyError, AttributeError, zipfile.BadZipFile) as error:
        raise UserError(
            f"{path}: no statistics of a set of images (an .npz with mu and sigma)"
        ) from error
    if (
        mean.ndim != 1
        or cov.shape != (len(mean),) * 2
        or not (np.isfinite(mean).all() and np.isfinite(cov).all())
    ):
        raise UserError(
            f"{path}: mu of shape {mean.shape} and sigma of shape {cov.shape} are no mean and covariance of finite numbers"
        )
    return Statistics(mean, cov)
