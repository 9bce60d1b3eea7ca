import random

import pytest

from pyseg.errors import SpecError
from pyseg.spec import Spec, StageSpec, parse, parse_list


@pytest.mark.parametrize(
    "text, canonical",
    [
        ("fcn_resnet50", "fcn_resnet50"),
        (" a + b ", "a+b"),
        ("a()+b", "a+b"),
        ("a+crf+crf(iterations=3)+crf", "a+crf+crf(iterations=3)+crf"),
        ("a(x='p+q', y=\"it's\")", "a(x='p+q', y=\"it's\")"),
        ("a+b(k=((3.0, -3),), f=None, g=True)", "a+b(k=((3.0, -3),), f=None, g=True)"),
        ("timm.resnet18+crf", "timm.resnet18+crf"),
        ("a(x=1e-3)", "a(x=0.001)"),
        ("a(x='(')+b", "a(x='(')+b"),
        ("their-dist:a(x='q+r:s') + b.c:d+e", "their-dist:a(x='q+r:s')+b.c:d+e"),
        ("a(x={1: 2}, y={'b+c': 'd'})", "a(x={1: 2}, y={'b+c': 'd'})"),
    ],
)
def test_canonical_text(text, canonical):
    assert str(parse(text)) == canonical
    assert parse(canonical) == parse(text)


def test_specs_of_a_list():
    text = "a, b(x=1, y=(2, 3), z='q,r')+c , their-dist:d(k=[1, 2]),other:e+more:f"
    assert [str(spec) for spec in parse_list(text)] == [
        "a",
        "b(x=1, y=(2, 3), z='q,r')+c",
        "their-dist:d(k=[1, 2])",
        "other:e+more:f",
    ]
    assert parse_list("a") == (parse("a"),)
    for wrong in ("", "a,,b", "a,b(x=prompt)", "a,(b,c)", ",a", "()"):
        with pytest.raises(SpecError):
            parse_list(wrong)
    with pytest.raises(SpecError, match="not a stage"):
        parse("a,b")


def test_random_specs_survive_a_round_trip():
    rng = random.Random()
    values = [0, -1.5, "x+y", "(", "it's", 'say "hi"', None, True, (1, 2), ((3.0, 1),), [1, "a"]]
    for _ in range(200):
        stages = tuple(
            StageSpec(
                rng.choice(["a", "crf", "x.y", "_z", "my-dist:a", "d.e:x.y"]),
                {f"k{i}": rng.choice(values) for i in range(rng.randint(0, 3))},
            )
            for _ in range(rng.randint(1, 4))
        )
        assert parse(str(Spec(stages))) == Spec(stages)


@pytest.mark.parametrize(
    "text, message",
    [
        ("", "empty"),
        ("a+", "does not parse"),
        ("+a", "not a stage"),
        ("a++b", "not a stage"),
        ("a-b", "not a stage"),
        ("a(3)", r"write a\(option=3\)"),
        ("a(x=prompt)", "write x='prompt'"),
        ("a(x=true)", "write x=True"),
        ("a(**k)", r"'\*\*'"),
        ("a(x=1", "does not parse"),
        ("a(x=1, x=2)", "'x' is given twice"),
        ("'a'+b", "not a stage"),
        ("a(x=__import__('os'))", "not a literal"),
        ("a\0b", "does not parse"),
        ("(" * 500 + "a", "does not parse"),
        ("a(x=" + "-" * 900 + "1)", "does not parse"),
        ("a(x=0x" + "f" * 5000 + ")", "finite numbers below 2\\^63"),
        ("a(x=(1, {'k': 1e999}))", "finite numbers"),
        ("a(x={[1]: 2})", "is not a literal"),
        ("a:b:c", "does not parse"),
        ("a+b:", "does not parse"),
        ("a" * 20_000, "20000 characters, at most 10000"),
    ],
)
def test_errors_name_the_place_and_the_remedy(text, message):
    with pytest.raises(SpecError, match=message):
        parse(text)


def test_only_text_and_specs_are_specs():
    with pytest.raises(SpecError, match="must be a string"):
        parse(["a", "b"])
    spec = parse("a+b")
    assert parse(spec) is spec


def test_hostile_text_gives_short_spec_errors():
    """Whatever the text, a Spec or a SpecError of a few lines; never anything else."""
    rng = random.Random()
    pieces = ["a", "crf", "(", ")", "=", "+", "-", "'", '"', ":", ",", "1", "0x", "e9", "\\", "{"]
    pieces += ["}", "[", "]", "None", "**", "x=", "\n", "#", "lambda", " ", ".", "\0", "é", ";"]
    for _ in range(3000):
        text = "".join(rng.choices(pieces, k=rng.randint(1, 12))) * rng.choice([1, 1, 1, 50])
        try:
            found = parse(text)
        except SpecError as error:
            assert len(str(error)) < 500, text
        else:
            assert parse(str(found)) == found
