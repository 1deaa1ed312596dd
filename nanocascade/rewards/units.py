"""Units of measurement: "km / h" -> (5/18, m s^-1), so that 1 km is 1000 m and 5 kg is not 5 lb."""

import re
from collections import Counter
from fractions import Fraction

PREFIXES = {"k": 3, "d": -1, "c": -2, "m": -3, "u": -6, "\\mu ": -6, "n": -9, "M": 6, "G": 9}
LONG_PREFIXES = {"kilo": 3, "deci": -1, "centi": -2, "milli": -3, "micro": -6, "nano": -9}
LONG_PREFIXES |= {"mega": 6, "giga": 9}
SYMBOLS = {"m": "meter", "g": "gram", "s": "second", "L": "liter", "l": "liter", "J": "joule"}
SYMBOLS |= {"W": "watt", "N": "newton", "V": "volt", "A": "ampere", "Hz": "hertz", "Pa": "pascal"}
SYMBOLS |= {"mol": "mole", "\\Omega": "ohm", "C": "coulomb", "K": "kelvin", "B": "byte"}
OTHERS = """sec s 1;min s 60;minute s 60;h s 3600;hr s 3600;hour s 3600;day s 86400;week s 604800
month month 1;year month 12;yr month 12;in m .0254;inch m .0254;inches m .0254;ft m .3048
foot m .3048;feet m .3048;yd m .9144;yard m .9144;mi m 1609.344;mile m 1609.344;oz g 28.349523125
ounce g 28.349523125;lb g 453.59237;ton g 1000000;tonne g 1000000
percent - .01;percentage - .01;degree degree 1;deg degree 1;radian radian 1;rad radian 1
dollar dollar 1;usd dollar 1;cent dollar .01;euro euro 1;eur euro 1;sterling sterling 1
yen yen 1;rupee rupee 1;am am 1;pm pm 1;thousand - 1000;million - 1e6
billion - 1e9;dozen - 12;hundred - 100"""
UNITS = {}  # name -> (scale, base)
for _entry in re.split("[;\n]", OTHERS):
    _name, _base, _scale = _entry.split()
    UNITS[_name] = Fraction(_scale), _base
for _symbol, _name in SYMBOLS.items():
    _base = _symbol if _symbol != "l" else "L"
    UNITS[_symbol] = UNITS[_name] = UNITS[_name.replace("er", "re")] = Fraction(1), _base
    for _table, _word in ((PREFIXES, _symbol), (LONG_PREFIXES, _name)):
        for _prefix, _power in _table.items():
            UNITS.setdefault(_prefix + _word, (Fraction(10) ** _power, _base))
for _prefix, _power in LONG_PREFIXES.items():
    UNITS[f"{_prefix}metre"] = Fraction(10) ** _power, "m"
POWERS = {"square": 2, "sq": 2, "cubic": 3, "squared": 2, "cubed": 3}


def find_unit(word):
    """(scale, base) of one word, or None."""
    for name in (word, word.lower(), word.lower().replace(".", "").rstrip("s")):
        if name in UNITS:
            return UNITS[name]
    return None


def unit_of(text):
    """(scale, {base: power} as a frozenset of pairs) of a unit, or None if a word is unknown."""
    text = text.replace("mph", "mile / h").replace("kph", "km / h")
    scale, bases, sign, power, last = Fraction(1), Counter(), 1, 1, None
    for word in re.findall(r"\\mu ?m|[kM]?\\Omega|[A-Za-z.]+|/|\^?\{?-?\d\}?", text):
        number = re.sub(r"[\^{}]", "", word)
        if word in ("/", "per"):
            sign = -1
        elif word in ("square", "sq", "cubic"):
            power = POWERS[word]
        elif word in POWERS or number.lstrip("-").isdigit():  # of the unit before
            if not last:
                return None
            times = POWERS.get(word) or int(number)
            scale *= last[0] ** (last[2] * (times - 1))
            bases[last[1]] += last[2] * (times - 1)
        elif unit := find_unit(word):
            last = (*unit, sign * power)
            scale *= unit[0] ** last[2]
            bases[unit[1]] += last[2]
            sign = power = 1
        else:
            return None
    return scale, frozenset((base, n) for base, n in bases.items() if n and base != "-")
