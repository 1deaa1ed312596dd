r"""Read a short mathematical answer into a Node, which compare.py compares with another.

    r"x = 5"              Node("num", 5, name="x")
    r'90 "km"/"h"'        Node("num", 90, unit=(5/18, {m: 1, s: -1}))
    "3; 8"                Node("list", (3, 8))
    r"(-\infty,5]"        Node("tuple", ("(", (-inf, 5), "]"))
    r"x<0; x\ge 2"        Node("ranges", ((None, False, 0, False), (2, True, None, False)))

The text is in the spelling of latex.py. Values side by side are a list, whatever separates them.
"""

import re
from decimal import Decimal
from fractions import Fraction
from functools import lru_cache
from operator import itemgetter
from typing import NamedTuple

from nanocascade.rewards.exact import Reader, Unknown, approximate, constant
from nanocascade.rewards.latex import squeeze
from nanocascade.rewards.units import unit_of


class Node(NamedTuple):
    """kind -> body: num a Value, inf whether negative, word and letters a text, list and set their
    Nodes, tuple (bracket, Nodes, bracket), ranges sorted intervals, cycles of a permutation, code
    numbers that are no arithmetic (a date, a time, a ratio), based an integer, equation its right
    side, other what was not read ("relation" and "contradiction" say why)."""

    kind: str
    body: object = None
    text: str = ""  # the whole text, for comparison as text
    name: str = ""  # what it is the value of: the x of x = 5
    unit: tuple | None = None  # (scale, {base: power}); None if there is none or it is unknown


EMPTY = {"nosolution", "nosolutions", "norealsolution", "norealsolutions", "none", "emptyset"}
EMPTY |= {"\\emptyset", "\\{\\}", "thereisnosolution", "therearenosolutions"}
THOUSANDS = r"(?<![\d.,])\d{1,3}(?:,\d{3})+(?![\d,])"
ARROWS = (
    r"\\(?:mid|to|Rightarrow|iff|Leftrightarrow|mapsto|propto|cap|setminus|subset|subseteq|dots)"
)
RELATION = (
    r"=|<|>|\\(?:le|ge|ne|in|approx|sim|simeq|equiv|cong|notin)(?![a-zA-Z])|:(?!\d)|(?<!\d):|"
    + ARROWS
    + "(?![a-zA-Z])"
)
NEGATED = re.compile(r"(?i)not(?![a-z])|never|except|neither|unless|without|wrong|\bno(?![a-z])")
KNOWN = (  # commands that a number may be written with
    "log|ln|lg|exp|sqrt|frac|binom|sum|prod|lim|int|pi|e|max|min|gcd|lcm|[lr](?:floor|ceil|vert)|"
    "(?:arc)?(?:sin|cos|tan|cot|sec|csc)h?|cdot|times|div|infty|in|le|ge|to"
)
KNOWN = re.compile(rf"(?:[^\\]|\\(?:{KNOWN})(?![a-z]))*")
NUMERALS = re.compile(r"\d+(?:\.\d+)?")
MARKS = re.compile(
    r"'|\^\{?(?:T|\\top|\\intercal|\\dagger|c|\*)\}?(?![a-zA-Z])"
    r"|\\(?:bar|overline|d?dot)\s*\{?[A-Za-z]"
)
UNIT = re.compile(
    r'(.*?[\d)}!%\w])\s*("[^"]+"(?:\^?\{?-?\d\}?)?(?:\s*/\s*"[^"]+"(?:\^?\{?\d\}?)?)?'
    r'|[kM]?\\Omega|\\mu\s*"?m"?)',
    re.DOTALL,
)
LOOSE_UNIT = re.compile(
    r"(.*[\d.}])\s*([A-Za-z]{1,3}(?:\^\{?\d\}?)?(?:/[A-Za-z]{1,2}(?:\^\{?\d\}?)?)?)"
)
INTERVAL = re.compile(r"([(\[\]])([^()\[\]]+)([)\]\[])")
OPENING, CLOSING = ("(", "[", "{", "\\{", "\\begin"), (")", "]", "}", "\\}", "\\end")


def pieces(text, pattern, grouped=True):
    """Split at a pattern outside brackets: "(1,2), 3" -> (["(1,2)", "3"], [","]). With `grouped`
    the comma of 1,234 does not split."""
    numbers = THOUSANDS if grouped else r"(?!)"
    signs = rf'"[^"]*"|\\[{{}}]|\\begin|\\end|[()\[\]{{}}]|(?P<cut>{pattern})|{numbers}'
    if grouped:
        signs = f"{numbers}|{signs}"
    depth, start, parts, cuts = 0, 0, [], []
    for match in re.finditer(signs, text):
        sign = match[0]
        if sign in OPENING:
            depth += 1
        elif sign in CLOSING:
            depth -= 1
        elif match["cut"] and depth == 0:
            parts.append(text[start : match.start()].strip())
            cuts.append(sign)
            start = match.end()
    return [*parts, text[start:].strip()], cuts


def enclosed(text, opening, closing):
    """Whether the first bracket of a text is closed by its last character."""
    if not (text.startswith(opening) and text.endswith(closing)) or len(text) < 2:
        return False
    depth = 0
    for match in re.finditer(r"\\[{}]|[()\[\]{}]", text):
        depth += (match[0] in OPENING) - (match[0] in CLOSING)
        if depth == 0:
            return match.end() == len(text)
    return False


@lru_cache(2048)
def read(text, depth=0):
    """A cleaned text as a Node."""
    text = re.sub(
        r'^(?:\\(?:approx|sim)(?![a-zA-Z])|"(?:about|approximately|approx|roughly)")\s*', "", text
    )
    text = re.sub(r"\s*\(?\\[pb]?mod\s*\{?\w+\}?\)?$", "", text).rstrip(" .,;:").lstrip(" ,;:")
    for _ in range(4):
        text = text[1:-1].strip() if enclosed(text, "{", "}") else text
    node = interpret(text, depth) if text and depth < 8 else Node("other")
    return node._replace(text=squeeze(text))


def interpret(text, depth):
    """The Node of a text that is not empty: first as several values, then as one."""
    if squeeze(text).strip("()") in EMPTY:
        return Node("set", ())
    parts, cuts = pieces(text, "[;,]")
    parts = [x for x in parts if x.strip(" .")]
    items = [read(x, depth + 1) for x in parts if len(parts) > 1]
    if items and not INTERVAL.fullmatch(text):
        either = {*cuts} == {";"} and all(x.kind == "ranges" for x in items)
        return union(items) if either else Node("list", tuple(items))
    if len(re.findall(r"\\(?:pm|mp)", text)) == 1:
        both = [re.sub(r"\\(?:pm|mp)", sign, text) for sign in "+-"]
        return Node("list", tuple(read(x, depth + 1) for x in both))
    parts, cuts = pieces(text, RELATION)
    if cuts and not re.fullmatch(r"\s*\d+(\s*:\s*\d+)+\s*", text):
        return relation(parts, cuts, depth)
    parts, cuts = pieces(text, r"\\cup(?![a-zA-Z])")
    if cuts:
        return union([read(x, depth + 1) for x in parts])
    letters = re.sub(r"\\times|\s", "", text)
    if re.fullmatch("[A-Za-z]{2,}", letters):  # in this order: no product
        return Node("letters", letters)
    for reading in (brackets, codes, number):
        if node := reading(text, depth):
            return node
    words = re.fullmatch(r'[()]*"([^"]*)"[()]*', text)
    return Node("word", squeeze(f'"{words[1]}"')) if words else Node("other")


def brackets(text, depth):
    """A matrix, a permutation, a set, a tuple or interval, or what is in the brackets; or None."""
    if match := re.fullmatch(r"\\begin\{[a-z]*matrix\}(.*)\\end\{[a-z]*matrix\}", text, re.DOTALL):
        rows = [row.split("&") for row in match[1].split("\\\\") if row.strip()]
        if len({len(row) for row in rows}) != 1 or "\\begin" in match[1]:
            return None
        items = [read(x.strip(), depth + 1) for row in rows for x in row]
        if len(rows) > 1 and len(rows[0]) > 1:  # a row or a column is a tuple
            items.append(Node("word", len(rows)))
        return Node("tuple", ("(", tuple(items), ")"))
    if re.fullmatch(r"(?:\([\d\s]+\)\s*)+", text) and re.search(r"\d\s+\d", text):  # permutations
        cycles = [x.split() for x in re.findall(r"\(([\d\s]+)\)", text)]
        turned = [x[x.index(min(x)) :] + x[: x.index(min(x))] for x in cycles if x]
        return Node("cycles", frozenset(map(tuple, turned)))
    if enclosed(text, "\\{", "\\}"):
        inside = text[2:-2].strip()
        condition = re.fullmatch(
            r"[a-zA-Z]\s*(?:\\in\s*\{?(?:\\mathbb\s*)?\{?R\}?\}?\s*)?(?:\\mid|\||:)(.*)",
            inside,
            re.DOTALL,
        )
        if condition:
            return read(condition[1].strip(), depth + 1)
        return Node("set", items_of(inside, depth))
    if match := INTERVAL.fullmatch(text):
        items = items_of(match[2], depth)
        if len(items) > 1:
            return Node("tuple", (match[1], items, match[3]))
    for opening, closing in ("()", "[]", "(]", "[)"):
        if enclosed(text, opening, closing):
            items = items_of(text[1:-1], depth)
            if len(items) > 1:
                return Node("tuple", (opening, items, closing))
            return read(text[1:-1].strip(), depth + 1)
    return None


def items_of(text, depth):
    parts = pieces(text, "[;,]")[0]
    if len(parts) == 1:
        parts = pieces(text, "[;,]", grouped=False)[0]
    return tuple(read(x, depth + 1) for x in parts if x)


def codes(text, depth):
    """A date, a range, a time, a ratio or a numeral of another base; or None."""
    plain = re.sub(r"\s*:\s*", ":", text)
    if re.fullmatch(r"\d+-\d+(-\d+)?|\d+/\d+/\d+", plain):
        return Node("code", tuple(map(int, re.findall(r"\d+", plain))))
    if match := re.fullmatch(
        r'(\d{1,2}):([0-5]\d)(?::([0-5]\d))?\s*(?:"([apAP])\.?[mM]\.?")?', plain
    ):
        if int(match[1]) < 25:
            return Node(
                "code",
                tuple(int(x) for x in match.groups()[:3] if x),
                name=(match[4] or "").lower(),
            )
    if re.fullmatch(r"\d+(?::\d+)+", plain):
        parts = [Fraction(x) for x in plain.split(":")]
        if len(parts) == 2 and parts[1]:
            return Node("num", constant(parts[0] / parts[1]))
        total = sum(parts)
        return Node("code", tuple(x / total for x in parts)) if total else None
    if match := re.fullmatch(r"([0-9A-F]+)_\{?(\d+)\}?", plain):
        try:
            return Node("based", int(match[1], int(match[2])) if 2 <= int(match[2]) <= 36 else None)
        except ValueError:
            return Node("based")
    return None


def number(text, depth):
    """A number or term with its unit, infinity, or a list of numbers with spaces; or None."""
    if re.fullmatch(r"[+-]?\s*\\infty", text.strip()):
        return Node("inf", "-" in text)
    unit = None
    if match := UNIT.fullmatch(text):
        unit, text = unit_of(match[2].replace('"', " ")), match[1]
        if NEGATED.search(match[2]):
            return None
    try:
        value = Reader(text).value()
    except Unknown:
        parts = text.split()
        if len(parts) > 1 and all(re.fullmatch(r"[+-]?[\d.,/]+%?", x) for x in parts):
            return Node("list", tuple(read(x, depth + 1) for x in parts))  # "41 42"
        return None
    if unit and not unit[1]:  # a percentage, a million
        value, unit = value * constant(unit[0]), None
    return Node("num", value, unit=unit)


def is_name(text):
    """Whether a left side only names the value: x, x_1, f(x), "Area", but not 2x or a+b."""
    return bool(text) and not re.search(
        r"[\d+*/^-]", re.sub(r"_\{[^{}]*\}|_\w|\([^()]*\)", "", text)
    )


def relation(parts, cuts, depth):
    """The Node of parts joined by relation signs: a named value, an equation, or an inequality."""
    nodes = [read(x, depth + 1) for x in parts]
    last = nodes[-1]
    if {*cuts} <= {"=", ":", "\\in", "\\equiv", "\\approx"}:
        values = [x for x in nodes if x.kind == "num" and not x.body.letters]
        plain = all(is_name(x) or re.fullmatch(r"[+-]?[\d.,]+", x) for x in parts)
        if (
            plain
            and not is_name(parts[0])
            and any(a.body != b.body for a, b in zip(values, values[1:], strict=False))
        ):
            return Node("other", "contradiction")  # 41 = 42
        if "\\approx" in cuts[is_name(parts[0]) :]:  # what is exact counts
            last = nodes[cuts.index("\\approx", is_name(parts[0]))]
        if is_name(parts[0]) and last.kind != "word":
            return last._replace(name=squeeze(parts[0]))
        return last if len(values) == len(nodes) or len(cuts) > 1 else Node("equation", last)
    signs = {"<": -1, "\\le": -1, ">": 1, "\\ge": 1}
    if not {*cuts} <= {*signs, "\\ne"} or len(cuts) > 2:
        return Node("other", "relation")
    place = [i for i, x in enumerate(parts) if re.fullmatch(r"(?:\\?[A-Za-z]+(?:_\{?\w+\}?)?)?", x)]
    if len(place) != 1 or len(cuts) == 2 and (place != [1] or "\\ne" in cuts):
        return Node("other", "relation")
    bounds = [None, False, None, False]
    for i, node in enumerate(nodes):
        if i == place[0]:
            continue
        if node.kind not in ("num", "inf"):
            return Node("other", "relation")
        cut = cuts[min(i, place[0])]
        if cut == "\\ne":
            return ranges([(None, False, node, False), (node, False, None, False)])
        upper = (signs[cut] < 0) == (i > place[0])
        bounds[2 * upper : 2 * upper + 2] = node, cut in ("\\le", "\\ge")
    return ranges([tuple(bounds)])


def ranges(intervals):
    """Sort intervals (low, closed, high, closed); a bound that is infinite becomes None."""
    rows = []
    for low, low_closed, high, high_closed in intervals:
        low, high = (x if x and x.kind == "num" else None for x in (low, high))
        places = [approximate(x.body) for x in (low, high) if x]
        if None in places:  # a bound with letters has no place
            return Node("other", "relation")
        first = places[0] if low else Decimal("-Infinity")
        rows.append((first, (low, low_closed, high, high_closed)))
    return Node("ranges", tuple(row for _, row in sorted(rows, key=itemgetter(0))))


def as_ranges(node):
    """A pair in brackets as an interval, if its ends are numbers or infinite."""
    if node.kind == "ranges":
        return node
    if node.kind == "tuple" and len(node.body[1]) == 2:
        opening, (low, high), closing = node.body
        if {low.kind, high.kind} <= {"num", "inf"}:
            return ranges([(low, opening == "[", high, closing == "]")])
    return Node("other")


def union(nodes):
    """The Node of sets or intervals joined by a union sign or by "or"."""
    if all(x.kind == "set" for x in nodes):
        return Node("set", tuple(item for x in nodes for item in x.body))
    intervals = [as_ranges(x) for x in nodes]
    if any(x.kind != "ranges" for x in intervals):
        return Node("other", "relation")
    return ranges([item for x in intervals for item in x.body])
