"""The guard: runs a tenant's screens on a request, and refuses, redacts or flags it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import orjson

from service.config import Config, GuardConfig
from service.errors import GuardRefusedError, InvalidRequestError
from service.gateway.guard.body_texts import check_readable, rewritten, texts_of
from service.gateway.guard.injection_screen import InjectionScreen
from service.gateway.guard.pii_screen import PiiScreen, redacted
from service.gateway.guard.screen_interface import Finding, Screen, Text
from service.gateway.request.parsing import InferenceRequest

_RANK = {"passed": 0, "flagged": 1, "redacted": 2}


@dataclass(frozen=True, slots=True)
class Seen:
    """The finding of one screen, and the action that followed.

    Attributes:
        screen: The name of the screen.
        score: The score in [0, 1].
        kinds: The kinds of the findings.
        done: The action: `passed`, `flagged` or `redacted`.
    """

    screen: str
    score: float
    kinds: tuple[str, ...]
    done: str


@dataclass(frozen=True, slots=True)
class GuardResult:
    """A request that passed the guard.

    Attributes:
        request: The request. It is redacted if a screen found something to redact.
        seen: The findings of the screens.
        arrived_s: When the body was complete, by `time.monotonic`.
    """

    request: InferenceRequest
    seen: tuple[Seen, ...] = ()
    arrived_s: float = 0.0

    @property
    def done(self) -> str:
        """The strongest action of any screen: `passed`, `flagged` or `redacted`."""
        return max((check.done for check in self.seen), key=_RANK.__getitem__, default="passed")

    @property
    def headers(self) -> list[tuple[bytes, bytes]]:
        """The response header about the guard; none if the request passed."""
        return [] if self.done == "passed" else [(b"x-coe-guard", self.done.encode())]

    def explained(self) -> list[dict[str, Any]]:
        """The findings for `/v1/route`, with scores and kinds but without text."""
        return [
            {
                "screen": check.screen,
                "score": check.score,
                "kinds": list(check.kinds),
                "done": check.done,
            }
            for check in self.seen
        ]


class Guard:
    """The guards of all tenants.

    Args:
        config: The config.
        screens: Replace the shipped screens, by name (`injection`, `pii`).
    """

    def __init__(self, config: Config, screens: Mapping[str, Screen] | None = None) -> None:
        given = screens or {}
        self._guards = {
            name: tenant.guard for name, tenant in config.tenants.items() if tenant.guard.on
        }
        self._injection: Screen = given.get("injection") or InjectionScreen()
        self._pii: dict[str, Screen] = {
            name: given.get("pii") or PiiScreen(guard.pii.kinds)
            for name, guard in self._guards.items()
        }

    async def check(self, request: InferenceRequest) -> GuardResult:
        """Screen a request.

        Raises:
            GuardRefusedError: The guard refuses the request.
            InvalidRequestError: The prompt is too long, nested too deep, or no text.
        """
        guard = self._guards.get(request.tenant.name)
        if guard is None:
            return GuardResult(request)
        check_readable(request.data)
        texts = texts_of(request.data, guard.max_characters)
        return await self._look(request, guard, texts)

    async def _look(
        self, request: InferenceRequest, guard: GuardConfig, texts: list[Text]
    ) -> GuardResult:
        seen: list[Seen] = []
        if guard.injection.action != "off":
            finding = await self._injection.look(texts)
            hit = finding.score >= guard.injection.threshold
            if hit and guard.injection.action == "refuse":
                raise _refused_error("injection", finding)
            seen.append(_seen("injection", finding, "flagged" if hit else "passed"))
        action = guard.pii.action
        if action != "off":
            finding = await self._pii[request.tenant.name].look(texts)
            done = "passed"
            if finding.spans:
                if action == "refuse":
                    raise _refused_error("pii", finding)
                done = "flagged"
                if action == "redact":
                    request = _redacted(request, finding)
                    done = "redacted"
            seen.append(_seen("pii", finding, done))
        return GuardResult(request, tuple(seen))


def _seen(screen: str, finding: Finding, done: str) -> Seen:
    return Seen(screen, finding.score, finding.kinds, done)


def _refused_error(screen: str, finding: Finding) -> GuardRefusedError:
    return GuardRefusedError(
        f"refused by this tenant's guard: the screen {screen!r} found "
        f"{', '.join(finding.kinds) or 'something'} (score {finding.score:.2f})",
        screen=screen,
    )


def _redacted(request: InferenceRequest, finding: Finding) -> InferenceRequest:
    count = -1

    def change(text: Text) -> str:
        nonlocal count
        count += 1
        here = [span for span in finding.spans if span.text == count]
        return redacted(text.text, here) if here else text.text

    data = rewritten(request.data, change)
    try:
        return replace(request, data=data, raw=orjson.dumps(data))
    except orjson.JSONEncodeError:
        raise InvalidRequestError("the body can't be serialized again") from None
