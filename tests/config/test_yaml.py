import pytest

from fedlp_jax.config.yaml import parse_value, parse_yaml
from fedlp_jax.errors import FedLPError


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1", 1),
        ("-0", 0),
        ("1_000", 1000),
        ("0x1f", 31),
        ("1e-3", 0.001),
        ("+.5", 0.5),
        ("1.", 1.0),
        ("-.inf", float("-inf")),
        ("010", "010"),  # eight to YAML 1.1
        ("1:30", "1:30"),  # ninety
        ("1.5:30", "1.5:30"),
        ("yes", True),
        ("", None),
        ("[1, a]", [1, "a"]),
    ],
)
def test_values_are_what_they_look_like(text, value):
    found = parse_value(text)
    assert (found, type(found)) == (value, type(value))


def test_aliases_repeat_values_within_bounds():
    assert parse_yaml("a: &x [1, 2]\nb: *x\nc: [*x, *x]") == {
        "a": [1, 2],
        "b": [1, 2],
        "c": [[1, 2], [1, 2]],
    }
    many = "a: &x [" + "1, " * 999 + "1]\nb: [" + "*x, " * 400 + "*x]"
    assert len(parse_yaml(many)["b"]) == 401
    with pytest.raises(ValueError, match=r"^, line 2 is not valid YAML: its aliases stand for"):
        parse_yaml(many.replace("b: [", "b: [" + "*x, " * 200))


def test_nesting_has_a_bound():
    assert parse_yaml("[" * 40 + "]" * 40)
    with pytest.raises(ValueError, match="nested more than 40 levels"):
        parse_yaml("[" * 41 + "]" * 41)


def test_a_value_that_is_no_yaml_is_shown_short():
    with pytest.raises(FedLPError) as error:
        parse_value("[" * 10_000)
    assert len(str(error.value)) < 150
