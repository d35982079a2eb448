"""Decides whether two questions are the same question in the same words. Pure.

The module compares words, and knows nothing of their meaning. A measure of similarity can't
distinguish ethane from ethene, or two numbers. Two questions are therefore the same only if every
word, number and sign is the same, in the same order and case. Paraphrases do not match.

Only harmless differences are ignored: white space, a greeting, "please" and "thanks" around a
request, the full stop or question mark at the end, a capital at the beginning, and contractions
("what's", "don't"). A text may be *about* words, such as a translation, a quotation or code. In
such a text even these differences count.
"""

from __future__ import annotations

import re
import unicodedata

import numpy as np

from service.classifier.hashed_ngrams import Features, FeatureSpec, Featurizer

# The features cover only a part of longer texts.
MOST_CHARACTERS = 4000
_FEATURES = Featurizer(FeatureSpec())

# Words that begin a question or a request. With a capital, none of them is a name.
_ASKS = (
    "what|what's|who|who's|whom|whose|where|where's|when|why|how|which|is|isn't|are|aren't|was|were"
    "|do|don't|does|doesn't|did|didn't|can|can't|could|should|would|has|have"
)
_REQUESTS = (
    "explain|describe|write|list|give|tell|show|name|define|find|help|summarize|summarise|compare"
    "|calculate|compute|solve|create|make|generate|provide|suggest|recommend|convert|discuss|draft"
    "|compose|outline|analyze|analyse|evaluate|identify|determine|prove|design|implement"
    "|book|order|schedule|cancel|remind|check|turn|set|play|add|transfer|pay|update|change|remove"
    "|look|start|stop|open|close|send|search|let|imagine|craft|develop|act|pretend|rank|edit|build"
    "|use|given|suppose|assume"
)
_I = r"i(?='(?:d|m|ve)\s| (?:need|want|would|have|am|lost|forgot|like)\b)"
_FIRST = re.compile(rf"(?:(?:{_ASKS}|{_REQUESTS})(?![\w'-])|{_I})", re.IGNORECASE)
_ASK = re.compile(rf"(?:{_ASKS})(?![\w'-])", re.IGNORECASE)
_GREETING = re.compile(
    r"(?:hi|hello|hey|good (?:morning|afternoon|evening|day))(?: there)?\s?[,.!]\s?", re.IGNORECASE
)
_PLEASE = re.compile(r"(?:please|kindly),?\s", re.IGNORECASE)
# Requests in the form of a question. With other verbs it may be a question about abilities.
_COULD_YOU = re.compile(
    r"(?:can|could|would) you (?:(?:please|kindly) )?"
    r"(?=(?:explain|describe|summari[sz]e|define|(?:give|show|help|tell) me)\b)",
    re.IGNORECASE,
)
_TELL_ME = re.compile(r"tell me (?=(?:what|who|where|when|why|how|which)\b)", re.IGNORECASE)
# Courtesies in the order of the search. A comma or the end of a sentence must precede them.
_THANKS = ("thank you", "thanks", "please", "thx")
_CONTRACTIONS = {
    "what's": "what is",
    "who's": "who is",
    "where's": "where is",
    "i'm": "i am",
    "can't": "can not",
    "cannot": "can not",
    "won't": "will not",
}
_CONTRACTED = re.compile(
    r"(?<![\w'-])(?:what's|who's|where's|i'm|can't|cannot|won't"
    r"|(?:do|does|did|is|are|was|were|has|have|could|should|would)n't)(?![\w'-])",
    re.IGNORECASE,
)
# Signs of a text that may be about words: quotations, code, lists, and tasks about a wording.
_LITERAL = re.compile(
    r"[\"`“”«»„\\<>{}\[\]|_~\n]|:(?!\d)|(?<!\w)'|'(?!\w)"
    r"|\b(?:translat|spell|pronounc|rewrit|rephras|paraphras|proofread|punctuat|capitali[sz]"
    r"|abbreviat|regex|grep|syllab)"
    r"|\b(?:words?|letters?|characters?|vowels?|consonants?|phrases?|grammar|grammatical"
    r"|synonyms?|antonyms?|rhymes?|acronyms?|contractions?|lyrics|glob)\b",
    re.IGNORECASE,
)
# A sentence with one of these words may be about the courtesy or the punctuation mark itself.
_OF_SPEECH = re.compile(
    r"\b(?:say|says|said|saying|call|called|mean|means|meaning|counts?|repeat|quotes?|sentences?"
    r"|sings?|sang|sung|songs?|titles?|patterns?|commands?|answers?|repl(?:y|ies)|please|thanks"
    r"|thank|hello|hi)\b",
    re.IGNORECASE,
)
_SENTENCE = re.compile(r"[.?!]\s+(?=\S)")
_MARK = re.compile(r"(?<=[\w)%])(?:\s?\?|\.)$")


def canonical_form(text: str) -> str:
    """Return the canonical form of a question, which all its harmless variants share."""
    plain = unicodedata.normalize("NFC", text).replace("’", "'").strip()
    if _LITERAL.search(plain):
        return plain
    plain = " ".join(plain.split())
    bare = _without_thanks(_without_opening(_without_thanks(plain)))
    bare = _without_mark(_small_beginning(bare))
    return bare if _OF_SPEECH.search(bare) else _CONTRACTED.sub(_in_full, bare)


def _last_sentence(text: str) -> str:
    ends = [found.end() for found in _SENTENCE.finditer(text)]
    return text[ends[-1] if ends else 0 :]


def _without_opening(text: str) -> str:
    """Remove greetings and courtesies from the beginning of a question or request."""
    bare = text
    for courtesy in (_GREETING, _PLEASE, _COULD_YOU, _TELL_ME):
        if found := courtesy.match(bare):
            bare = bare[found.end() :]
            if courtesy is _COULD_YOU:
                # The question mark belonged to "could you", which is gone now.
                bare = _MARK.sub("", bare)
    first = _SENTENCE.split(bare, maxsplit=1)[0]
    return bare if _FIRST.match(bare) and not _OF_SPEECH.search(first) else text


def _small_beginning(text: str) -> str:
    """Write the first word without a capital, if it begins a question or request."""
    if not _FIRST.match(text):
        return text
    first, space, rest = text.partition(" ")
    # A word in capitals stays, because it may be an abbreviation such as WHO.
    if first == "I" or first[1:].islower() or "'" in first:
        first = first.lower()
    return first + space + rest


def _without_mark(text: str) -> str:
    """Remove the full stop at the end of a text, or the question mark of a question."""
    mark = _MARK.search(text)
    if mark is None:
        return text
    last = _last_sentence(text)
    if _OF_SPEECH.search(last) or (mark[0] != "." and not _ASK.match(last)):
        return text
    return text[: mark.start()]


def _without_thanks(text: str) -> str:
    """Remove courtesies from the end of a text, after a comma or the end of a sentence."""
    while True:
        bare = text.rstrip(" .!?")
        word = next((phrase for phrase in _THANKS if bare[-len(phrase) :].lower() == phrase), None)
        if word is None:
            return text
        before = bare[: -len(word)].rstrip(" ")
        # After several commas, the word may be the last item of a list.
        last = _last_sentence(before)
        if before[-1:] not in (",", ".", "?", "!") or last[:-1].count(","):
            return text
        if before[-1] == "," and bare[-len(word) :] != word:
            return text  # With a capital, the word is part of a title.
        if _OF_SPEECH.search(last) and last.lower().rstrip(" .!?,") not in _THANKS:
            return text
        text = before.rstrip(" ,") if before[-1] == "," else before


def _in_full(found: re.Match[str]) -> str:
    if found.start() and not found[0].islower():
        return found[0]  # A capital inside the text marks a name, such as Who's.
    word = found[0].lower()
    full = _CONTRACTIONS.get(word) or f"{word[:-3]} not"
    return full if found[0][0].islower() else full[0].upper() + full[1:]


def same_words(first: str, second: str) -> bool:
    """Whether two questions in canonical form are the same."""
    return bool(first) and first == second


def similarity(first: str, second: str) -> float:
    """Cosine of the hashed n-grams of two texts, in [0, 1]."""
    a, b = _FEATURES(first), _FEATURES(second)
    _, at_a, at_b = np.intersect1d(a.buckets, b.buckets, assume_unique=True, return_indices=True)
    norms = _norm(a) * _norm(b)
    return float(a.counts[at_a] @ b.counts[at_b]) / norms if norms else 0.0


def _norm(features: Features) -> float:
    return float(np.sqrt(np.square(features.counts.astype(np.float64)).sum()))
