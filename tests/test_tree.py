"""The rule language: the first full match wins, and no rule is silently without effect."""

import jax
import pytest

from emu_jax import tree

PARAMS = {
    "vision": {"pos": 1, "blocks": {"q": {"w": 2}, "norm": {"scale": 3}}},
    "a-b": 4,
    "a": {"z": 5},
    "llama": {"w": 6},
}


def test_leaves_are_in_jaxs_order():
    assert [leaf for _, leaf in tree.leaves(PARAMS)] == jax.tree.leaves(PARAMS)
    assert dict(tree.leaves(PARAMS))["vision/blocks/q/w"] == 2


def test_unflatten_is_the_inverse_of_leaves():
    assert tree.unflatten(dict(tree.leaves(PARAMS))) == PARAMS


def test_the_first_row_that_matches_the_whole_path_wins():
    rules = (
        (".*/q/w", "query"),
        ("vision/.*", "vision"),
        ("w", "never a part of a path"),
        (".*", "rest"),
    )
    with pytest.raises(ValueError, match="no parameter needs the row 'w'"):
        tree.by_rule(rules, PARAMS)
    values = tree.by_rule((*rules[:2], rules[3]), PARAMS)
    assert values == {
        "vision": {"pos": "vision", "blocks": {"q": {"w": "query"}, "norm": {"scale": "vision"}}},
        "a-b": "rest",
        "a": {"z": "rest"},
        "llama": {"w": "rest"},
    }


def test_a_leaf_without_a_row_is_named():
    with pytest.raises(ValueError, match="rules.decay: no row covers the parameter 'llama/w'"):
        tree.by_rule((("vision/.*", 1), ("a.*", 2)), PARAMS, "rules.decay")


def test_a_row_that_earlier_rows_leave_nothing_is_named():
    with pytest.raises(
        ValueError,
        match=r"no parameter needs the row 'vision/pos'; "
        r"the parameters are under \['a', 'a-b', 'llama', 'vision'\]",
    ):
        tree.by_rule(((".*", 1), ("vision/pos", 2)), PARAMS)


@pytest.mark.parametrize("rules", [(("(vision", 1),), (("vision/.*",),), ("vision",), (1,)])
def test_an_invalid_row_is_named(rules):
    with pytest.raises(
        ValueError, match=r"rules\.train: .* is not a \(regular expression, value\) row"
    ):
        tree.by_rule(rules, PARAMS, "rules.train")


def test_merge_is_the_inverse_of_split():
    chosen = tree.by_rule(((".*/w", True), (".*", False)), PARAMS)
    yes, no = tree.split(PARAMS, chosen)
    assert yes == {"vision": {"blocks": {"q": {"w": 2}}}, "llama": {"w": 6}}
    assert no == {"vision": {"pos": 1, "blocks": {"norm": {"scale": 3}}}, "a-b": 4, "a": {"z": 5}}
    assert tree.merge(yes, no) == tree.merge(no, yes) == PARAMS
