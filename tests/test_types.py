import numpy as np
import pytest

from fedlp_jax.errors import FedLPError, check_array, check_choice, check_number, nearest


@pytest.mark.parametrize(
    ("word", "known", "hint"),
    [
        ("kep", ["keep", "epochs"], "; did you mean 'keep'?"),
        ("fedlp-homo", ["fedlp_homo", "fedlp_hetero"], "; did you mean 'fedlp_homo'?"),
        ("TINY", ["Tiny"], "; did you mean 'Tiny'?"),
        ("colour", ["keep"], ""),
        (7, ["keep"], ""),
        ("keep", [], ""),
    ],
)
def test_the_nearest_word_is_suggested(word, known, hint):
    assert nearest(word, known) == hint


def test_a_suggestion_may_be_shown_in_another_form():
    assert nearest("leters", {"letters"}, "emnist/{}".format) == "; did you mean 'emnist/letters'?"


def test_a_choice_is_one_of_the_known_words():
    check_choice("weighting", "uniform", ("examples", "uniform"))
    with pytest.raises(FedLPError) as error:
        check_choice("weighting", "unifrom", ("examples", "uniform"))
    assert str(error.value) == (
        "weighting 'unifrom' is unknown; did you mean 'uniform'? Known: examples, uniform."
    )
    with pytest.raises(FedLPError, match="weighting 'size' is unknown. Known: examples, uniform."):
        check_choice("weighting", "size", ("examples", "uniform"))


@pytest.mark.parametrize("value", [3, np.int64(3), np.uint8(3)])
def test_numpy_integers_become_ints(value):
    assert type(check_number("rounds", value, ge=3, integer=True)) is int


@pytest.mark.parametrize("value", [0, 0.5, np.float32(0.5), np.float64(1), 1])
def test_numbers_within_bounds_pass(value):
    assert check_number("keep", value, ge=0, le=1) == value


@pytest.mark.parametrize("value", [2, -1, 3.0, True, np.bool_(True), np.float32(3), "3", None])
def test_other_values_are_not_whole_numbers(value):
    says = r"^rounds=.* must be a whole number of at least 3, or None: lower it\.$"
    with pytest.raises(FedLPError, match=says):
        check_number("rounds", value, ge=3, integer=True, optional=True, hint="lower it")


@pytest.mark.parametrize(
    ("value", "bounds", "says"),
    [
        (float("nan"), {}, "x=nan must be a number."),
        (float("inf"), {"gt": 0}, "x=inf must be a number above 0."),
        (10**400, {"lt": 5}, "x=about 2**1328 must be a number below 5."),
        (1.5, {"ge": 0, "le": 1}, "x=1.5 must be a number in [0, 1]."),
        (0, {"gt": 0, "lt": 1}, "x=0 must be a number in (0, 1)."),
        (2, {"le": 1}, "x=2 must be a number of at most 1."),
    ],
)
def test_the_sentence_has_the_bounds(value, bounds, says):
    with pytest.raises(FedLPError) as error:
        check_number("x", value, **bounds)
    assert str(error.value) == says


def test_arrays_are_checked_entry_by_entry():
    np.testing.assert_array_equal(check_array("x", [0, 1], ge=0, le=1), [0.0, 1.0])
    with pytest.raises(FedLPError, match=r"^x=2 must be a number in \[0, 1\]: why\.$"):
        check_array("x", [0.5, 2.0, -1.0], ge=0, le=1, hint="why")
    for value in ("many", [[1], [2, 3]], {"a": 1}, [10**400]):
        with pytest.raises(FedLPError, match="is not a number or an array of numbers"):
            check_array("x", value)
