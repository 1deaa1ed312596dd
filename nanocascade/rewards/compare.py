"""Whether an answer equals the expected one: True, False, or None if the library has to decide.

False needs certainty: both texts were read in full (answers.py), or the part that was not read
cannot be the expected answer, such as a relation or a negation where a number is expected.
"""

import re
from decimal import Decimal
from fractions import Fraction

from nanocascade.rewards.answers import (
    KNOWN,
    LOOSE_UNIT,
    MARKS,
    NEGATED,
    NUMERALS,
    THOUSANDS,
    Node,
    as_ranges,
    read,
)
from nanocascade.rewards.exact import Reader, Unknown, approximate, constant
from nanocascade.rewards.latex import clean
from nanocascade.rewards.units import unit_of

MAX_ITEMS = 50  # longer lists are not compared: each item is compared with every other
MIN_FIGURES = 6  # significant figures of a decimal that may stand for a third, a root or pi


def equal(gold, given):
    """Compare the expected answer with a given one, both as LaTeX or plain text."""
    try:
        return any_of(same(x, y) for x in readings(gold, True) for y in readings(given, False))
    except (Unknown, ArithmeticError):
        return None


def readings(text, gold):
    """The Nodes that a text may stand for: 1,234 is a number or a list, 3,14 may be a decimal."""
    text = clean(text)
    texts = [text]
    if re.fullmatch(THOUSANDS, text):
        texts.append(text.replace(",", ", "))
    if match := re.match(r'\(\s*"([A-J])"\s*\)\s*(?=\S)', text):  # an option's letter and its value
        texts = [f'"{match[1]}"', text[match.end() :]]
    comma = re.fullmatch(r"([+-]?)(\d{1,3}(?:[ .]\d{3})+|\d+),(\d+)([^,\d]*)", text)
    if comma and not gold and not re.fullmatch(THOUSANDS, text):
        sign, whole, decimals, rest = comma.groups()
        texts.append(f"{sign}{re.sub('[ .]', '', whole)}.{decimals}{rest}")
    return [read(x) for x in texts]


def any_of(verdicts):
    """True if one is, else None if one is unknown, else False."""
    verdicts = list(verdicts)
    return True if True in verdicts else None if None in verdicts else False


def all_of(verdicts):
    """False if one is, else None if one is unknown, else True."""
    verdicts = list(verdicts)
    return False if False in verdicts else None if None in verdicts else True


def pairwise_same(one, two):
    """Compare two sequences of Nodes item by item."""
    if len(one) != len(two):
        return False
    return all_of(same(x, y) for x, y in zip(one, two, strict=True))


def same(a, b):
    """Compare the expected Node `a` with a given Node `b`."""
    if a.text and a.text == b.text:
        return True
    if sorted(MARKS.findall(a.text)) != sorted(MARKS.findall(b.text)):
        return False  # f' is not f, a transpose is not the matrix
    kinds = {a.kind, b.kind}
    if kinds <= {"ranges", "tuple"} and ("ranges" in kinds or "[" in a.body + b.body):
        one, two = as_ranges(a), as_ranges(b)
        if one.kind == two.kind == "ranges":
            return same_intervals(one.body, two.body)
        if "ranges" in kinds:
            return None
    if kinds == {"tuple"}:
        return pairwise_same(a.body[1], b.body[1])
    if kinds & {"list", "set"}:
        if "tuple" in kinds:
            return False if "set" in kinds else None
        return None if "other" in kinds else same_items(a, b)
    if kinds == {"num"}:
        return same_number(a, b)
    if kinds == {"code"}:
        return a.body == b.body and (a.name == b.name or not (a.name and b.name))
    if len(kinds) == 1 and kinds <= {"word", "letters", "inf", "cycles", "based"}:
        return a.body == b.body and a.body is not None
    if kinds in ({"word", "num"}, {"word", "letters"}):
        return a.text.strip("()").casefold() == b.text.strip("()").casefold()
    if kinds == {"letters", "num"}:
        letters, value = (a, b) if a.kind == "letters" else (b, a)
        return Reader(" ".join(letters.body)).value() == value.body
    if kinds == {"based", "num"}:
        return a.text.partition("_")[0] == b.text.partition("_")[0]
    if b.kind == "equation":
        return None
    return unread(a, b) if "other" in kinds or a.kind == "equation" else False


def unread(a, b):
    """The verdict where one of two Nodes was not read in full: False or None."""
    if b.body == "contradiction":
        return False
    if a.kind == "equation" and b.kind == "num" and not b.name:
        return False
    if a.kind not in ("num", "inf", "word", "code", "based") or a.kind == "num" and a.body.letters:
        return None
    if b.body == "relation" or "|" in b.text.strip("|") or not KNOWN.fullmatch(b.text):
        return False
    worded = re.search(r"(?<![\\a-z])[a-z]{3}", b.text)
    several = worded and len(NUMERALS.findall(b.text)) > 1  # "between 16 and 18"
    return False if NEGATED.search(b.text) or several else None


# ---- Numbers -------------------------------------------------------------------------------------


def same_number(a, b):
    """Compare two values with their units. A missing unit is forgiven."""
    one, two = (re.fullmatch(r"[A-Za-z]\(([A-Za-z])\)", x.name) for x in (a, b))
    if one and two and one[1] != two[1] and one[1] not in b.body.letters:  # f(x) = ..., g(t) = ...
        return same(a, read(re.sub(rf"(?<![A-Za-z\\]){two[1]}(?![A-Za-z])", one[1], b.text)))
    x, y = a.body, b.body
    if a.unit and b.unit:
        if a.unit[1] != b.unit[1]:
            return False
        x, y = x * constant(a.unit[0]), y * constant(b.unit[0])
    if x == y or is_rounded(a, b) or is_rounded(b, a):
        return True
    if a.text.endswith("%") and x == y * constant(Fraction(1, 100)):
        return "%" not in b.text and not b.unit  # percent are expected, and the sign is missing
    if bool(x.letters) != bool(y.letters):
        lettered, other = (a, b) if x.letters else (b, a)
        unit = loose_unit(lettered)
        return same_number(unit, other) if unit else None if x.letters else False
    return None if a.name != b.name and x.letters else False


def is_rounded(decimal, other):
    """Whether a decimal of MIN_FIGURES rounds, or cuts off, a value that is not a decimal."""
    match = re.fullmatch(r"[+-]?(\d*)\.(\d+)", decimal.text.replace(",", ""))
    if not match or len((match[1] + match[2]).lstrip("0")) < MIN_FIGURES or "." in other.text:
        return False
    written, exact = approximate(decimal.body), approximate(other.body)
    return exact is not None and abs(written - exact) < Decimal(1).scaleb(-len(match[2]))


def loose_unit(node):
    """5m as five metres, to be compared with a number without letters; None if m is no unit."""
    match = LOOSE_UNIT.fullmatch(node.text)
    if not match or not (unit := unit_of(match[2])):
        return None
    return Node("num", Reader(match[1]).value(), match[1], node.name, unit)


# ---- Lists, sets and intervals -------------------------------------------------------------------


def same_intervals(one, two):
    """Compare sorted lists of (low, closed, high, closed); None stands for no bound."""
    if len(one) != len(two):
        return False
    ends = [pair for x, y in zip(one, two, strict=True) for pair in zip(x, y, strict=True)]
    nodes = [isinstance(x, Node) and isinstance(y, Node) for x, y in ends]
    return all_of(same(*p) if both else p[0] == p[1] for p, both in zip(ends, nodes, strict=True))


def same_items(a, b):
    """Compare sets, lists and single values. The order only counts if the expected items have
    different names, as in x = 1, y = 2, and the given ones have none."""
    wanted, given = ([*x.body] if x.kind in ("set", "list") else [x] for x in (a, b))
    names = [x.name for x in wanted]
    if max(len(wanted), len(given)) > MAX_ITEMS or len(set(names)) not in (1, len(names)):
        return None
    if len(set(names)) > 1 and all(names):
        if sorted(x.name for x in given) == sorted(names):
            given = [next(x for x in given if x.name == name) for name in names]
        elif any(x.name for x in given):
            return None
        return pairwise_same(wanted, given)
    wanted, given = distinct(wanted), distinct(given)
    if len(wanted) != len(given):
        return False
    return all_of(any_of(same(x, y) for y in given) for x in wanted)


def distinct(nodes):
    """The Nodes without repeated values."""
    unique = []
    for node in nodes:
        if not any(same(x, node) for x in unique):
            unique.append(node)
    return unique
