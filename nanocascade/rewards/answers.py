r"""What a short mathematical answer says, and whether two say the same: yes, no, or not ours to say.

    clean      one spelling of a text: r"\dfrac12\text{ km or so}" -> r'\frac12 "km"; "so"'
    read       a Node: a number with its unit, a list, a set, an interval, a relation, a word ...
    same       True or False where both were read; None is a question for the library

Values beside each other are a list, whatever stands between them, and a list is not one of them.
"""

import re
import unicodedata
from decimal import Context, Decimal
from fractions import Fraction
from functools import lru_cache
from typing import NamedTuple

from nanocascade.rewards.exact import FUNCTIONS, WORDS, Reader, Unknown, Value, constant
from nanocascade.rewards.units import find_unit, unit_of

# ---- One spelling -------------------------------------------------------------------------------

SPELLING = {  # signs outside ASCII
    **dict.fromkeys("\u2212\u2013\u2014\u2010\u2011", "-"),
    **dict.fromkeys("\u2019\u2032", "'"),
    **dict.fromkeys("\u03a9\u2126", "\\Omega "),
    **dict.fromkeys("\u00b5\u03bc", "\\mu "),
    **{"\u00d7": "\\times ", "\u00b7": "\\cdot ", "\u22c5": "\\cdot ", "\u00f7": "\\div "},
    **{"\u221e": "\\infty ", "\u03c0": "\\pi ", "\u221a": "\\sqrt ", "\u00b0": "^\\circ "},
    **{"\u2264": "\\le ", "\u2265": "\\ge ", "\u2260": "\\ne ", "\u2248": "\\approx "},
    **{"\u222a": "\\cup ", "\u2229": "\\cap ", "\u2205": "\\emptyset ", "\u2208": "\\in "},
    **{"\u00b1": "\\pm ", "\u2192": "\\to ", "\u21d2": "\\Rightarrow ", "\u2228": "\\lor "},
    **{"\u2227": "\\land ", "\u2026": "\\dots ", "\u2022": ";"},
    **{"\u20ac": '"euro"', "\u00a3": '"sterling"', "\u00a5": '"yen"', "\u20b9": '"rupee"'},
}
RAISED = "\u2070\u00b9\u00b2\u00b3\u2074\u2075\u2076\u2077\u2078\u2079\u207b"
RAISED = dict(zip(map(ord, RAISED), "0123456789-", strict=True))
LOWERED = {0x2080 + digit: str(digit) for digit in range(10)}
RUNS = [(re.compile(f"[{''.join(map(chr, x))}]+"), x, y) for x, y in ((RAISED, "^"), (LOWERED, "_"))]
SMALL = "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen"
SMALL = {word: f" {number} " for number, word in enumerate(SMALL.split())}
JOINING = {"or": ";", "oder": ";", "ou": ";", "and": ",", "und": ",", "et": ","}
VOCABULARY = {**SMALL, **JOINING, "percent": "%", "pct": "%", "infinity": "\\infty ", "infinite": "\\infty "}
DROPPED = re.compile(  # delimiters and sizes, which change no value
    r"\\(?:left|right)\s*\.|\\(?:left|right|[bB]igg?[lrm]?|(?:display|text)style|(?:no)?limits)"
    r"(?![a-zA-Z])|(?<!\\)\\[()\[\]]|\\!|\\(?:text)?color\s*\{[^{}]*\}|\*\*|`|\\label\{[^{}]*\}"
    r"|\\(?:math(?:bf|it|sf|cal|bb)|bm|boldsymbol|underline|boxed|fbox)(?![a-zA-Z])"
)
SPACES = re.compile(r"(?<!\\)\\[,;:> ]|\\q?quad(?![a-zA-Z])|~|\\(?:thin|med|thick)space(?![a-zA-Z])")
QUOTED = re.compile(
    r"\\(text(?:bf|it|rm|sf|tt|normal|up)?|mathrm|[mh]box|operatorname\*?|rm)\s*\{([^{}]*)\}"
)
BARE = re.compile(r"\\(?:begin|end)\{\w+\*?\}|_\{[^{}]*\}|\\[A-Za-z]+|([A-Za-z]{2,}(?:'t)?)")
SIUNITX = re.compile(r"\\(?:SI|qty)\s*\{([^{}]*)\}\s*\{([^{}]*)\}")
CURRENCY = re.compile(r'^([+-]?)\s*"(euro|sterling|yen|rupee|dollar)s?"\s*(?=[\d.])(.+)$')
GROUPS = re.compile(  # 12,34,567 and 1.234.567: nothing else is written so
    r"(?<![\d.,])(?:\d{1,2}(?:,\d\d)+,\d{3}|\d{1,3}(?:\.\d{3}){2,}|\d{1,3}(?:'\d{3})+)(?![\d.,])"
)
REPLACED = [
    (r"\\[dtc]frac(?![a-zA-Z])", r"\\frac"),
    (r"<=|\\leqq|\\leqslant|\\leq(?![a-zA-Z])", r"\\le "),
    (r">=|\\geqq|\\geqslant|\\geq(?![a-zA-Z])", r"\\ge "),
    (r"\\neq(?![a-zA-Z])|(?<![\d)\s])!=|(?<=\s)!=", r"\\ne "),
    (r"\\lt(?![a-zA-Z])", "<"),
    (r"\\gt(?![a-zA-Z])", ">"),
    (r"->|\\(?:long)?rightarrow(?![a-zA-Z])", r"\\to "),
    (r"=>|\\implies(?![a-zA-Z])", r"\\Rightarrow "),
    (r"\.\.\.|\\[lc]?dots[a-z]?(?![a-zA-Z])", r"\\dots "),
    (r"\\(?:lor|vee)(?![a-zA-Z])", ";"),
    (r"\\(?:land|wedge)(?![a-zA-Z])|\\&", ","),
    (r"\^\{?\s*\\prime\s*\}?", "'"),
    (r"\^\{?\s*\\circ\s*\}?", ' "degree"'),
    (r"\\varnothing", r"\\emptyset "),
    (r"\\sqrt\s+(\d+)", r"\\sqrt{\1}"),
]
REPLACED = [(re.compile(pattern), new) for pattern, new in REPLACED]


def quote(words):
    """Words as '"words"'; numbers and marks between them stay as they are, "or" joins a list."""

    def one(match):
        word = match[0].rstrip(".") if match[0].count(".") == 1 else match[0]
        return VOCABULARY.get(word.lower(), f'"{word}"')

    return f" {re.sub(r'[A-Za-z][A-Za-z.]*', one, words)} "


def quote_bare(match):
    """The same for a word that stands bare: one of four letters, or one that we know."""
    word = match[1]
    if not word or word in WORDS or FUNCTIONS.fullmatch(word):
        return match[0]
    known = word.lower() in VOCABULARY or find_unit(word) or word.lower() in ("no", "not", "is")
    return quote(word) if known or len(word) > 3 else word


def clean(latex):
    text = latex
    for pattern, digits, mark in RUNS:
        text = pattern.sub(lambda x, d=digits, m=mark: f"{m}{{{x[0].translate(d)}}}", text)
    for sign in {x for x in text if "\u2044" in unicodedata.normalize("NFKC", x)}:  # one half
        above, _, below = unicodedata.normalize("NFKC", sign).partition("\u2044")
        text = text.replace(sign, rf"\frac{{{above}}}{{{below}}}")
    text = text.replace('"', "").translate({ord(x): y for x, y in SPELLING.items()})
    text = unicodedata.normalize("NFKC", text)
    text = "".join(x for x in text if unicodedata.category(x) != "Cf")
    text = re.sub(r",\\!\s*|\{,\}", ",", text).replace("\\$", '"dollar"').replace("\\%", "%")
    if text.count("$") % 2:
        text = text.replace("$", '"dollar"', 1)
    text = DROPPED.sub("", text.replace("$", ""))
    text = SIUNITX.sub(lambda x: f"{x[1]} {quote(x[2].replace(chr(92), ''))}", text)
    text = SPACES.sub(" ", text)
    text = QUOTED.sub(lambda x: x[2] if x[1] == "mathrm" and x[2] in "eid" else quote(x[2]), text)
    for pattern, new in REPLACED:
        text = pattern.sub(new, text)
    if "\\begin" not in text:
        text = re.sub(r"\\\\|&|\n\s*\n", ";", text)
    parts = text.split('"')
    parts[::2] = [BARE.sub(quote_bare, part) for part in parts[::2]]
    text = re.sub(r'(?<=\w)"\s+"(?=\w)', " ", '"'.join(parts))
    text = GROUPS.sub(lambda x: re.sub("[,.']", "", x[0]), text)
    return CURRENCY.sub(r'\1\3 "\2"', text.strip(" .,;:\n"))


def squeeze(text):
    return re.sub(r'[\s"{}]', "", text).casefold() if '"' in text else re.sub(r"\s", "", text)


# ---- What it says -------------------------------------------------------------------------------


class Node(NamedTuple):
    kind: str  # num, inf, word, list, set, tuple, cycles, ranges, code, based, equation, other
    body: object = None
    text: str = ""
    name: str = ""  # of what it is the value: the x of x = 5
    unit: tuple | None = None  # (scale, {base: power}); None if there is none or we do not know it


MAX_NODES = 400
EMPTY = {"nosolution", "nosolutions", "norealsolution", "norealsolutions", "none", "emptyset"}
EMPTY |= {"\\emptyset", "\\{\\}", "thereisnosolution", "therearenosolutions"}
THOUSANDS = r"(?<![\d.,])\d{1,3}(?:,\d{3})+(?![\d,])"
ARROWS = r"\\(?:to|Rightarrow|iff|Leftrightarrow|mapsto|propto|cap|setminus|subset|subseteq|dots)"
RELATION = (
    r"=|<|>|\\(?:le|ge|ne|in|approx|sim|simeq|equiv|cong|notin)(?![a-zA-Z])|:(?!\d)|(?<!\d):|"
    + ARROWS
    + "(?![a-zA-Z])"
)
NEGATED = re.compile(r"(?i)\b(?:not|no|never|except|neither|nor|unless|without|wrong)\b")
NUMERALS = re.compile(r"\d+(?:\.\d+)?")
MARKS = re.compile(r"'|\^\{?(?:T|\\top|\\intercal|\\dagger|c|\*)\}?(?![a-zA-Z])|\\(?:bar|overline|d?dot)\s*\{?[A-Za-z]")
UNIT = re.compile(
    r'(.*?[\d)}!%\w])\s*("[^"]+"(?:\^?\{?-?\d\}?)?(?:\s*/\s*"[^"]+"(?:\^?\{?\d\}?)?)?'
    r'|[kM]?\\Omega|\\mu\s*"?m"?)',
    re.DOTALL,
)
LOOSE_UNIT = re.compile(r"(.*[\d.}])\s*([A-Za-z]{1,3}(?:\^\{?\d\}?)?(?:/[A-Za-z]{1,2}(?:\^\{?\d\}?)?)?)")
INTERVAL = re.compile(r"([(\[\]])([^()\[\]]+)([)\]\[])")
OPENING, CLOSING = ("(", "[", "{", "\\{", "\\begin"), (")", "]", "}", "\\}", "\\end")


def pieces(text, pattern, grouped=True):
    """(parts, cuts) of a text cut by a pattern outside brackets: "(1,2), 3" -> ["(1,2)", "3"].
    grouped: the comma of 1,234 is no cut."""
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
    """Whether the bracket that opens a text is closed by its last sign."""
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
    text = re.sub(r'^(?:\\(?:approx|sim)(?![a-zA-Z])|"(?:about|approximately|approx|roughly)")\s*', "", text)
    text = re.sub(r"\s*\(?\\[pb]?mod\s*\{?\w+\}?\)?$", "", text).strip(" .,;:")
    while enclosed(text, "{", "}"):
        text = text[1:-1].strip()
    node = interpret(text, depth) if text and depth < 8 else Node("other")
    return node._replace(text=squeeze(text))


def interpret(text, depth):
    if squeeze(text).strip("()") in EMPTY:
        return Node("set", ())
    parts, cuts = pieces(text, "[;,]")
    items = [read(x, depth + 1) for x in parts if x.strip(" .")]
    if len(items) > 1 and not INTERVAL.fullmatch(text):
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
    if match := re.fullmatch(r"\\begin\{[a-z]*matrix\}(.*)\\end\{[a-z]*matrix\}", text, re.DOTALL):
        rows = [[read(x.strip(), depth + 1) for x in row.split("&")] for row in match[1].split("\\\\") if row.strip()]
        if len({len(row) for row in rows}) == 1 and "\\begin" not in match[1]:
            flat = 1 in (len(rows), len(rows[0]))
            items = tuple(x for row in rows for x in row)
            return Node("tuple", ("(", items, ")")) if flat else Node("tuple", ("(", (*items, Node("word", len(rows))), ")"))
        return None
    if re.fullmatch(r"(?:\([\d\s]+\)\s*)+", text) and re.search(r"\d\s+\d", text):  # permutations
        cycles = [x.split() for x in re.findall(r"\(([\d\s]+)\)", text)]
        turned = [x[x.index(min(x)) :] + x[: x.index(min(x))] for x in cycles if x]
        return Node("cycles", frozenset(map(tuple, turned)))
    if enclosed(text, "\\{", "\\}"):
        inside = text[2:-2].strip()
        condition = re.fullmatch(r"[a-zA-Z]\s*(?:\\in\s*\{?(?:\\mathbb\s*)?\{?R\}?\}?\s*)?(?:\\mid|\||:)(.*)", inside, re.DOTALL)
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
    """Dates, ranges, times, ratios and numerals of another base: no sums, no quotients."""
    plain = re.sub(r"\s*([:])\s*", r"\1", text)
    if re.fullmatch(r"\d+-\d+(-\d+)?|\d+/\d+/\d+", plain):
        return Node("code", tuple(map(int, re.findall(r"\d+", plain))))
    if match := re.fullmatch(r'(\d{1,2}):([0-5]\d)(?::([0-5]\d))?\s*(?:"([apAP])\.?[mM]\.?")?', plain):
        if int(match[1]) < 25:
            return Node("code", tuple(int(x) for x in match.groups()[:3] if x), name=(match[4] or "").lower())
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
    """x, x_1, f(x), "Area": the left side of an equation that only says what the value is of."""
    return bool(text) and not re.search(r"[\d+*/^-]", re.sub(r"_\{[^{}]*\}|_\w|\([^()]*\)", "", text))


def relation(parts, cuts, depth):
    nodes = [read(x, depth + 1) for x in parts]
    last = nodes[-1]
    if {*cuts} <= {"=", ":", "\\in", "\\equiv", "\\approx"}:
        values = [x for x in nodes if x.kind == "num" and not x.body.letters]
        plain = all(re.fullmatch(r"[+-]?[\d.,]+", x) for x in parts)
        if plain and any(a.body != b.body for a, b in zip(values, values[1:], strict=False)):
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


def ranges(found):
    """Intervals (low, closed, high, closed) in order; None where one has no end."""
    ends = [[x if x and x.kind == "num" else None for x in (low, high)] for low, _, high, _ in found]
    keys = [[approximate(x.body) if x else None for x in pair] for pair in ends]
    if any(end and key is None for pair, row in zip(ends, keys, strict=True) for end, key in zip(pair, row, strict=True)):
        return Node("other", "relation")
    order = sorted(range(len(found)), key=lambda i: (keys[i][0] is not None, keys[i][0] or 0))
    return Node("ranges", tuple((ends[i][0], found[i][1], ends[i][1], found[i][3]) for i in order))


def as_ranges(node):
    """A pair in brackets as an interval, if it can be one."""
    if node.kind == "ranges":
        return node
    if node.kind == "tuple" and len(node.body[1]) == 2:
        opening, (low, high), closing = node.body
        if {low.kind, high.kind} <= {"num", "inf"}:
            return ranges([(low, opening == "[", high, closing == "]")])
    return Node("other")


def union(nodes):
    if all(x.kind == "set" for x in nodes):
        return Node("set", tuple(item for x in nodes for item in x.body))
    found = [as_ranges(x) for x in nodes]
    if any(x.kind != "ranges" for x in found):
        return Node("other", "relation")
    return ranges([item for x in found for item in x.body])


# ---- Whether two say the same -------------------------------------------------------------------

PI = Decimal("3.14159265358979323846264338327950288419716939937510582097494459")
DIGITS = Context(prec=60)


def approximate(value):
    """A value without letters, but pi and e, to 50 digits or so; None for others."""
    sums = []
    for polynomial in (value.num, value.den):
        total = Decimal(0)
        for monomial, factor in polynomial.items():
            term = DIGITS.divide(Decimal(factor.numerator), Decimal(factor.denominator))
            for name, power in monomial:
                if name == -1 or isinstance(name, str) and name not in ("\\pi", "e"):
                    return None
                base = {"\\pi": PI, "e": DIGITS.exp(Decimal(1))}.get(name) or Decimal(name)
                power = DIGITS.divide(Decimal(power.numerator), Decimal(power.denominator))
                if abs(power) > 10_000:
                    return None
                term = DIGITS.multiply(term, DIGITS.power(base, power))
            total = DIGITS.add(total, term)
        sums.append(total)
    return DIGITS.divide(*sums) if sums[1] else None


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
    except Unknown:
        return None


def renamed(a, b):
    """b with the letter of its g(t) = ... called as in a's f(x) = ..."""
    one, two = (re.fullmatch(r"[A-Za-z]\(([A-Za-z])\)", x.name) for x in (a, b))
    if not one or not two or one[1] == two[1] or one[1] in b.body.letters:
        return b
    turned = [
        {tuple(sorted(((one[1] if n == two[1] else n, p) for n, p in m), key=str)): c for m, c in x.items()}
        for x in (b.body.num, b.body.den)
    ]
    return b._replace(body=Value(*turned))


def same_number(a, b):
    b = renamed(a, b)
    x, y = (node.body * constant(node.unit[0]) if a.unit and b.unit else node.body for node in (a, b))
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
    return False


def same_items(a, b):
    """Sets and lists: the order counts only where the expected list names its values."""
    wanted, given = ([*x.body] if x.kind in ("set", "list") else [x] for x in (a, b))
    names = [x.name for x in wanted]
    if len(set(names)) not in (1, len(names)):
        return None
    if len(names) > 1 and all(names) and len(set(names)) > 1:
        if {x.name for x in given} == set(names) and len(given) == len(names):
            given = [next(y for y in given if y.name == name) for name in names]
        elif any(x.name for x in given):
            return None
        return together([len(wanted) == len(given)] + [same(x, y) for x, y in zip(wanted, given, strict=False)])
    wanted, given = distinct(wanted), distinct(given)
    if len(wanted) != len(given):
        return False
    verdicts = [[same(x, y) for y in given] for x in wanted]
    if all(True in row for row in verdicts):
        return True
    return False if any(not {True, None} & {*row} for row in verdicts) else None


def distinct(nodes):
    kept = []
    for node in nodes:
        if not any(same(x, node) for x in kept):
            kept.append(node)
    return kept


def together(verdicts):
    return False if False in verdicts else None if None in verdicts else True


def same(a, b):
    """Whether the expected Node and a given one are equal; None if we cannot tell."""
    if a.text and a.text == b.text:
        return True
    kinds = {a.kind, b.kind}
    if sorted(MARKS.findall(a.text)) != sorted(MARKS.findall(b.text)):
        return False
    if "ranges" in kinds and kinds & {"ranges", "tuple"} == kinds or kinds == {"tuple"} and "[" in f"{a.body}{b.body}":
        x, y = as_ranges(a), as_ranges(b)
        if x.kind == y.kind == "ranges" and len(x.body) == len(y.body):
            ends = [(p, q) for one, two in zip(x.body, y.body, strict=True) for p, q in zip(one, two, strict=True)]
            return together([p == q if not (isinstance(p, Node) and isinstance(q, Node)) else same(p, q) for p, q in ends])
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
        return Reader(" ".join((a if a.kind == "letters" else b).body)).value() == (b if a.kind == "letters" else a).body
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
    if "contradiction" in (a.body, b.body) or a.kind == "equation" and b.kind == "num" and not b.name:
        return False
    plain = a.kind in ("num", "inf", "word", "code", "based") and not (a.kind == "num" and a.body.letters)
    if plain and (b.body == "relation" or NEGATED.search(b.text)):
        return False
    worded = re.search(r"(?<!\\)[a-z]{4}", b.text)
    return False if plain and worded and len(NUMERALS.findall(b.text)) > 1 else None


def readings(text, gold):
    """The Nodes that a text may stand for, the likeliest first."""
    text = clean(text)
    found = [text]
    if re.fullmatch(THOUSANDS, text):
        found.append(text.replace(",", ", "))
    if match := re.match(r'\(\s*"([A-J])"\s*\)\s*(?=\S)', text):  # an option's letter and its value
        found += [f'"{match[1]}"', text[match.end() :]]
    comma = re.fullmatch(r"([+-]?)(\d{1,3}(?:[ .]\d{3})+|\d+),(\d+)([^,\d]*)", text)
    if comma and not gold and not re.fullmatch(THOUSANDS, text):  # 3,14 is a decimal in an answer
        found.append(f"{comma[1]}{re.sub('[ .]', '', comma[2])}.{comma[3]}{comma[4]}")
    return [read(x) for x in found]


def equal(gold, given):
    """True, False, or None if it takes more than we read."""
    try:
        verdicts = [same(x, y) for x in readings(gold, True) for y in readings(given, False)]
    except Unknown:
        return None
    return True if True in verdicts else None if None in verdicts else False
