"""Pages stand alone; charts keep their curves inside and in scale."""

import re

import numpy as np
import pytest

from emu_jax import html
from emu_jax.html import Curve
from tests.support.pages import Page


@pytest.mark.parametrize("log", [False, True])
@pytest.mark.parametrize(
    "values",
    [
        [3.0],
        [1.0, 1.0],
        [0.0, 0.0],
        [1e-6, 3.0, 2e5],
        [0.9, 1.1, 1.3],
        [7.65, 0.8],
        list(np.linspace(9, 0.1, 2000)),
    ],
)
def test_curves_stay_in_their_chart(values, log):
    svg = html.chart(
        "x",
        [
            Curve("training", list(enumerate(values, 1))),
            Curve("held out", list(enumerate(values, 1))[-3:], True),
        ],
        log=log,
    )
    if log and not any(values):
        assert svg == ""
        return
    Page(svg)
    places = [
        tuple(map(float, pair.split(",")))
        for points in re.findall(r'points="([^"]*)"', svg)
        for pair in points.split()
    ]
    places += [tuple(map(float, pair)) for pair in re.findall(r'cx="([^"]*)" cy="([^"]*)"', svg)]
    assert places and all(46 <= x <= 392 and 10 <= y <= 206 for x, y in places)
    assert len(places) <= 3 * html.MAX_POINTS
    rules = [float(y) for y in re.findall(r'<line[^>]* y1="([^"]*)"', svg)]
    assert 2 <= len(rules) <= 8 and all(10 <= y <= 206 for y in rules)


def test_a_chart_shows_its_values():
    svg = html.chart("x", [Curve("a", [(0, 1.0), (50, 100.0), (100, 10.0)], True)], log=True)
    first, second, third = [
        (float(x), float(y)) for x, y in re.findall(r'cx="([^"]*)" cy="([^"]*)"', svg)
    ]
    # The values 1, 10 and 100 are equally far apart on the logarithmic axis.
    assert first[1] > third[1] > second[1] and first[1] - third[1] == pytest.approx(
        third[1] - second[1], abs=0.2
    )
    assert second[0] - first[0] == pytest.approx(third[0] - second[0], abs=0.2)


def test_thinning_keeps_the_mean():
    points = [(float(k), float(k * k)) for k in range(960)]
    thin = html.thinned(points)
    assert len(thin) == 240 and np.mean(thin, 0) == pytest.approx(np.mean(points, 0))
