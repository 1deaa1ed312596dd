"""Whether an answer equals the expected one: True, False, or None if the library has to decide.

False needs certainty: both texts were read in full (answers.py), or the part that was not read
cannot be the expected answer, such as a relation or a negation where a number is expected.
"""

import re
from fractions import Fraction
from itertools import accumulate

from nanocascade.rewards.answers import NEGATED, THOUSANDS, Node, read
from nanocascade.rewards.exact import HIGH, Unknown, close, evaluate
from nanocascade.rewards.latex import clean
from nanocascade.rewards.units import unit_of

KNOWN = (  # commands that a number may be written with
    "log|ln|lg|exp|sqrt|frac|binom|sum|prod|lim|int|pi|e|max|min|gcd|lcm|[lr](?:floor|ceil|vert)|"
    "(?:arc)?(?:sin|cos|tan|cot|sec|csc)h?|cdot|times|div|infty|in|le|ge|to"
)
KNOWN = re.compile(rf"(?:[^\\]|\\(?:{KNOWN})(?![a-z]))*")
MARKS = re.compile(
    r"'|\^\{?(?:T|\\top|\\intercal|\\dagger|c|\*)\}?(?![a-zA-Z])"
    r"|\\(?:bar|overline|d?dot)\s*\{?[A-Za-z]"
)
LETTERS = re.compile(r"(?:[A-Za-z](?:\\times)?){2,}")
MATRICES = re.compile(r"(?:[A-Z](?:\^\{?(?:T|\\top|-1)\}?)?){2,}")
LOOSE_UNIT = re.compile(
    r"(.*[\d.}])\s*([A-Za-z]{1,3}(?:\^\{?\d\}?)?(?:/[A-Za-z]{1,2}(?:\^\{?\d\}?)?)?)"
)
DEGREE = unit_of("degree")  # stands for degrees Celsius too
TEMPERATURES = {DEGREE, unit_of("degree C"), unit_of("degree F")}
MAX_ITEMS = 50  # longer lists are not compared: each item is compared with every other
MAX_DEPTH = 20  # of brackets
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
    nested = accumulate(1 if x in "([{" else -1 for x in re.findall(r"[()\[\]{}]", text))
    if max(nested, default=0) > MAX_DEPTH:
        return [Node("other")]
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
    if a.text and a.text == b.text and a.unit == b.unit:  # 2 mW is not 2 MW
        return True
    if sorted(MARKS.findall(a.text)) != sorted(MARKS.findall(b.text)):
        return False  # f' is not f, a transpose is not the matrix
    if MATRICES.fullmatch(a.text) and MATRICES.fullmatch(b.text):  # do not commute
        return re.sub("[{}]", "", a.text) == re.sub("[{}]", "", b.text)
    kinds = {a.kind, b.kind}
    if kinds == {"tuple"}:
        turned = a.name != b.name and sorted(a.name) == sorted(b.name)  # (x,y) and (y,x)
        return not turned and same_tuple(a.body, b.body)
    if kinds == {"union"} or kinds == {"union", "tuple"}:
        return pairwise_same(*(x.body if x.kind == "union" else [x] for x in (a, b)))
    if kinds & {"list", "set"}:
        if "tuple" in kinds:
            named = a.kind == "list" and len({x.name for x in a.body} - {""}) > 1
            return pairwise_same(a.body, b.body[1]) if named else False if "set" in kinds else None
        return None if "other" in kinds else same_items(a, b)
    if kinds == {"num"}:
        return same_number(a, b)
    if kinds == {"code"}:
        return a.body == b.body and (a.name == b.name or not (a.name and b.name))
    if kinds == {"code", "num"}:  # a base that only one side names
        return a.text.partition("_")[0] == b.text.partition("_")[0]
    if kinds <= {"word", "num"}:
        return a.text.strip("()").casefold() == b.text.strip("()").casefold()
    if b.kind == "equation":
        return None
    return unread(a, b) if "other" in kinds or a.kind == "equation" else False


def same_tuple(one, two):
    """Compare two bodies (bracket, Nodes, bracket). Of a pair, an interval, the brackets count."""
    if len(one[1]) == 2 and (one[0], one[2]) != (two[0], two[2]):
        return False
    return pairwise_same(one[1], two[1])


def unread(a, b):
    """The verdict where one of two Nodes was not read in full: False or None."""
    if b.body == "contradiction":
        return False
    if a.kind == "equation" and b.kind == "num" and not b.name:
        return False
    if a.kind not in ("num", "word", "code") or a.letters:
        return None
    if b.body == "relation" or "|" in b.text.strip("|") or not KNOWN.fullmatch(b.text):
        return False
    worded = re.search(r"(?<![\\A-Za-z])[^\W\d_]{3}|[@;]|[^\w\x00-\x7f]", b.text)
    several = worded and len(re.findall(r"\d+(?:\.\d+)?", b.text)) > 1  # "between 16 and 18"
    return False if NEGATED.search(b.text) or several else None


# ---- Numbers -------------------------------------------------------------------------------------


def same_number(a, b):
    """Compare two values with their units. A missing unit is forgiven."""
    one, two = (re.fullmatch(r"[A-Za-z]\(([A-Za-z])\)", x.name) for x in (a, b))
    if one and two and one[1] != two[1] and one[1] not in b.letters:  # f(x) = ..., g(t) = ...
        return same(a, read(re.sub(rf"(?<![A-Za-z\\]){two[1]}(?![A-Za-z])", one[1], b.text)))
    if LETTERS.fullmatch(a.text) and (LETTERS.fullmatch(b.text) or not b.letters):  # no product
        return a.text.replace("\\times", "") == b.text.replace("\\times", "")
    x, y = a.body, b.body
    units = {a.unit, b.unit}
    if None not in units and not (DEGREE in units and units <= TEMPERATURES):
        x, y = x * a.unit, y * b.unit
    if close(x, y) or is_rounded(a, b) or is_rounded(b, a):
        return True
    if a.text.endswith("%") and close(x, y / 100):
        return "%" not in b.text and not b.unit  # percent are expected, and the sign is missing
    if bool(a.letters) != bool(b.letters):
        lettered, other = (a, b) if a.letters else (b, a)
        unit = loose_unit(lettered)
        return same_number(unit, other) if unit else None if a.letters else False
    return None if a.name != b.name and a.letters else False


def is_rounded(decimal, other):
    """Whether a decimal of MIN_FIGURES rounds, or cuts off, a value that is not a decimal."""
    match = re.fullmatch(r"[+-]?(\d*)\.(\d+)", decimal.text.replace(",", ""))
    if not match or len((match[1] + match[2]).lstrip("0")) < MIN_FIGURES or "." in other.text:
        return False
    if other.letters - {"e"}:
        return False
    difference = HIGH.convert(abs(decimal.body + -other.body))
    return difference < HIGH.convert(Fraction(1, 10 ** len(match[2])))


def loose_unit(node):
    """5m as five metres, to be compared with a number without letters; None if m is no unit."""
    match = LOOSE_UNIT.fullmatch(node.text)
    if not match or not (unit := unit_of(match[2])):
        return None
    value, letters = evaluate(match[1])
    return Node("num", value, match[1], node.name, unit, letters)


# ---- Lists and sets ------------------------------------------------------------------------------


def same_items(a, b):
    """Compare sets, lists and single values. The order only counts if the expected items have
    different names, as in x = 1, y = 2, and the given ones have none."""
    wanted, given = ([*x.body] if x.kind in ("set", "list") else [x] for x in (a, b))
    names = [x.name for x in wanted]
    if max(len(wanted), len(given)) > MAX_ITEMS or len(set(names)) not in (1, len(names)):
        return None
    if len(set(names)) > 1 and all(names):
        if b.kind == "set":  # {2, 9} does not say which is x
            return False
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
