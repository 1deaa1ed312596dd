r"""Read a short mathematical answer into a Node, which compare.py compares with another.

    r"x = 5"              Node("num", 5, name="x")
    r'90 "km"/"h"'        Node("num", 90, unit=5/18 m/s)
    "3; 8"                Node("list", (3, 8))
    r"(-\infty,5]"        Node("tuple", ("(", (-inf, 5), "]"))
    r"x<0; x\ge 2"        Node("union", ((-inf, 0), [2, inf)))

The text is in the spelling of latex.py. Values side by side are a list, whatever separates them.
"""

import re
from fractions import Fraction
from functools import lru_cache
from itertools import pairwise
from typing import NamedTuple

from nanocascade.rewards.exact import HIGH, Unknown, close, evaluate, letter_value
from nanocascade.rewards.latex import squeeze
from nanocascade.rewards.units import unit_of


class Node(NamedTuple):
    """kind -> body: num a value, list and set their Nodes, tuple (bracket, Nodes, bracket), also of
    a pair that is an interval, union such tuples in order, code what is compared as a whole (a
    date, a time, a ratio, a numeral of some base, a permutation); word and equation have none,
    other is not read ("relation" and "contradiction" say why)."""

    kind: str
    body: object = None
    text: str = ""  # the whole text, for comparison as text
    name: str = ""  # what it is the value of: the x of x = 5
    unit: Fraction | None = None  # its value; None if there is none or it is unknown
    letters: frozenset = frozenset()  # in a num


EMPTY = {"nosolution", "nosolutions", "norealsolution", "norealsolutions", "none", "emptyset"}
EMPTY |= {"\\emptyset", "\\{\\}", "thereisnosolution", "therearenosolutions"}
THOUSANDS = r"(?<![\d.,])\d{1,3}(?:,\d{3})+(?![\d,])"
RELATION = (
    r"=|<|>|\\(?:le|ge|ne|in|approx|sim|simeq|equiv|cong|notin|mid|to|Rightarrow|iff|Leftrightarrow"
    r"|mapsto|propto|cap|land|wedge|setminus|subset|subseteq|dots)(?![a-zA-Z])|:(?!\d)|(?<!\d):"
)
NEGATED = re.compile(
    r"(?i)not(?![a-z])|never|except|neither|unless|without|wrong|most|least|\bno(?![a-z])"
)
UNIT = re.compile(
    r'(.*?[\d)}!%\w])\s*("[^"]+"(?:\^?\{?-?\d\}?)?(?:\s*/\s*"[^"]+"(?:\^?\{?\d\}?)?)?'
    r'|[kM]?\\Omega|\\mu\s*"?m"?)',
    re.DOTALL,
)
DATE = re.compile(  # a date, a range or a time
    r"\d+(?:\.\d+)?-\d+(?:\.\d+)?|\d+-\d+-\d+|\d+/\d+/\d+|(?:[01]?\d|2[0-4]):[0-5]\d(?::[0-5]\d)?"
    r'(?:\s*"([apAP])\.?[mM]\.?")?'
)
CONDITION = re.compile(  # of a set: {x in R | x < 2}
    r"[a-zA-Z]\s*(?:\\in\s*\{?(?:\\mathbb\s*)?\{?R\}?\}?\s*)?(?:\\mid|\||:)(.*)", re.DOTALL
)
VARIABLE = re.compile(r"(?:\\?[A-Za-z]+(?:_\{?\w+\}?)?)?")
BRACKET = r"\\[{}]|[()\[\]{}]"
OPENING = ("(", "[", "{", "\\{", "\\begin")


def pieces(text, pattern):
    """Split at a pattern outside brackets, numbers such as 1,234 and quoted words:
    "(1,2), 3" -> (["(1,2)", "3"], [","])."""
    signs = rf'{THOUSANDS}|"[^"]*"|(?P<bracket>{BRACKET}|\\begin|\\end)|(?P<cut>{pattern})'
    depth, start, parts, cuts = 0, 0, [], []
    for match in re.finditer(signs, text):
        if match["bracket"]:
            depth += 1 if match[0] in OPENING else -1
        elif match["cut"] and depth == 0:
            parts.append(text[start : match.start()].strip())
            cuts.append(match[0])
            start = match.end()
    return [*parts, text[start:].strip()], cuts


def enclosed(text):
    """(bracket, inside, bracket) of a text whose first bracket its last character closes."""
    first = re.match(BRACKET, text)
    depth = 0
    for match in re.finditer(BRACKET, text) if first else ():
        depth += 1 if match[0] in OPENING else -1
        if depth == 0:
            inside = text[first.end() : match.start()].strip()
            return (first[0], inside, match[0]) if match.end() == len(text) else None
    return None


@lru_cache(2048)
def read(text):
    """A cleaned text as a Node."""
    text = re.sub(
        r'^(?:\\(?:approx|sim)(?![a-zA-Z])|"(?:about|approximately|approx|roughly)")\s*', "", text
    )
    modulus = re.search(r"\s*\(?\\[pb]?mod\s*\{?(\w+)\}?\)?$", text)
    text = (text[: modulus.start()] if modulus else text).rstrip(" .,;:").lstrip(" ,;:")
    while (outer := enclosed(text)) and outer[0] == "{":
        text = outer[1]
    node = interpret(text) if text else Node("other")
    if modulus and node.kind == "num":  # is no unit, but as one must not differ
        node = node._replace(unit=letter_value(f"mod {modulus[1]}"))
    return node._replace(text=squeeze(text))


def interpret(text):
    """The Node of a text that is not empty: first as several values, then as one."""
    if squeeze(text).strip("()") in EMPTY:
        return Node("set", ())
    parts, cuts = pieces(text, "[;,]")
    parts = [x for x in parts if x.strip(" .")]
    if len(parts) > 1:
        items = tuple(read(x) for x in parts)
        ranges = {*cuts} == {";"} and all(x.kind == "union" for x in items)
        return union(items) if ranges else Node("list", items)
    if len(re.findall(r"\\(?:pm|mp)", text)) == 1:
        both = [re.sub(r"\\(?:pm|mp)", sign, text) for sign in "+-"]
        return Node("list", tuple(read(x) for x in both))
    parts, cuts = pieces(text, RELATION)
    if cuts and not re.fullmatch(r"\s*\d+(\s*:\s*\d+)+\s*", text):
        nodes = [read(x) for x in parts]
        if {*cuts} <= {"=", ":", "\\in", "\\equiv", "\\approx"}:
            return equation(parts, cuts, nodes)
        return inequality(parts, cuts, nodes) or Node("other", "relation")
    parts, cuts = pieces(text, r"\\cup(?![a-zA-Z])")
    if cuts:
        return union([read(x) for x in parts])
    if node := brackets(text) or codes(text) or number(text):
        return node
    return Node("word" if re.fullmatch(r'[()]*"[^"]*"[()]*', text) else "other")


def brackets(text):
    """A matrix, a permutation, a set, a tuple or interval, or what is in the brackets; or None."""
    if match := re.fullmatch(r"\\begin\{[a-z]*matrix\}(.*)\\end\{[a-z]*matrix\}", text, re.DOTALL):
        rows = [row.split("&") for row in match[1].split("\\\\") if row.strip()]
        if len({len(row) for row in rows}) != 1 or "\\begin" in match[1]:
            return None
        items = [read(x.strip()) for row in rows for x in row]
        if len(rows) > 1 and len(rows[0]) > 1:  # a row or a column is a tuple
            items.append(Node("word", text=str(len(rows))))
        return Node("tuple", ("(", tuple(items), ")"))
    if re.fullmatch(r"(?:\([\d\s]+\)\s*)+", text) and re.search(r"\d\s+\d", text):  # permutations
        cycles = [x.split() for x in re.findall(r"\(([\d\s]+)\)", text)]
        turned = [x[x.index(min(x)) :] + x[: x.index(min(x))] for x in cycles if x]
        flat = sum(turned, [])  # cycles that share a number do not commute
        kind = frozenset if len(flat) == len({*flat}) else tuple
        return Node("code", kind(map(tuple, turned)))
    if re.fullmatch(r"[(\[\]][^()\[\]]+,[^()\[\]]+[)\]\[]", text):  # ]0,1[ is (0,1)
        text = text[0].replace("]", "(") + text[1:-1] + text[-1].replace("[", ")")
    opening, inside, closing = enclosed(text) or ("", "", "")
    if not opening:
        return None
    if opening == "\\{" and (condition := CONDITION.fullmatch(inside)):
        return read(condition[1].strip())
    parts, cuts = pieces(inside, "[;,]")
    if not cuts:  # (1,234) is a pair
        parts, cuts = pieces(inside.replace(",", ", "), "[;,]")
    items = tuple(read(x) for x in parts if x)
    if opening == "\\{":
        return Node("set", items)
    return Node("tuple", (opening, items, closing)) if len(items) > 1 else read(inside)


def codes(text):
    """A date, a range, a time, a ratio or a numeral of another base; or None."""
    plain = re.sub(r"\s*:\s*", ":", text)
    if match := DATE.fullmatch(plain):
        numbers = tuple(map(Fraction, re.findall(r"[\d.]+", plain)))
        return Node("code", numbers, name=(match[1] or "").lower())
    if re.fullmatch(r"\d+(?::\d+)+", plain):
        parts = [Fraction(x) for x in plain.split(":")]
        if len(parts) == 2 and parts[1]:
            return Node("num", parts[0] / parts[1])
        total = sum(parts)
        return Node("code", tuple(x / total for x in parts)) if total else None
    based = r"\(?([0-9A-F]+)(?:\.([0-9A-F]+))?\)?_\{?\s*\(?([1-9]\d*)\)?\s*\}?|0[xob][0-9A-Fa-f]+"
    if match := re.fullmatch(based, plain):
        whole, part, base = match.groups("")
        try:
            value = int(whole + part, int(base)) if base else int(plain, 0)
            return Node("code", Fraction(value, int(base or 1) ** len(part)))
        except ValueError:
            return None
    return None


def number(text):
    """A number or term with its unit, infinity, or a list of numbers with spaces; or None."""
    if re.fullmatch(r"[+-]?\s*\\infty", text.strip()):
        return Node("num", HIGH.ninf if "-" in text else HIGH.inf)
    unit = None
    if match := UNIT.fullmatch(text):
        unit, text = unit_of(match[2].replace('"', " ")), match[1]
        if NEGATED.search(match[2]):
            return None
        if DATE.fullmatch(text):  # 4-9 km
            return codes(text)._replace(name=str(unit or ""))
    try:
        value, letters = evaluate(text)
    except Unknown:
        parts = text.split()
        if len(parts) > 1 and all(re.fullmatch(r"[+-]?[\d.,/]+%?", x) for x in parts):
            return Node("list", tuple(read(x) for x in parts))  # "41 42"
        return None
    return Node("num", value, unit=unit, letters=letters)


def is_name(text):
    """Whether a left side only names the value: x, x_1, f(x), "Area", but not 2x or a+b."""
    return bool(text) and not re.search(
        r"[\d+*/^-]", re.sub(r"_\{[^{}]*\}|_\w|\([^()]*\)", "", text)
    )


def equation(parts, cuts, nodes):
    """The Node of parts joined by equality signs: a named value, or an equation. Of a chain, a+b =
    4+3 = 7, the last value counts."""
    values = [x.body for x in nodes if x.kind == "num" and not x.letters]
    plain = all(is_name(x) or re.fullmatch(r"[+-]?[\d.,]+", x) for x in parts)
    named = is_name(parts[0])
    if plain and not named and not all(close(x, y) for x, y in pairwise(values)):
        return Node("other", "contradiction")  # 41 = 42
    value = nodes[-1]
    if "\\approx" in cuts[named:]:  # what is exact counts
        value = nodes[cuts.index("\\approx", named)]
    if named and value.kind != "word":
        return value._replace(name=squeeze(parts[0]))
    return value if len(values) == len(nodes) or len(cuts) > 1 else Node("equation")


def inequality(parts, cuts, nodes):
    """The interval in which a variable lies, x < 5, 2 < x \\le 5, x \\ne 3; None for others."""
    place = [i for i, x in enumerate(parts) if VARIABLE.fullmatch(x)]
    if not {*cuts} <= {"<", ">", "\\le", "\\ge", "\\ne"} or len(place) != 1:
        return None
    if len(cuts) > 1 and (len(cuts) > 2 or place != [1] or "\\ne" in cuts):
        return None
    low, opening = Node("num", HIGH.ninf), "("
    high, closing = Node("num", HIGH.inf), ")"
    for i, cut in enumerate(cuts):
        value = nodes[i + 1] if i == place[0] else nodes[i]
        if value.kind != "num":
            return None
        if cut == "\\ne":
            return union([Node("tuple", ("(", x, ")")) for x in ((low, value), (value, high))])
        if (cut in ("<", "\\le")) == (i == place[0]):
            high, closing = value, "]" if cut in ("\\le", "\\ge") else ")"
        else:
            low, opening = value, "[" if cut in ("\\le", "\\ge") else "("
    return Node("union", (Node("tuple", (opening, (low, high), closing)),))


def union(nodes):
    """The Node of sets or intervals joined by a union sign or by "or"."""
    if all(x.kind == "set" for x in nodes):
        return Node("set", tuple(item for x in nodes for item in x.body))
    intervals = [y for x in nodes for y in (x.body if x.kind == "union" else [x])]
    for node in intervals:
        ends = node.body[1] if node.kind == "tuple" else ()
        if len(ends) != 2 or any(x.kind != "num" or x.letters or x.body.imag for x in ends):
            return Node("other", "relation")
    low = [HIGH.convert(node.body[1][0].body) for node in intervals]
    order = sorted(range(len(low)), key=low.__getitem__)
    return Node("union", tuple(intervals[i] for i in order))
