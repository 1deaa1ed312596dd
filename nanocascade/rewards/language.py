"""The language of a text: langdetect (an extra), as the published checkers of instructions ask it.

# OURS: without langdetect (an extra) languages are told apart by script and frequent words.
The script with most letters decides, then the language of that script with most evidence; what
counts as evidence stands in languages.txt, as it is in many alphabets.
"""

import contextlib
import re
from pathlib import Path

try:
    import langdetect

    langdetect.DetectorFactory.seed = 0  # it draws lots, on short texts with a say
    langdetect.detector_factory.init_factory()  # now: two threads at once would miss its profiles
except ImportError:
    langdetect = None

LANGUAGES = {}  # letters of a script -> {language: pattern}
for _row in Path(__file__).with_name("languages.txt").read_text("utf-8").split("\n")[1:-1]:
    _script, _name, _marks = _row.split("\t")
    _words = r"\b(?:%s)\b" if _script.startswith("a-z") else "%s"
    LANGUAGES.setdefault(_script, {})[_name] = _words % _marks.replace(" ", "|")


def detect_language(text):
    """ISO 639-1 code of the language that most of a text's beginning is in; None if unclear."""
    if langdetect is not None:
        with contextlib.suppress(langdetect.LangDetectException):  # nothing but figures, say
            return langdetect.detect(text[:20_000]).partition("-")[0]  # zh-cn, zh-tw: zh
        return None
    text = text[:100_000].lower()
    marks = max(LANGUAGES.items(), key=lambda x: len(re.findall(f"[{x[0]}]", text)))[1]
    counts = {name: len(re.findall(mark, text)) for name, mark in marks.items()}
    best = max(counts, key=counts.get)
    return best if counts[best] else None


def is_english(text):
    """English, or ASCII with nothing that speaks against it ("good morning everyone")."""
    return (detect_language(text) or ("en" if text.isascii() else "")) == "en"
