import numpy as np
import pytest

from fedlp_jax.errors import FedLPError, check_choice, nearest, whole_number


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
def test_whole_numbers_of_numpy_are_whole_numbers(value):
    assert type(whole_number("rounds", value, 3)) is int


@pytest.mark.parametrize("value", [2, -1, 3.0, True, np.bool_(True), np.float32(3), "3", None])
def test_other_things_are_not(value):
    with pytest.raises(FedLPError, match="rounds=.* must be a whole number of at least 3, or 0"):
        whole_number("rounds", value, 3, ", or 0")
