"""Verifiable instructions: what obeys, what breaks, what a row must carry, what a model may try."""

import json
import random
import subprocess
import sys
import time
from pathlib import Path

import pytest
from fixtures.machine import allowance

from nanocascade.rewards import check_row, instruct, language, score

DATA = Path(__file__).parents[2] / "shared" / "data"
REAL_ROWS = DATA / "nemo_gym" / "instruction_following.jsonl"

TALK = 'Dr. Low met J. Smith at 3.15 p.m. today. He said "I can\'t stay." Why? Rain (again)! Go on'

# id: (kwargs, an answer that obeys, an answer that does not)
CASES = {
    "keywords:existence": ({"keywords": ["tide", "moon"]}, "Tides and moonlight.", "Tides only."),
    "keywords:frequency": (
        {"keyword": "tide", "frequency": 2, "relation": "at least"},
        "Tide on tide.",
        "One tide.",
    ),
    "keywords:forbidden_words": ({"forbidden_words": ["sea", "C++"]}, "A seal in C.", "Sea, sea!"),
    "keywords:letter_frequency": (
        {"letter": "Q", "let_frequency": 2, "let_relation": "less than"},
        "Quit.",
        "Quit, quit.",
    ),
    "language:response_language": (
        {"language": "de"},
        "Das ist nicht der Hund, den ich sah.",
        "This is not the dog.",
    ),
    "length_constraints:number_sentences": (
        {"num_sentences": 6, "relation": "less than"},
        TALK,
        TALK + ". And on.",
    ),
    "length_constraints:number_paragraphs": (
        {"num_paragraphs": 2},
        "One\n***\nTwo\n***",
        "One *** *** Two",
    ),
    "length_constraints:number_words": (
        {"num_words": 3, "relation": "at least"},
        "well-kept garden",
        "two words",
    ),
    "length_constraints:nth_paragraph_first_word": (
        {"num_paragraphs": 2, "nth_paragraph": 2, "first_word": "crash"},
        'One\n\n"Crash," it went.',
        "One\n\nA crash.\n\n",
    ),
    "detectable_content:number_placeholders": ({"num_placeholders": 2}, "[a] to [[b]", "[a] ] ["),
    "detectable_content:postscript": ({"postscript_marker": "P.S."}, "Bye.\nP. S. Hi", "Bye. PS"),
    "detectable_format:number_bullet_lists": (
        {"num_bullets": 2},
        "List:\n* one\n  - two",
        "* one\n**two**",
    ),
    "detectable_format:constrained_response": ({}, "My answer is maybe.", "My answer: no."),
    "detectable_format:number_highlighted_sections": (
        {"num_highlights": 2},
        "*one* and **two**",
        "*one* and ** **",
    ),
    "detectable_format:multiple_sections": (
        {"section_spliter": "Section", "num_sections": 2},
        "Section 1\nx\nSection 2",
        "Section I",
    ),
    "detectable_format:json_format": ({}, '```json\n{"a": [1]}\n```', '{"a": [1]'),
    "detectable_format:title": ({}, "<<Tide>>\ntext", "<< >>\n<<Tide\n>>"),
    "combination:two_responses": ({}, "one ****** two", "one ****** one"),
    "combination:repeat_prompt": ({"prompt_to_repeat": "Say hi."}, "say hi. Hi!", "Hi! Say hi."),
    "startend:end_checker": ({"end_phrase": "The end."}, 'Well. "the end."', "The end. Bye"),
    "startend:quotation": ({}, '"All of it"', '"All" of it'),
    "change_case:capital_word_frequency": (
        {"capital_frequency": 2, "capital_relation": "at least"},
        "I saw UNESCO.",
        "I saw Unesco.",
    ),
    "change_case:english_capital": (
        {},
        "THE MOON PULLS THE SEA AND IT RISES",
        "DAS IST DER HUND UND ICH",
    ),
    "change_case:english_lowercase": ({}, "the tide is high", "the Tide is high"),
    "punctuation:no_comma": ({}, "No pause; none.", "A pause, one."),
    "keywords:word_once": ({"keyword": "tide"}, "A tide.", "Tide, tides."),
    "keywords:word_count_different_numbers": (
        {"keyword": "tide", "frequency": 2, "relation": "less than"},
        "A tide.",
        "Tide, tides.",
    ),
    "keywords:exclude_word_harder": ({"keyword": "tide"}, "The tides.", "The tide rose."),
    "keywords:keyword_specific_position": (
        {"keyword": "know", "n": 2, "m": 4},
        "Ask me. I don't know.",
        "Ask me. I know.",
    ),
    "keywords:no_adjacent_consecutive": ({}, "a cat", "a Bee"),
    "keywords:palindrome": ({}, "My kayak", "My Kayak"),
    "keywords:start_end": ({}, "Rise and rise", "Rise and rise."),
    "letters:letter_counting": ({"N": 4, "relation": "at least"}, "abc d", "abc 123"),
    "letters:letter_counting2": (
        {"letter": "a", "let_frequency": 2, "let_relation": "at least"},
        "Aha",
        "ah",
    ),
    "count:lowercase_counting": ({"N": 1}, "ONE word HERE", "one word HERE"),
    "count:counting_composition": (
        {"n_sent": 2, "n_words": 3},
        "***".join(["I go. You stay."] * 3),
        "I go. You stay. *** x",
    ),
    "count:count_unique": ({}, "The tide took the pier", "The tide took the tide"),
    "count:count_increment_word": (
        {"keyword1": "sea", "keyword2": "tide"},
        "Sea tide tide",
        "Sea sea tide tide",
    ),
    "paragraphs:paragraphs": ({}, "one *** two", "one"),
    "paragraphs:paragraphs2": ({}, "one\n\ntwo\n\n", "one\n\n\n\ntwo"),
    "first_word:first_word_sent": ({"first_word": "so"}, "So it is. So be it.", "So it is. Be it."),
    "first_word:first_word_answer": ({"first_word": "So"}, "so it is", "So, it is"),
    "last_word:last_word_sent": ({"last_word": "sea"}, "At sea. By the Sea!", "At sea. By it."),
    "last_word:last_word_answer": ({"last_word": "sea"}, "By the (sea)!", "The sea it is."),
    "detectable_format:bigram_wrapping": ({}, "<<I am>> <<at home>> now", "<<I am>> at home"),
    "detectable_format:square_brackets": ({}, "[All] [of] [it.]", "[All] of [it]"),
    "detectable_format:sentence_hyphens": ({}, "One here.-Two here.", "One here. - Two here."),
    "copy:repeat_phrase": (
        {"phrase": "Time flies when having fun", "small_n": 2},
        "Time flies when having fun. Time runs when having fun",
        "Time runs when having fun",
    ),
    "copy:copy": ({"prompt_to_repeat": "Say hi."}, " say hi.\n", "Say hi. Hi"),
    "copy:copying_simple": ({"prompt_to_repeat": "Say hi."}, "Say hi.", "Hi"),
    "copy:copying_multiple": ({"prompt_to_repeat": "Hi", "N": 2}, "hi\n******\nHi", "Hi Hi"),
    "new:copy_span_idx": (
        {"prompt_to_repeat": " The tide.", "n_start": 0, "n_end": 4},
        "the",
        "The tide",
    ),
    "punctuation:punctuation_dot": ({}, "Well!", "v1.2"),
    "punctuation:punctuation_exclamation": ({}, "Well.", "Well!"),
}


def grade(name, kwargs, text):
    row = {"id": 1, "instruction_id_list": [name], "kwargs": [kwargs]}
    return instruct.verify_instructions(instruct.check_row(row), {"content": text}).value


def test_every_id_has_a_case():
    """The tables of checks and of cases name the same 54 ids."""
    assert len(instruct.CHECKS) == 54 and set(CASES) == set(instruct.CHECKS)


@pytest.mark.parametrize("name", CASES)
def test_numbers_check(name):
    """One answer obeys and gets 1, one breaks it and gets 0; a blank answer obeys nothing."""
    kwargs, obeys, breaks = CASES[name]
    assert grade(name, kwargs, obeys) == 1.0 and grade(name, kwargs, breaks) == 0.0
    assert grade(name, kwargs, " \n") == 0.0


def test_numbers_segments():
    """Sentences and tokens agree with NLTK's on abbreviations, initials, numbers and quotes."""
    assert len(instruct.punkt_sentences(TALK)) == 5
    assert len(instruct.punkt_sentences("Wait... what? The U.S. They left, e.g. now.")) == 4
    assert instruct.tokens('"I can\'t," he said: 1,000 (or so).') == [
        "``",
        "I",
        "ca",
        "n't",
        ",",
        "''",
        "he",
        "said",
        ":",
        "1,000",
        "(",
        "or",
        "so",
        ")",
        ".",
    ]
    assert instruct.sentences("Mr. A. Low of Acme Inc. paid 3.50. He left... See x.com!") == [
        "Mr. A. Low of Acme Inc. paid 3.50.",
        "He left...",
        "See x.com!",
    ]


@pytest.mark.parametrize(
    ("code", "text"),
    [
        ("en", "The tide is in the bay"),
        ("fr", "Il est dans la maison avec les enfants"),
        ("es", "La marea es alta por la luna"),
        ("pt", "A mar\u00e9 n\u00e3o \u00e9 alta"),
        ("ru", "\u042d\u0442\u043e \u043c\u044b"),
        ("uk", "\u0426\u0435 \u0456 \u0457\u0457"),
        ("ja", "\u6f6e\u306f\u9ad8\u3044"),
        ("zh", "\u8fd9\u662f\u6211\u7684"),
        ("ar", "\u0627\u0644\u0645\u062f \u0639\u0627\u0644\u064a"),
        ("ko", "\ubc14\ub2e4"),
        ("hi", "\u092f\u0939 \u0939\u0948"),
        ("el", "123 ..."),
    ],
)
def test_numbers_language(code, text, monkeypatch):
    """Script, letters and frequent words tell languages apart; figures alone are in none."""
    monkeypatch.setattr(language, "langdetect", None)
    assert instruct.detect_language(text) == (None if code == "el" else code)


def test_parity_language():
    """Where the checkers' langdetect is installed it decides, on code and long texts too."""
    langdetect = pytest.importorskip("langdetect")
    grammar = 'IF_STMT ::= "IF" ASSIGNMENT_EXPRESSION ":" SUITE ("ELIF" SUITE)* ["ELSE" ":" SUITE]'
    for text in (grammar, TALK, "Das ist nicht der Hund, den ich sah.", "Er is geen taal zo."):
        assert instruct.detect_language(text) == langdetect.detect(text)
    assert instruct.detect_language("\u8fd9\u662f\u6211\u7684\u4e66\uff0c\u4f60\u770b") == "zh"
    assert instruct.detect_language("123 ...") is None


def test_run_languages_in_threads():
    """The first texts may be judged by several threads at once: each finds the profiles loaded."""
    pytest.importorskip("langdetect")
    program = (
        "from nanocascade.rewards import instruct; import langdetect.detector_factory as d; "
        "print(len(d._factory.langlist))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert int(done.stdout) > 40, done.stderr


def test_numbers_lacking_word():
    """A repetition may lack the word before its last one, which then stands where that was: one
    change; one word more is none of it. "Rise and RISE" ends as it began, whatever the case."""
    kwargs = {"phrase": "Time flies so fast", "small_n": 2}
    assert grade("copy:repeat_phrase", kwargs, "Time flies so fast. Time flies fast") == 1.0
    assert grade("copy:repeat_phrase", kwargs, "Time flies so fast. Time flies by so fast") == 0.0
    assert grade("keywords:start_end", {}, "Rise and RISE") == 1.0


def test_numbers_all_must_hold():
    """One broken instruction of three costs the reward and is named with the fraction."""
    row = {
        "instruction_id_list": ["punctuation:no_comma", "keywords:existence", "startend:quotation"],
        "kwargs": [None, {"keywords": ["tide"], "num_words": None}, {"language": None}],
    }
    row = instruct.check_row(row)
    good = instruct.verify_instructions(row, {"content": '"A tide"', "reasoning_content": "a, b"})
    bad = instruct.verify_instructions(row, {"content": '"A moon"'})
    assert good == (1.0, "3/3 hold") and bad == (0.0, "2/3 hold; failed: keywords:existence")
    assert instruct.verify_instructions(row, {"content": None}) == (0.0, "blank answer")


@pytest.mark.parametrize(
    ("names", "kwargs", "said"),
    [
        (["keywords:exist"], [{}], "keywords:exist"),
        ([], [], "one kwargs each"),
        (["keywords:existence"], [], "one kwargs each"),
        (["keywords:existence"], [{}], "'keywords' is None"),
        (["letters:letter_counting"], [{"N": 2.5, "relation": "at least"}], "'N' is 2.5"),
        (["letters:letter_counting"], [{"N": 2, "relation": "most"}], "'relation' is 'most'"),
        (["language:response_language"], [{"language": "tlh"}], "'tlh'"),
    ],
)
def test_bad_rows_raise(names, kwargs, said):
    """A row that cannot be graded raises with its id and the offending value, never scores 0."""
    with pytest.raises(ValueError, match=f"row 'r7'.*{said}"):
        check_row({"id": "r7", "instruction_id_list": names, "kwargs": kwargs})


def test_nullable_columns():
    """Whole floats and one-element lists, as columnar files give them, are taken as meant."""
    assert grade("count:lowercase_counting", {"N": 1.0}, "one WORD") == 1.0
    assert grade("last_word:last_word_sent", {"last_word": ["sea"]}, "At sea.") == 1.0


def test_fuzz_never_raises_and_stays_fast():
    """Any text gets a verdict from every check, and repetition of its own syntax is no attack."""
    rng = random.Random(0)
    bits = [*"aA. ,!?\"'[]<>*-`:\n\t{}1", "\ud800", "\u0130", "\ue000", "***", "U.S. He ", "Time "]
    texts = ["".join(rng.choices(bits, k=rng.randrange(60))) for _ in range(300)]
    texts += [bit * (20_000 // len(bit)) for bit in bits] + ["[1," * 50_000, "x" * 10_000_000]
    start = time.process_time()
    for text in texts:
        for name, (kwargs, _, _) in CASES.items():
            assert grade(name, kwargs, text) in (0.0, 1.0)
    assert time.process_time() - start < allowance(20)  # a quadratic check would take minutes


@pytest.mark.skipif(not REAL_ROWS.exists(), reason="the released rows are not beside this checkout")
def test_released_rows():
    """The released rows grade: answers written for them earn 1, their spoiled forms 0."""
    rows = [json.loads(line) for line in REAL_ROWS.read_text(encoding="utf-8").splitlines()]
    tale = "He is back.\n\nShe waits.\n\nCrash went the car.\n\nThen came the contest"
    sql = "SELECT URID\n***\n* A\n* B\n* C\n* D\n* E one two three"
    for row, answer, spoiled in zip(rows, (tale, sql), (tale + "s", sql + " four"), strict=True):
        assert score(row, answer).value == 1.0
        assert score(row, spoiled).value == 0.0
