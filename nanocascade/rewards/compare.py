"""Whether an answer says the same as the expected one: yes, no, or None: let the library say.

A no is only said where both were read (answers.py), or where what was not read is certainly no such
thing: two values for one, a relation or a negation for a number.
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
from nanocascade.rewards.exact import Reader, Unknown, Value, approximate, constant
from nanocascade.rewards.latex import clean
from nanocascade.rewards.units import unit_of

MAX_ITEMS = 50  # of a list: every one is compared with every other


def rounded(decimal, other):
    """Whether a decimal of six figures or more rounds, or cuts, a value that is not written so."""
    match = re.fullmatch(r"[+-]?(\d*)\.(\d+)", decimal.text.replace(",", ""))
    if not match or len((match[1] + match[2]).lstrip("0")) < 6 or "." in other.text:
        return False
    written, exact = approximate(decimal.body), approximate(other.body)
    return exact is not None and abs(written - exact) < Decimal(1).scaleb(-len(match[2]))


def loose_unit(node):
    """5m as five metres, where the other side has no letters."""
    match = LOOSE_UNIT.fullmatch(node.text)
    if not match or not (unit := unit_of(match[2])):
        return None
    try:
        return Node("num", Reader(match[1]).value(), match[1], node.name, unit)
    except (Unknown, ArithmeticError):
        return None


def renamed(a, b):
    """b with the letter of its g(t) = ... called as in a's f(x) = ..."""
    one, two = (re.fullmatch(r"[A-Za-z]\(([A-Za-z])\)", x.name) for x in (a, b))
    if not one or not two or one[1] == two[1] or one[1] in b.body.letters:
        return b
    turned = [
        {
            tuple(sorted(((one[1] if n == two[1] else n, p) for n, p in m), key=str)): c
            for m, c in x.items()
        }
        for x in (b.body.num, b.body.den)
    ]
    return b._replace(body=Value(*turned))


def same_number(a, b):
    b = renamed(a, b)
    x, y = (
        node.body * constant(node.unit[0]) if a.unit and b.unit else node.body for node in (a, b)
    )
    if a.unit and b.unit and a.unit[1] != b.unit[1]:
        return False
    if x == y or rounded(a, b) or rounded(b, a):
        return True
    if a.text.endswith("%") and a.body == b.body * constant(Fraction(1, 100)):
        return "%" not in b.text and not b.unit  # so many percent, the sign left out
    if bool(a.body.letters) != bool(b.body.letters):
        lettered, other = (a, b) if a.body.letters else (b, a)
        unit = loose_unit(lettered)
        return same_number(unit, other) if unit else None if a.body.letters else False
    return None if a.name != b.name and a.body.letters else False


def same_items(a, b):
    """Sets and lists: the order counts only where the expected list names its values."""
    wanted, given = ([*x.body] if x.kind in ("set", "list") else [x] for x in (a, b))
    if max(len(wanted), len(given)) > MAX_ITEMS:
        return None
    names = [x.name for x in wanted]
    if len(set(names)) not in (1, len(names)):
        return None
    if len(names) > 1 and all(names) and len(set(names)) > 1:
        if {x.name for x in given} == set(names) and len(given) == len(names):
            given = [next(y for y in given if y.name == name) for name in names]
        elif any(x.name for x in given):
            return None
        return together(
            [len(wanted) == len(given)] + [same(x, y) for x, y in zip(wanted, given, strict=False)]
        )
    wanted, given = distinct(wanted), distinct(given)
    if len(wanted) != len(given):
        return False
    verdicts = [[same(x, y) for y in given] for x in wanted]
    if all(True in row for row in verdicts):
        return True
    return False if any(not {True, None} & {*row} for row in verdicts) else None


def distinct(nodes):
    unique = []
    for node in nodes:
        if not any(same(x, node) for x in unique):
            unique.append(node)
    return unique


def together(verdicts):
    return False if False in verdicts else None if None in verdicts else True


def same(a, b):
    """Whether the expected Node and a given one are equal; None if we cannot tell."""
    if a.text and a.text == b.text:
        return True
    kinds = {a.kind, b.kind}
    if sorted(MARKS.findall(a.text)) != sorted(MARKS.findall(b.text)):
        return False
    if (
        "ranges" in kinds
        and kinds & {"ranges", "tuple"} == kinds
        or kinds == {"tuple"}
        and "[" in f"{a.body}{b.body}"
    ):
        x, y = as_ranges(a), as_ranges(b)
        if x.kind == y.kind == "ranges" and len(x.body) == len(y.body):
            ends = [
                (p, q)
                for one, two in zip(x.body, y.body, strict=True)
                for p, q in zip(one, two, strict=True)
            ]
            return together(
                [
                    p == q if not (isinstance(p, Node) and isinstance(q, Node)) else same(p, q)
                    for p, q in ends
                ]
            )
        if "ranges" in (x.kind, y.kind):
            return False if x.kind == y.kind else None
    if kinds == {"tuple"}:
        x, y = a.body[1], b.body[1]
        return together([len(x) == len(y)] + [same(p, q) for p, q in zip(x, y, strict=False)])
    if kinds & {"list", "set"}:
        if "tuple" in kinds:
            return False if "set" in kinds else None
        return None if "other" in kinds else same_items(a, b)
    if kinds == {"num"}:
        return same_number(a, b)
    if kinds == {"word", "num"} or kinds == {"word", "letters"}:
        return a.text.strip("()").casefold() == b.text.strip("()").casefold()
    if kinds == {"letters", "num"}:
        return (
            Reader(" ".join((a if a.kind == "letters" else b).body)).value()
            == (b if a.kind == "letters" else a).body
        )
    if kinds == {"based", "num"}:
        return a.text.partition("_")[0] == b.text.partition("_")[0]
    if kinds == {"code"}:
        return a.body == b.body and (a.name == b.name or not (a.name and b.name))
    if kinds in ({"word"}, {"letters"}, {"inf"}, {"cycles"}, {"based"}):
        return a.body == b.body and a.body is not None
    if b.kind == "equation":
        return None
    if "other" in kinds or a.kind == "equation":
        return unread(a, b)
    return False


def unread(a, b):
    """One of the two was not read in full: only what is certainly wrong is said."""
    if b.body == "contradiction":
        return False
    if a.kind == "equation" and b.kind == "num" and not b.name:
        return False
    plain = a.kind in ("num", "inf", "word", "code", "based") and not (
        a.kind == "num" and a.body.letters
    )
    strange = b.body == "relation" or "|" in b.text.strip("|") or not KNOWN.fullmatch(b.text)
    if plain and (strange or NEGATED.search(b.text)):
        return False
    worded = re.search(r"(?<![\\a-z])[a-z]{3}", b.text)
    return False if plain and worded and len(NUMERALS.findall(b.text)) > 1 else None


def readings(text, gold):
    """The Nodes that a text may stand for, the likeliest first."""
    text = clean(text)
    texts = [text]
    if re.fullmatch(THOUSANDS, text):
        texts.append(text.replace(",", ", "))
    if match := re.match(r'\(\s*"([A-J])"\s*\)\s*(?=\S)', text):  # an option's letter and its value
        texts = [f'"{match[1]}"', text[match.end() :]]
    comma = re.fullmatch(r"([+-]?)(\d{1,3}(?:[ .]\d{3})+|\d+),(\d+)([^,\d]*)", text)
    if comma and not gold and not re.fullmatch(THOUSANDS, text):  # 3,14 is a decimal in an answer
        texts.append(f"{comma[1]}{re.sub('[ .]', '', comma[2])}.{comma[3]}{comma[4]}")
    return [read(x) for x in texts]


def equal(gold, given):
    """True, False, or None if it takes more than we read."""
    try:
        verdicts = [same(x, y) for x in readings(gold, True) for y in readings(given, False)]
    except (Unknown, ArithmeticError):
        return None
    return True if True in verdicts else None if None in verdicts else False
