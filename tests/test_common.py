"""The command line's numbers, and which flags were given."""

import pytest

import common
from common import BadInput, Parser


def parser():
    p = Parser("test")
    p.add_argument("--n", type=common.positive_int, default=3)
    p.add_argument("--save-every", type=common.natural, default=5)
    p.add_argument("--beta", type=common.positive)
    p.add_argument("--lr", type=common.not_negative)
    p.add_argument("--mix", type=common.fraction)
    p.add_argument("--k", type=common.ranged(int, "2 or more", lambda k: k >= 2))
    p.add_argument("--quiet", action="store_true")
    return p


def test_numbers_in_range():
    args = parser().parse_args("--n 1 --save-every 0 --beta 1e-9 --lr 0 --mix 1 --k 2".split())
    assert (args.n, args.save_every, args.beta, args.lr, args.mix, args.k) == (1, 0, 1e-9, 0, 1, 2)
    assert all(type(n) is int for n in (args.n, args.save_every, args.k))
    assert parser().parse_args(["--mix", "0"]).mix == 0


@pytest.mark.parametrize(
    "flag, value, needed",
    [
        ("--n", "0", "a whole number, 1 or more"),
        ("--n", "1.5", "a whole number, 1 or more"),
        ("--n", "one", "a whole number, 1 or more"),
        ("--save-every", "-1", "a whole number, 0 or more"),
        ("--beta", "0", "a number, more than 0"),
        ("--beta", "nan", "a number, more than 0"),
        ("--beta", "inf", "a number, more than 0"),
        ("--lr", "-1e-9", "a number, 0 or more"),
        ("--lr", "nan", "a number, 0 or more"),
        ("--mix", "1.0001", "a number, 0 to 1"),
        ("--mix", "-0.1", "a number, 0 to 1"),
        ("--k", "1", "a whole number, 2 or more"),
    ],
)
def test_numbers_out_of_range(flag, value, needed):
    with pytest.raises(
        BadInput, match=f"argument {flag}: '{value}' was given; {needed}, is needed"
    ):
        parser().parse_args([f"{flag}={value}"])


def test_flags_that_were_given():
    assert parser().parse_args([]).given == set()
    given = parser().parse_args(["--save-every=5", "--quiet", "--n", "3"]).given
    assert given == {"save_every", "quiet", "n"}, "a flag counts although it repeats its default"
    with pytest.raises(BadInput, match="--sav"):
        parser().parse_args(["--sav", "3"])
