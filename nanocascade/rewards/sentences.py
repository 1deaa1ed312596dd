"""Sentences and words as the published checkers of instructions count them.

They use three notions and an id decides which applies: \\w+ runs (number_words), sentences by rule,
and Punkt sentences cut into Treebank tokens (from NLTK, whose behaviour on prose is restated here:
no download, no dependency).
"""

import re
from itertools import chain, pairwise

_DOT, _STOP = "\ue000", "\ue001"  # private-use stand-ins: a dot inside a sentence, a sentence end
_RULES = (  # in this order; what stands in a match keeps its dots
    (r"(?:Mr|St|Mrs|Ms|Dr)\.|\.(?:com|net|org|io|gov|edu|me)|\d\.\d|Ph\.D\.", ""),
    (r"\.{2,}", _STOP),  # an ellipsis always ends a sentence
    (r"\s[A-Za-z]\.(?= )", ""),  # J. Low
    (
        r"(?:(?:[A-Z]\.){2,3}| (?:Inc|Ltd|Jr|Sr|Co)\.)(?= (?:(?:He|She|It|They|Their|Our|We"
        r"|But|That|This|However)\s|Mr|Mrs|Ms|Dr|Prof|Capt|Cpt|Lt|Wherever))",
        _STOP,
    ),
    (r"(?:[A-Za-z]\.){2,3}", ""),  # e.g. U.S.
    (r" (?:Inc|Ltd|Jr|Sr|Co|[A-Za-z])\.", ""),  # unless the rule before last ended one there
)


def sentences(text):
    """IFEval's sentences by rule; a closing quote changes places with the mark before it."""
    text = f" {text}  ".replace(_DOT, "\ufffd").replace(_STOP, "\ufffd").replace("\n", " ")
    for pattern, end in _RULES:
        text = re.sub(pattern, lambda match, end=end: match[0].replace(".", _DOT) + end, text)
    for mark in (".\u201d", '."', '!"', '?"'):
        text = text.replace(mark, mark[::-1])
    text = re.sub(r"[.?!]", rf"\g<0>{_STOP}", text).replace(_DOT, ".")
    parts = [part.strip() for part in text.split(_STOP)]
    return parts if parts[-1] else parts[:-1]


# Short forms that the English Punkt model knows, and words that open a sentence even after one.
_SHORT = set(
    "dr mr mrs ms messrs prof st ft lt col gen maj sen rep reps adm jr sr inc co corp cos ltd bros "
    "vs ave jan feb sept sep oct nov dec tues wed fri u.s u.k u.n u.s.a u.s.s.r d.c n.y n.j l.a "
    "s.c n.c a.m p.m ph.d m.b.a a.d ok calif conn fla mich minn tenn wash ariz colo ill".split()
)
_OPENERS = set(
    "he it they these this there if when while although though despite since so thus but "
    "yet however instead moreover meanwhile nonetheless nevertheless indeed similarly most many "
    "some both even nor under among according separately in the therefore her hence finally note "
    "otherwise currently without unfortunately between using given same such which being overall "
    "unlike together previously normally initially including unless whether furthermore besides "
    "still please here yes your i within except accordingly depending simply exactly".split()
)
_MARK = re.compile(r"(.*[.?!])(?=[?!)\";}\]*:@'({\[ ])", re.DOTALL)  # to a word's last end mark


def punkt_sentences(text):
    """Sentences by end marks, abbreviations aside: "Dr. Low paid. He left (late)." -> 2."""
    parts, start = [], 0
    for word, following in pairwise(chain(re.finditer(r"\S+", text), [None])):
        cut = _MARK.match(word[0] + " " * (following is not None))
        tail = word[0][cut.end() :] if cut else ""
        if cut and _ends_sentence(cut[1], tail, following[0] if following else ""):
            end = word.end() - len(tail.lstrip("\"')]}"))  # closing signs belong to what they close
            parts.append(text[start:end].strip())
            start = end
    return parts + ([text[start:].strip()] if text[start:].strip() else [])


def _ends_sentence(head, tail, following):
    """head: a word up to its last mark; tail: what sticks to it; following: the next word."""
    if head[-1] != ".":
        return True
    name = re.split(r"[(\"\[{*,;:@]", head[:-1].lower())[-1]  # without what opens the word
    opener = not tail and following[0].isupper() and following.lower() in _OPENERS
    if name.endswith(".") or name in _SHORT:  # "wait... So", "the U.S. They"
        return opener
    if len(name) == 1 and name.isalpha():  # "J. Low" goes on
        return opener or not following[:1].isalpha()
    number = name.replace(".", "").isdigit()  # "at 3. past", "in 2. :", but "1. Boil water"
    return not (number and (following[:1].islower() or following[:1] in tuple(",;:.!?")))


_TREEBANK = (  # in this order, on one sentence a line
    (r"``|`", r" \g<0> "),  # backticks first: a quote after one opens
    (r"(^|[ (\[{<])\"", r"\1 `` "),  # an opening double quote, an opening single one
    (r"(?i)(?<!\w)'(?!(?:re|ve|ll|m|t|s|d|n)\b)(?=\w)", "' "),
    (r'"', " '' "),
    (r"(?<=[^.])\.(?=[\])}>\"'\u00bb\u201d\u2019 ]*$)", " . "),  # only the sentence's last dot
    (
        r"[;@#$%&?!*\[\](){}<>\u00ab\u00bb\u2012-\u2015\u2018\u2019\u201c-\u201e]"
        r"|\.\.+|--",
        r" \g<0> ",
    ),
    (r"([:,])([^\d]|$)", r" \1 \2"),  # but 3:15 and 1,000 stay whole
    (r"(?i)(?<=[^' ])('[smd]|'ll|'re|'ve|n't|')(?=\s|$)", r" \1"),  # it 's, do n't, dogs '
    (r"(?i)\b(can(?=not\b)|gim(?=me\b)|gon(?=na\b)|got(?=ta\b)|lem(?=me\b)|wan(?=na\b))", r"\1 "),
)


def tokens(text):
    """Treebank tokens, sentence by sentence: "I don't know." -> I, do, n't, know, "."."""
    text = "\n".join(sentence.replace("\n", "\t") for sentence in punkt_sentences(text))
    for pattern, cut in _TREEBANK:
        text = re.sub(pattern, cut, text, flags=re.MULTILINE)
    return text.split()
