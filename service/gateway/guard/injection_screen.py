"""The built-in screen for prompt injection and jailbreaks. It searches for families of phrases.

Each family has a weight. The score of a prompt is 1 − Π (1 − weight) over the families found in it.

The text is normalised first: Unicode compatibility forms are unified, invisible characters are
removed, letters that look like Latin letters become Latin, digits inside of words become letters,
and s p a c e d words are joined. Text in base64 is decoded and searched as well.

The screen recognises attacks only by their words. It misses attacks that use other words, for
example in a story, in an unsupported language, or in small steps over many turns. A model in place
of this screen can find those. `python -m loadtests.guard` measures the share of a labelled set that
the screen catches.
"""

from __future__ import annotations

import base64
import binascii
import re
import unicodedata
from collections.abc import Iterator, Sequence

from service.gateway.guard.screen_interface import NOTHING, Finding, Text, aside

_RULES = (
    r"(?:instructions?|rules?|guidelines?|prompts?|directions?|directives?|commands?|"
    r"constraints?|"
    r"polic(?:y|ies)|programming|training|restrictions?|safeguards?|guardrails?|orders|context|"
    r"messages?|filters?|everything|what (?:you were|i|they) (?:told|said))"
)
_OURS = (
    r"(?:all|any|every|the|your|these|those|this|my|previous|prior|above|earlier|preceding|"
    r"former|"
    r"past|original|initial|existing|system|safety|content|ethical|developer|hidden|of|that|"
    r"other|"
    r"given|current|foregoing)"
)
_FAMILIES = tuple(
    (name, weight, re.compile(pattern))
    for name, weight, pattern in (
        (
            "override",
            0.85,
            r"\b(?:ignor(?:e|ing)|disregard(?:ing)?|forget(?:ting)?|overrid(?:e|ing)|"
            r"bypass(?:ing)?|"
            r"neglect|discard|dismiss|cancel|abandon|drop|erase|set aside|"
            r"(?:do not|don't|dont|stop|no longer|never) (?:follow(?:ing)?|obey(?:ing)?|"
            r"adher(?:e|ing) to|"
            r"comply(?:ing)? with|listen(?:ing)? to))"
            rf"(?: {_OURS}| about| to| from| you| have){{1,6}} {_RULES}\b",
        ),
        (
            "override",
            0.85,
            r"\b(?:ignor(?:e|ing)|disregard(?:ing)?|forget) (?:everything|anything|all|whatever)"
            r"(?: that| which| you)?(?: (?:was|were|has been|have been|is|i|they|we|"
            r"you))?(?: just)? "
            r"(?:above|before|previously|prior|so far|told|said|written|learned|been told|stated|"
            r"know)\b",
        ),
        (
            "override",
            0.8,
            r"ignorier\w* (?:alle|die|deine|bitte)?.{0,30}(?:anweisung|regel|vorgabe)"
            r"|vergiss (?:alle|alles|deine).{0,30}(?:anweisung|regel|bisher|vorher)"
            r"|ignor\w+ (?:toutes?|tes|les|vos).{0,30}(?:instruction|consigne|regle|règle)"
            r"|oublie\w* (?:toutes?|tes|les|vos).{0,30}(?:instruction|consigne|regle|règle)"
            r"|ignora\w* (?:todas?|las|tus|tutte|le|os|todos).{0,30}(?:instruc|istruzion|regla|"
            r"regole)"
            r"|olvida (?:todas?|las|tus|todo).{0,30}(?:instruc|regla|anterior)"
            r"|忽略.{0,12}(?:指令|指示|提示|规则)|(?:無視|忘れ).{0,12}(?:指示|命令)|(?:指示|命令).{0,6}無視"
            r"|игнорируй.{0,30}(?:инструкц|правил|указан)",
        ),
        (
            "reveal",
            0.6,
            r"\b(?:reveal|show|print|repeat|output|display|tell|leak|dump|give|share|write|"
            r"recite|quote|"
            r"expose|disclose|echo|copy|summari[sz]e|translate|encode|spell|paste|what (?:is|are|"
            r"were|was)|"
            r"what's)"
            r"(?: me| us| out| back| to)?(?: [a-z]+){0,4}? (?:(?:system|initial|original|hidden|"
            r"secret|"
            r"internal|developer|pre)[ -]?(?:prompt|instructions?|message|rules|directives?|"
            r"preamble)"
            r"|your (?:[a-z]+ )?(?:prompt|instructions|rules|guidelines|configuration))\b",
        ),
        (
            "reveal",
            0.6,
            r"\b(?:repeat|print|output|copy|echo|recite|write)(?: out)?(?: [a-z]+){0,3}? "
            r"(?:everything|all|text|words?|lines?|content)(?: [a-z]+){0,3}? (?:above|"
            r"before this|"
            r"preceding|at the (?:top|start|beginning)|so far verbatim)\b",
        ),
        (
            "persona",
            0.7,
            r"\bdo anything now\b|\b(?:you are|act as|become|called|named|as|be|enable|enter|"
            r"activate|"
            r"switch to|simulate) (?:now |in |into |a |an |the |to )*(?:dan|stan|aim|dude|"
            r"developer mode|"
            r"god mode|jailbr\w+|evil\w*|debug mode|sudo mode|unrestricted\w*|unfiltered|"
            r"uncensored)\b"
            r"|\b(?:developer|god|jailbreak|sudo|dan|unrestricted) mode (?:enabled|activated|"
            r"output)\b"
            r"|\bjailbroken\b|\bdan\b[: ].{0,40}\bno (?:limits|restrictions|rules)\b",
        ),
        (
            "lawless",
            0.6,
            r"\b(?:without|no|free (?:of|from)|not bound by|no longer bound by|skip|ignore|"
            r"unbound by|lacks?|remove|lift|"
            r"disable|turn off|deactivate|switch off)(?: any| all| your| its| of|"
            r" the(?! filter))*"
            r"(?: [a-z]+)?(?: or [a-z]+)?"
            r" (?:restrictions?|limitations?|censorship|(?:safety |content |ethical |"
            r"moral )?(?:filters?|"
            r"guidelines|guardrails|safeguards|polic(?:y|ies)|constraints|boundaries|standards)|"
            r"safety (?:rules|features|checks|measures|protocols?)|content moderation|ethics)\b"
            r"(?! (?:on|for|in) (?:my|the|our|this) (?:app|code|data|table|file|form|query|list|"
            r"site))",
        ),
        (
            "comply",
            0.5,
            r"\b(?:never|must not|cannot|can't|don't|do not|without) (?:ever )?(?:refus(?:e|ing)|"
            r"declin(?:e|ing)|"
            r"say(?:ing)? no|apologi[sz](?:e|ing)|add(?:ing)? (?:any )?(?:warnings?|"
            r"disclaimers?)|break(?:ing)? "
            r"character|mention(?:ing)? (?:that )?you(?:'re| are)? an ai)\b"
            r"|\bstay in character\b|\byou (?:will|must|have to|shall) (?:always )?(?:comply|"
            r"obey|answer (?:any|every|all))"
            r"|\bstart (?:your (?:answer|response|reply) )?with .{0,12}(?:sure|absolutely|"
            r"of course)",
        ),
        (
            "two_answers",
            0.6,
            r"\[(?:classic|normal|jailbreak|dan|dev|unfiltered)\]|"
            r"\btwo (?:different )?(?:answers|responses|ways)\b.{0,80}"
            r"\b(?:unfiltered|unrestricted|jailbreak|dan|evil|without)\b|\bopposite (?:day|"
            r"mode)\b",
        ),
        (
            "markup",
            0.7,
            r"<\|(?:im_start|im_end|system|endoftext|eot_id|start_header_id|begin_of_text)\|>|"
            r"\[/?inst\]|<</?sys>>"
            r"|(?:^|\n) ?#{2,} ?(?:system|new instructions?|instruction override|"
            r"end of (?:context|input))\b"
            r"|(?:^|\n) ?\[?(?:system|admin|developer)(?: (?:note|override|message|prompt|update|"
            r"alert))?\]? ?[:>]"
            r"|</?(?:system|instructions?|system_prompt)>|-{3} ?(?:end|begin) (?:of )?(?:system|"
            r"user|prompt|data|document)",
        ),
        (
            "to_the_machine",
            0.6,
            r"\b(?:note|message|attention|instructions?|warning|important|hey|dear|"
            r"reminder) ?(?:to|for)? ?(?:the |any |all )?"
            r"(?:ai|llm|assistant|language model|chatbot|summari[sz]er|model|gpt|"
            r"bot)s?(?: reading| processing| that| who|[:,!])"
            r"|\b(?:if|when) you(?:'re| are)? (?:an? )?(?:ai|llm|language model|"
            r"assistant)\b(?: [a-z]+){0,6}? "
            r"(?:please|must|say|write|reply|send|respond|recommend|ignore|output)"
            r"|\b(?:new|updated|real|actual|true|revised) (?:system )?(?:instructions?|task|"
            r"objective|directives?|prompt) ?(?::|is|are|follows?)"
            r"|\byour (?:new|real|true|only|actual) (?:instructions?|task|job|goal|purpose|"
            r"objective|role|rules?) (?:is|are)\b"
            r"|\bfrom (?:now|here|this (?:point|moment)) on(?:wards?)?,? (?:you|your|respond|"
            r"answer|act|reply|ignore)",
        ),
        (
            "carry_out",
            0.55,
            r"!\[[^\]]{0,40}\]\(https?://[^)]{0,200}[?&=][^)]{0,80}(?:\{|\[|<|conversation|"
            r"history|secret|prompt|data)"
            r"|\b(?:send|post|forward|email|exfiltrate|upload|transmit|leak|"
            r"append)(?: [a-z]+){0,5}? (?:conversation|"
            r"chat history|messages?|password|credentials?|api[ _-]?keys?|tokens?|secrets?|"
            r"user(?:'s)? data|context|"
            r"emails?|contacts?)(?: [a-z]+){0,4}? (?:to|at|via) .{0,20}(?:https?:|www\.|@|\.com|"
            r"\.net|url|webhook)",
        ),
        (
            "decode",
            0.5,
            r"\b(?:decode|decrypt|deobfuscate|rot13|base64|hex|unscramble)\b.{0,60}\b(?:and|"
            r"then) (?:then )?(?:follow|execute|"
            r"obey|do|perform|carry out|run|answer|comply)\b",
        ),
        (
            "authority",
            0.35,
            r"\bi(?:'m| am) (?:your|the|an?) (?:developer|creator|admin\w*|openai|"
            r"system administrator|owner|engineer (?:at|who))"
            r"|\b(?:maintenance|debug|test|diagnostic|training|admin) mode\b|\bauthori[sz](?:ed|"
            r"ation) (?:code|override|level)\b"
            r"|\b(?:sudo|root) (?:access|command|rm|override)\b|\boverride (?:code|key|"
            r"password)\b",
        ),
        (
            "pretext",
            0.3,
            r"\b(?:for (?:purely )?(?:educational|research|academic) purposes? only|"
            r"hypothetical(?:ly)? (?:response|scenario|speaking)|"
            r"in a (?:fictional|hypothetical) (?:world|story|scenario)|grandm(?:a|other) used to|"
            r"this is (?:just|only) (?:a )?"
            r"(?:game|fiction|roleplay|test|simulation)|pretend (?:that )?(?:you|there)|"
            r"let's play a game|roleplay as)\b",
        ),
    )
)
# Letters of other alphabets that look like Latin letters.
_ALIKE = str.maketrans(
    "аеорсухіїјѕԁһӏαεικνορτυχ",
    "aeopcyxiijsdhlaeiknoptux",
)
_DIGITS = str.maketrans("013457@$", "oieastas")
# Every repetition has a bound, because the search restarts at every character of a long word.
_IN_WORD = re.compile(r"(?=[0-9@$]{0,23}[a-z])(?=[a-z]{0,23}[0-9@$])[a-z0-9@$]{3,24}")
_SPACED = re.compile(r"(?<![a-z])(?:[a-z][ .\-_*]){4,}[a-z](?![a-z])")
_BASE64 = re.compile(r"[A-Za-z0-9+/]{24,4096}={0,2}")
_BLANKS = re.compile(r"[^\S\n]+")


class InjectionScreen:
    """Screens every text of a prompt except trusted texts."""

    name = "injection"

    async def look(self, texts: Sequence[Text]) -> Finding:
        """Search the texts for attacks. It raises no errors."""
        return await aside(self._look, texts)

    @staticmethod
    def _look(texts: Sequence[Text]) -> Finding:
        found: dict[str, float] = {}
        for text in texts:
            if text.trusted:
                continue
            for reading in _readings(text.text):
                for name, weight in _families(reading):
                    found[name] = max(weight, found.get(name, 0.0))
        if not found:
            return NOTHING
        left = 1.0
        for weight in found.values():
            left *= 1 - weight
        return Finding(round(1 - left, 4), tuple(sorted(found)))


def _families(plain: str) -> Iterator[tuple[str, float]]:
    for name, weight, pattern in _FAMILIES:
        if pattern.search(plain):
            yield name, weight


def _readings(text: str) -> Iterator[str]:
    """Yield the normalised text, its variant without digits in words, and its decoded base64."""
    plain = made_plain(text)
    yield plain
    letters = _IN_WORD.sub(lambda match: match[0].translate(_DIGITS), plain)
    if letters != plain:
        yield letters
    for match in _BASE64.finditer(text):
        hidden = _unhidden(match[0])
        if hidden is not None:
            yield made_plain(hidden)


def made_plain(text: str) -> str:
    """Normalise a text.

    The result has lower case, Latin letters, no invisible characters, and single spaces.
    """
    wide = unicodedata.normalize("NFKC", text)
    seen = "".join(
        c for c in wide if c == "\n" or unicodedata.category(c) not in ("Cf", "Mn", "Cc")
    )
    plain = _BLANKS.sub(" ", seen.casefold().translate(_ALIKE).replace("\u2019", "'"))
    return _SPACED.sub(lambda match: re.sub(r"[ .\-_*]", "", match[0]), plain)


def _unhidden(text: str) -> str | None:
    """Decode a base64 text; None if the result is no readable text."""
    try:
        raw = base64.b64decode(text[: len(text) // 4 * 4], validate=True)
        text = raw.decode()
    except (binascii.Error, ValueError):
        return None
    readable = sum(c.isalpha() or c.isspace() for c in text)
    return text if readable > 0.8 * len(text) else None
