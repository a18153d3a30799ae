"""Frechet inception distance (arXiv 1706.08500) of two sets of images.

The Inception features of each set are summarised as a Gaussian, whose mean and covariance can be
cached in a file. Read next: models/inception.py.
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

from emu_jax import cli
from emu_jax.batching import pad_batch
from emu_jax.config import UserError
from emu_jax.models import inception

WHERE = (
    "--inception=DIR, FID's Inception. Download pt_inception-2015-12-05-6726825d.pth "
    "(github.com/mseitzer/pytorch-fid, releases, fid_weights) and run: "
    "python -m emu_jax.weights import --family=inception FILE --to=DIR"
)


class Statistics(NamedTuple):
    """Mean and unbiased covariance of the features of a set of images."""

    mean: Float[np.ndarray, "C"]
    cov: Float[np.ndarray, "C C"]


def statistics(features: Float[np.ndarray, "n C"]) -> Statistics:
    """Compute statistics in double precision. Raises UserError for fewer than two images."""
    if len(features) < 2:
        raise UserError(f"FID needs at least two images in each set; a set has {len(features)}")
    features = np.asarray(features, np.float64)
    return Statistics(features.mean(0), np.atleast_2d(np.cov(features, rowvar=False)))


def distance(a: Statistics, b: Statistics) -> float:
    """Frechet distance |mean_a - mean_b|^2 + tr(A + B - 2 (A B)^(1/2)) with covariances A, B.

    tr (A B)^(1/2) is the sum of the square roots of the eigenvalues of A^(1/2) B A^(1/2). That
    matrix is symmetric, so no complex numbers appear and no epsilon is needed when fewer images
    than features make the covariances singular. Raises UserError for features of different widths.
    """
    if a.mean.shape != b.mean.shape:
        raise UserError(
            f"statistics of {len(a.mean)} and of {len(b.mean)} features cannot be compared; "
            "take both from the same layer"
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
    """Inception features of RGB images of any size. Raises UserError for an empty set.

    All batches have the same shape, so that the network is compiled once.
    """
    network = jax.jit(lambda params, x: inception.apply(params, x)[layer])
    prepared = (inception.prepare(jnp.asarray(image[None]))[0] for image in images)
    found = []
    while inputs := list(islice(prepared, batch)):
        padded = jnp.stack(pad_batch(inputs, batch))
        found.append(np.asarray(network(params, padded))[: len(inputs)])
    if not found:
        raise UserError("FID needs images, but got none")
    return np.concatenate(found)


def cached_statistics(path: Path, compute: Callable[[], Statistics]) -> Statistics:
    """Read the statistics in `path`, or compute and save them if the file does not exist."""
    if path.exists():
        return read_statistics(path)
    computed = compute()
    with cli.output_file(path, "wb") as file:
        np.savez(file, mu=computed.mean, sigma=computed.cov)
    return computed


def read_statistics(path: Path) -> Statistics:
    """Read an .npz with mu and sigma, which other FID implementations also use.

    Raises UserError for a file with other contents.
    """
    try:
        with np.load(path, allow_pickle=False) as file:
            mean = file["mu"].astype(np.float64)
            cov = file["sigma"].astype(np.float64)
    except (ValueError, OSError, EOFError, KeyError, AttributeError, zipfile.BadZipFile) as error:
        raise UserError(
            f"{path}: not statistics of a set of images (an .npz with mu and sigma)"
        ) from error
    if (
        mean.ndim != 1
        or cov.shape != (len(mean),) * 2
        or not (np.isfinite(mean).all() and np.isfinite(cov).all())
    ):
        raise UserError(
            f"{path}: mu of shape {mean.shape} and sigma of shape {cov.shape} are not a mean and "
            "a covariance of finite numbers"
        )
    return Statistics(mean, cov)
