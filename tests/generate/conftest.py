"""The small model (small.py), compiled once for all tests of this folder."""

import numpy as np
import pytest

from tests.support.small import Uncached, make_session


@pytest.fixture(scope="session")
def session():
    return make_session()


@pytest.fixture(scope="session")
def uncached(session):
    return Uncached(session)


@pytest.fixture(scope="session")
def images():
    return list(np.random.default_rng(0).integers(0, 256, (5, 28, 28, 3), np.uint8))
