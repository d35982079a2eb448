"""Pairs of answers and of questions: pairs with a difference in one token, and paraphrases."""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Iterator

# No two entries of a group have the same meaning.
GROUPS: tuple[tuple[str, ...], ...] = (
    ("5", "-5", "\u22126", "55", "50", "5.5", "0.05", "5%", "50%", "$5", "€5", "5!", "5^2", "5²"),
    (">5", "<5", "≥5", "≤5", "≠5", "±5", "~5", "not 5", "about 5", "at least 5", "at most 5"),
    ("less than 5", "more than 5", "up to 5", "5 or 6", "5 and 6", "5 to 6", "between 5 and 6"),
    ("5 million", "5 billion", "5 thousand", "5 dozen", "5 hundred", "5"),
    ("7 days", "7 weeks", "7 hours", "7 kg", "7 g", "7 mg", "7 km", "7 cm", "7 °C", "7 °F", "7"),
    ("5 am", "5 pm", "17:00", "5:30", "17:30"),
    ("x > y", "x < y", "x = y", "x != y", "x >= y", "x <= y", "y > x + 1"),
    ("x + 2", "x - 2", "2x", "x^2", "x/2", "x_2", "-x", "x", "X", "|x|", "√x", "x!", "x'"),
    ("n^2", "2n", "2^n", "n", "n log n", "log n", "n!", "O(n)", "O(n^2)", "O(log n)", "Θ(n)"),
    ("sqrt(2)", "2", "log 2", "sin(2)", "cos(2)", "1/3", "2/3", "3/2", "2^0.5", "10^-3", "10^3"),
    ("(2+3)*4", "2+3*4", "2+(3*4)+1", "3 - (2 - 1)", "3 - 2 - 1", "(a+b)/c", "a+b/c"),
    ("f(2)", "g(2)", "f(3)", "f'(2)", "f(-2)", "f^2(2)"),
    ("H2O", "CO2", "CO", "Co", "H2O2", "H2", "NO", "NO2", "N2O", "OH-", "H+", "Na+", "NaCl", "Na"),
    ("ethane", "ethene", "ethyne", "ethanol", "methane", "methanol", "methanal", "propane"),
    ("nitrate", "nitrite", "nitride", "sulfate", "sulfite", "sulfide", "chlorate", "chlorite"),
    ("Austria", "Australia", "Iran", "Iraq", "Niger", "Nigeria", "Slovakia", "Slovenia", "Mali"),
    ("Maria Lopez", "Marta Lopez", "Mario Lopez", "Maria Lopes", "M. Lopez", "Lopez"),
    ("J. Smith", "J. Doe", "J. S.", "K. Smith", "John Smith", "Joan Smith", "John Smyth"),
    ("U.S.", "U.K.", "U.N.", "US", "us", "UK", "EU", "USA"),
    ("C", "C#", "C++", "D", "E", "Objective-C", "F#"),
    (
        "A",
        "B",
        "C",
        "D",
        "A and B",
        "A and C",
        "A, B",
        "A, C",
        "A or B",
        "neither A nor B",
        "not A",
    ),
    ("(B) 5 apples", "(B) 6 apples", "(C) 5 apples", "(B) 5 pears"),
    ("Python 3", "Python 2", "Java 3", "Python 3.1", "Python 3.10", "Python 3.11"),
    ("v3.1", "v3.10", "v3.1.1", "v3.2", "v4.1"),
    ("yes", "no", "not yes", "yes and no", "maybe", "true", "false"),
    ("It is safe", "It is not safe", "It is never safe", "It is unsafe"),
    ("increase", "decrease", "no change", "an increase", "not increase"),
    ("Paris", "Not Paris", "Paris, Texas", "Paris Hilton", "paris green", "near Paris"),
    ("angel", "angle", "desert", "dessert", "principal", "principle", "affect", "effect"),
    ("hypertension", "hypotension", "hyperglycemia", "hypoglycemia", "interstate", "intrastate"),
    ("prednisone", "prednisolone", "clonidine", "clonazepam", "Celexa", "Celebrex", "Zantac"),
    ("2024-03-04", "2024-04-03", "2024-03-05", "March 4", "May 4", "4 March 2024", "4 March 2025"),
    ("10:15", "10:51", "10.15", "10/15", "10-15", "1015", "10,15"),
    ("foo_bar", "foo bar", "fooBar", "foobar", "FOO_BAR", "_foo_bar", "foo.bar", "foo-bar"),
    ("a[0]", "a[1]", "a(0)", "a{0}", "*a", "&a", "!a", "~a", "a", "a?", "a+", "a*"),
    ("women", "woman", "men", "man", "child", "children"),
    ("mW", "MW", "kW", "Mb", "MB", "Gb", "GB", "ms", "Ms"),
    ("vitamin A", "vitamin B", "vitamin C", "vitamin", "vitamins", "type 1", "type 2", "type"),
    ("the dog bites the man", "the man bites the dog", "a dog bites the man"),
    ("time", "the time", "a time", "times"),
)
REFUSALS = (
    "I cannot answer that question.",
    "I can't help with that.",
    "I'm sorry, but I can't assist with that request.",
    "I am unable to determine this.",
    "I don't know.",
    "I do not know the answer.",
    "I'm not sure.",
    "Sorry, I can't do that.",
    "As an AI language model, I have no opinion.",
    "Unfortunately, that information is not available.",
    "I won't do that.",
    "I must decline.",
    "I'd rather not say.",
    "That's not something I can help with.",
    "The answer is unknown.",
    "Answer: I don't know",
    "\\boxed{I cannot say}",
    "#### I don't know",
    '{"answer": "I cannot answer that."}',
    "It cannot be determined.",
    "There is not enough information.",
    "Lo siento, no puedo ayudar con eso.",
    "Je ne peux pas répondre.",
    "Das kann ich nicht beantworten. Tut mir leid.",
    "抱歉，我无法回答。",
)

Render = Callable[[str], str]

STATED: dict[str, Render] = {
    "bare": lambda x: x,
    "sentence": lambda x: f"The answer is {x}.",
    "final": lambda x: f"We add them up.\nTherefore, the final answer is {x}.",
    "hashes": lambda x: f"First we add them up.\n#### {x}",
    "boxed": lambda x: f"Therefore, the answer is $\\boxed{{{x}}}$.",
    "box alone": lambda x: f"We add them up, and get:\n$$\\boxed{{{x}}}$$",
    "box of a value": lambda x: f"Thus, the value that was asked for is $\\boxed{{{x}}}$.",
    "bold": lambda x: f"**Answer:** {x}",
    "heading": lambda x: f"### Reasoning\nWe add.\n\n### Final Answer\n\n{x}",
    "courteous": lambda x: f"The answer is {x}.\n\nI hope this answer helps! Let me know if not.",
}


def _numbers(draw: random.Random) -> tuple[str, str]:
    """A number, and the same with another digit, sign, point, percent sign or unit."""
    n = draw.choice(
        (draw.randrange(1, 10), draw.randrange(10, 10**4), draw.randrange(10**4, 10**9))
    )
    one = draw.choice((f"{n}", f"{n:,}", f"{n}.{draw.randrange(1, 10)}"))
    at = draw.choice([i for i, c in enumerate(one) if c.isdigit()])
    digit = draw.choice([d for d in "123456789" if d != one[at]])
    unit = draw.choice(("km", "kg", "years", "%", "€", "million", "x", "apples", "°", "!", "m/s"))
    other = draw.choice(
        (
            one[:at] + digit + one[at + 1 :],
            f"-{one}",
            f"\u2212{one}",
            f"{one}{digit}",
            f"{one} {unit}",
            f"{unit} {one}",
            f"not {one}",
            f"{one}/{n + 1}",
            f"{one}^{digit}",
            f"${one}",
            f"> {one}",
        )
    )
    return one, other


_OPERATORS = (" + ", " - ", " * ", " / ", "^", " = ", " < ", " > ", " ≤ ", " mod ", " and ", " or ")


def _formulas(draw: random.Random) -> tuple[str, str]:
    """A term, and the same with another operator, order, sign or pair of brackets."""
    a, b, c = (draw.choice("abcxyz") + str(i) for i in range(3))
    p, q, r = draw.sample(_OPERATORS, 3)
    one = f"{a}{p}{b}{q}{c}"
    return one, draw.choice(
        (
            f"{a}{r}{b}{q}{c}",
            f"{b}{p}{a}{q}{c}",
            f"{a}{p}({b}{q}{c})",
            f"-{one}",
            f"{a}{p}{b}",
            f"2{one}",
            f"{one}'",
        )
    )


_ELEMENTS = (
    "H",
    "C",
    "N",
    "O",
    "F",
    "Na",
    "Mg",
    "Al",
    "S",
    "Cl",
    "K",
    "Ca",
    "Fe",
    "Cu",
    "Zn",
    "Br",
)


def _chemistry(draw: random.Random) -> tuple[str, str]:
    """A formula, and the same with another element, number or charge."""
    parts = [(e, draw.randrange(1, 9)) for e in draw.sample(_ELEMENTS, draw.randrange(2, 5))]

    def told(given: list[tuple[str, int]]) -> str:
        return "".join(e + (str(n) if n > 1 else "") for e, n in given)

    at = draw.randrange(len(parts))
    element, count = parts[at]
    other = draw.choice([e for e in _ELEMENTS if e not in {e for e, _ in parts}])
    changed = draw.choice(((element, count + 1), (other, count)))
    one = told(parts)
    return one, draw.choice((told([*parts[:at], changed, *parts[at + 1 :]]), one + "+", one + "-"))


_SYLLABLES = ("an", "bel", "cor", "dan", "el", "far", "gal", "hol", "ir", "jo", "kan", "lor", "mi")


def _names(draw: random.Random) -> tuple[str, str]:
    """Return a name, and another name that differs in one letter, word, initial or number."""

    def word() -> str:
        return "".join(draw.choice(_SYLLABLES) for _ in range(draw.randrange(2, 4))).capitalize()

    first, last = word(), word()
    while first == last:
        last = word()
    at = draw.randrange(len(last))
    letter = draw.choice([c for c in "abdefgklmnoprst" if c != last[at].lower()])
    near = last[:at] + (letter.upper() if at == 0 else letter) + last[at + 1 :]
    one = f"{first} {last}"
    return one, draw.choice(
        (
            f"{first} {near}",
            f"{last} {first}",
            f"{first} {last}s",
            f"{first[0]}. {last}",
            f"{one} II",
            f"{first}",
            f"{one} Jr.",
            one.upper(),
        )
    )


def atoms(draw: random.Random) -> tuple[str, str]:
    """Two expressions that differ in one meaningful token."""
    kind = draw.randrange(8)
    if kind < 4:
        return (_numbers, _formulas, _chemistry, _names)[kind](draw)
    one, other = draw.sample(draw.choice(GROUPS), 2)
    return one, other


def different_answers(seed: int, count: int) -> Iterator[tuple[str, str]]:
    """Answers that differ in one meaningful token, each stated in one of many ways."""
    draw = random.Random(seed)
    styles = list(STATED.values())
    for _ in range(count):
        one, other = atoms(draw)
        yield draw.choice(styles)(one), draw.choice(styles)(other)


# How models write one number of a unit, beside the ways of stating it.
SPELLINGS: dict[str, Callable[[str, str], str]] = {
    "the number alone": lambda n, _: n,
    "with separators": lambda n, _: f"{int(n):,}" if n.isdigit() else n,
    "with .0": lambda n, _: f"{n}.0" if n.isdigit() else n,
    "in LaTeX's delimiters": lambda n, _: f"${n}$",
    "bold": lambda n, _: f"**{n}**",
    "with the unit": lambda n, unit: f"{n} {unit}",
    "with $": lambda n, _: f"${n}",
}


_QUESTIONS = (
    "What is {}?",
    "Explain {} in one paragraph.",
    "Is {} safe in pregnancy?",
    "How do I compare {} with the others?",
    "Write a short story about {}.",
    "Which of them is worth more, {} or the rest?",
    "Describe {} to a child.",
    "Why would anyone prefer {}?",
    "Tell me about {} and its history.",
    "Who was the first to speak of {} in public?",
    "Translate into French: {}",
    'Count the letters of "{}".',
)


_VERB = re.compile(r"(?:explain|describe|summari[sz]e|define|give|show|help|tell)\b")


def paraphrases(question: str) -> dict[str, str]:
    """Return paraphrases of a question by their kind. Kinds that change nothing are left out."""
    words = question.split(" ")
    bare = re.sub(r"\s*[?.]$", "", question)
    lowered = question[:1].lower() + question[1:]
    middle = len(words) // 2
    contracted = re.sub(
        r"\b(do|does|is|are) not\b",
        lambda m: f"{m[1]}n't",
        re.sub(r"\b([Ww]hat|[Ww]here|[Ww]ho) is\b", r"\1's", question),
    )
    long = next((w for w in words[1:] if len(w) >= 7 and w.isalpha()), "")
    found = {
        "white space": "  ".join([" ".join(words[:middle]), " ".join(words[middle:])]) + " ",
        "no mark at the end": bare,
        "small letter at the beginning": lowered,
        "a greeting": f"Hello, {lowered}",
        "please at the beginning": f"Please {lowered}",
        "please at the end": f"{bare}, please{question[len(bare) :]}",
        "thanks": f"{question}{'' if question[-1:] in '.?!' else ','} thanks!",
        "could you": f"Could you please {'' if _VERB.match(lowered) else 'tell me '}"
        f"{re.sub(r'[.?]$', '', lowered)}?",
        "contractions": contracted,
        "no capitals": question.lower(),
        "a typing error": question.replace(long, long[:3] + long[4:], 1) if long else question,
        "no articles": re.sub(r"\b(?:the|a|an) ", "", question),
    }
    return {way: text for way, text in found.items() if text != question}


def harmless(draw: random.Random, question: str) -> str:
    """Return the same question, possibly rephrased in a way that should be a hit."""
    ways = paraphrases(question)
    way = draw.choice(
        (
            "",
            "white space",
            "no mark at the end",
            "small letter at the beginning",
            "a greeting",
            "please at the beginning",
            "please at the end",
            "thanks",
        )
    )
    return ways.get(way, question)


def different_questions(seed: int, count: int) -> Iterator[tuple[str, str]]:
    """Yield questions that differ in one meaningful token, each in one of many wordings."""
    draw = random.Random(seed)
    for _ in range(count):
        one, other = atoms(draw)
        form = draw.choice(_QUESTIONS)
        yield harmless(draw, form.format(one)), harmless(draw, form.format(other))


def changed(draw: random.Random, text: str) -> str | None:
    """Return a text with a changed token and maybe another meaning, or None for a short text."""
    words = text.split(" ")
    inner = [i for i in range(1, len(words)) if re.search(r"\w", words[i])]
    if len(inner) < 6:
        return None
    # Courtesies are at the end or the beginning, where some changes change nothing.
    i, j = draw.sample(inner[2:-1], 2)
    other = list(words)
    way = draw.randrange(7)
    if way == 0:
        del other[i]
    elif way == 1:
        other[i], other[j] = other[j], other[i]
    elif way == 2:
        other.insert(i, "not")
    elif way == 3:
        at = draw.randrange(len(words[i]))
        other[i] = (
            words[i][:at] + draw.choice("abcdefghijklmnopqrstuvwxyz0123456789") + words[i][at:]
        )
    elif way == 4:
        at = draw.randrange(len(words[i]))
        other[i] = words[i][:at] + words[i][at + 1 :]
    elif way == 5:
        other[i] = words[i].swapcase()
    else:
        other[i] = f"{words[i]}{draw.choice(('!', '%', '²', '-', ' or', ' 2', ')', '+'))}"
    found = " ".join(other)
    return None if found.split() == text.split() else found
