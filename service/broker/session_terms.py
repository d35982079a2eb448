"""What the earlier turns of a conversation ask of the choice. Pure.

An agent works in a loop: the model calls a tool, the client runs it, and the result goes back to
the model. Another model did not call the tool, and may not know what the result is for. So an open
tool call *locks* the choice to the expert that made it, as long as this expert is able to answer.

A turn without an open call may go to another recipe. The hand-over has a cost in quality, because
the new expert did not write the earlier answers. It counts beside the prefix of the conversation,
which another engine has to compute again: that time is part of each utility already.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

import numpy as np
from numpy.typing import NDArray

from service.broker.pool_state import Floats
from service.broker.quality_cost_bounds import Exclusion
from service.broker.recipe_catalog import Ints


class SessionDecision(StrEnum):
    """How the session of a conversation took part in a choice.

    Attributes:
        LOCKED: A tool call was open, and the expert that made it was chosen.
        KEPT: The recipe of the last turn was chosen again.
        SWITCHED: Another recipe was better by more than the hand-over cost.
        RELEASED: The recipe of the last turn can't answer, so that another one was chosen.
    """

    LOCKED = "locked"
    KEPT = "kept"
    SWITCHED = "switched"
    RELEASED = "released"


@dataclass(frozen=True, slots=True)
class SessionOutcome:
    """A decision, and why the session's recipe was released: a short code, else None."""

    decision: SessionDecision
    reason: str | None = None


@dataclass(frozen=True, slots=True)
class SessionTerms:
    """The terms of a session for the next choice.

    Attributes:
        row: The recipe that the session holds on to, as a row of the catalog. None if there is no
            such recipe, or if it is unknown.
        locked: Whether a tool call is open.
        handover_cost: Quality by which another recipe has to be better.
        absent: Why the recipe is not among the candidates, as a short code; None if it is.
    """

    row: int | None
    locked: bool
    handover_cost: float = 0.0
    absent: str | None = None

    def position(self, rows: Ints) -> int | None:
        """The session's recipe among these rows of the catalog; None if it is not there."""
        if self.row is None:
            return None
        found = np.flatnonzero(rows == self.row)
        return int(found[0]) if len(found) else None


def apply_terms(
    terms: SessionTerms, rows: Ints, utility: Floats, ideal: Floats, exclusion: NDArray[np.int8]
) -> None:
    """Apply a session's terms to a choice, in place. All arrays are (recipes,).

    Nothing changes if the session's recipe can't answer.

    Args:
        terms: The session's terms.
        rows: The recipes, as rows of the catalog.
        utility: Their utilities.
        ideal: Their utilities if all experts were resident and idle.
        exclusion: An `Exclusion` for each; 0 for possible recipes.
    """
    at = terms.position(rows)
    if at is None or exclusion[at] != 0:
        return
    others = np.arange(len(rows)) != at
    if terms.locked:
        exclusion[others & (exclusion == 0)] = Exclusion.OPEN_TOOL_CALL
        # A better expert must not be loaded for a turn that it can't get.
        ideal[others] = -np.inf
        return
    utility[others] -= terms.handover_cost
    ideal[others] -= terms.handover_cost


def release_reason(terms: SessionTerms, rows: Ints, exclusion: NDArray[np.int8]) -> str | None:
    """Why the session's recipe can't answer, as a short code; None if it can."""
    at = terms.position(rows)
    if at is None:
        return terms.absent or "unknown"
    return Exclusion(int(exclusion[at])).name.lower() if exclusion[at] else None


def decide(
    terms: SessionTerms, rows: Ints, exclusion: NDArray[np.int8], chosen: int
) -> SessionOutcome:
    """Describe how the session took part in the choice of the recipe at the position `chosen`."""
    reason = release_reason(terms, rows, exclusion)
    if reason is not None:
        return SessionOutcome(SessionDecision.RELEASED, reason)
    if int(rows[chosen]) != terms.row:
        return SessionOutcome(SessionDecision.SWITCHED)
    return SessionOutcome(SessionDecision.LOCKED if terms.locked else SessionDecision.KEPT)
