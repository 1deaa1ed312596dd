"""Units of measurement as numbers: km is 1000 m and m a large random number, as letters are.

Then 1 km is 1000 m, 90 km/h is 25 m/s, and 5 kg is no number of pounds but the right one.
"""

import re
from fractions import Fraction

from nanocascade.rewards.exact import letter_value

PREFIXES = """k 3;kilo 3;d -1;deci -1;c -2;centi -2;m -3;milli -3;u -6;\\mu -6;micro -6
n -9;nano -9;M 6;mega 6;G 9;giga 9"""
METRIC = """m meter metre;g gram;s second;L l liter litre;J joule;W watt;N newton;V volt;A ampere
Hz hertz;Pa pascal;mol mole;\\Omega ohm;C coulomb;F farad;K kelvin;B byte"""
OTHERS = """sec s 1;min s 60;minute s 60;h s 3600;hr s 3600;hour s 3600;day s 86400;week s 604800
month month 1;year month 12;yr month 12;in m .0254;inch m .0254;inches m .0254;ft m .3048
foot m .3048;feet m .3048;yd m .9144;yard m .9144;mi m 1609.344;mile m 1609.344;oz g 28.349523125
ounce g 28.349523125;lb g 453.59237;ton g 1000000;tonne g 1000000
degree degree 1;deg degree 1;radian radian 1;rad radian 1
dollar dollar 1;usd dollar 1;cent dollar .01;euro euro 1;eur euro 1;sterling sterling 1
yen yen 1;rupee rupee 1;am am 1;pm pm 1;penny dollar .01;nickel dollar .05;dime dollar .1
decade month 120;century month 1200;centuries month 1200;gallon gallon 1;quart gallon .25
pint gallon .125;cup gallon .0625;acre acre 1;hectare m^2 10000;atm Pa 101325;bar Pa 100000
cal cal 1;calorie cal 1;kcal cal 1000;kilocalorie cal 1000;eV eV 1;keV eV 1000;MeV eV 1000000
bit B .125;rpm rpm 1;parsec parsec 1;light ly 1"""
SPOKEN = {
    r"\b(?:square|sq)[. ]+(\S+)": r"\1^2",
    r"\bcubic +(\S+)": r"\1^3",
    r" +squared": "^2",
    r" +cubed": "^3",
    r"\bper\b": "/",
    "mph": "mile/h",
    "kph": "km/h",
    "mpg": "mile/gallon",
    "light[- ]?years?": "light",
}


def table(text):
    """The rows of a table, each a list of its words."""
    return [row.split() for row in re.split("[;\n]", text)]


UNITS = {name: Fraction(scale) * letter_value(base) for name, base, scale in table(OTHERS)}
for _prefix, _power in [("", 0), *table(PREFIXES)]:
    for _names in table(METRIC):
        for _name in _names:
            UNITS.setdefault(_prefix + _name, Fraction(10) ** int(_power) * letter_value(_names[0]))


def find_unit(word):
    """The value of one word, or None."""
    for name in (word, word.lower(), word.lower().replace(".", "").rstrip("s")):
        if name in UNITS:
            return UNITS[name]
    return None


def unit_of(text):
    """The value of a unit, or None if a word is unknown."""
    for spoken, written in SPOKEN.items():
        text = re.sub(spoken, written, text)
    value = Fraction(1)
    word = r"(/?)\s*(\\mu\s*m|[kM]?\\Omega|[A-Za-z.]+)\s*(?:\^?\{?(-?\d)\}?)?"
    for slash, name, exponent in re.findall(word, text):
        unit = find_unit(name.replace(" ", ""))
        if not unit:
            return None
        value *= unit ** (int(exponent or 1) * (-1 if slash else 1))
    return value
