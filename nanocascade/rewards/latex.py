r"""One spelling of a mathematical answer: what is written differently and means the same.

r"\dfrac12\text{ km or }\tfrac{1}{3}" -> r'\frac12 "km" ; \frac{1}{3}': words stand in double
quotes, signs outside ASCII have their command, sizes are gone, "or" is ";" and "and" ",".
"""

import re
import unicodedata

from nanocascade.rewards.exact import FUNCTIONS, WORDS
from nanocascade.rewards.units import find_unit

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
RUNS = [
    (re.compile(f"[{''.join(map(chr, x))}]+"), x, y) for x, y in ((RAISED, "^"), (LOWERED, "_"))
]
SMALL = "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen"
SMALL = {word: f" {number} " for number, word in enumerate(SMALL.split())}
JOINING = {"or": ";", "oder": ";", "ou": ";", "and": ",", "und": ",", "et": ","}
VOCABULARY = {
    **SMALL,
    **JOINING,
    "percent": "%",
    "pct": "%",
    "infinity": "\\infty ",
    "infinite": "\\infty ",
}
DROPPED = re.compile(  # delimiters and sizes, which change no value
    r"\\(?:left|right)\s*\.|\\(?:left|right|[bB]igg?[lrm]?|(?:display|text)style|(?:no)?limits)"
    r"(?![a-zA-Z])|(?<!\\)\\[()\[\]]|\\!|\\(?:text)?color\s*\{[^{}]*\}|\*\*|`|\\label\{[^{}]*\}"
    r"|\\(?:math(?:bf|it|sf|cal|bb)|bm|boldsymbol|underline|boxed|fbox)(?![a-zA-Z])"
)
SPACES = re.compile(
    r"(?<!\\)\\[,;:> ]|\\q?quad(?![a-zA-Z])|~|\\(?:thin|med|thick)space(?![a-zA-Z])"
)
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
    (r"\\frac\s*(\d)\s*(\d)", r"\\frac{\1}{\2}"),
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

    words = re.sub(r"(?i)\b([ap])\.m\b\.?", r"\1m", words)
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
    parts = re.sub(r"(?i)(?<=\d)\s*([ap])\.m\b\.?", r" \1m", text).split('"')
    parts[::2] = [BARE.sub(quote_bare, part) for part in parts[::2]]
    text = re.sub(r'(?<=\w)"\s+"(?=\w)', " ", '"'.join(parts))
    text = re.sub(r"\s*\^", "^", re.sub(r"([\^_])\{(\w)\}", r"\1\2", text))
    text = GROUPS.sub(lambda x: re.sub("[,.']", "", x[0]), text)
    return CURRENCY.sub(r'\1\3 "\2"', text.rstrip(" .,;:\n").lstrip(" ,;:\n"))


def squeeze(text):
    """For comparison as text: no spaces but between digits, no braces, words in lower case."""
    text = re.sub(r"(?<![\d])\s+|\s+(?!\d)", "", text)
    return text.replace('"', "").casefold() if '"' in text else text
