"""Budgets of thinking that are learned from the answers of this gateway's experts."""

from __future__ import annotations

from service.broker.thinking_lengths import ThinkingLengths, ThinkingWorth
from service.config import Config
from service.gateway.request_record import ExpertCall

# Tokens of the prompt after the mark of thinking count against a budget, and no usage tells them:
# in most templates a line break.
_UNTOLD_TOKENS = 1


class LearnedBudgets:
    """The learned budgets of a config's experts.

    Args:
        config: The config.
        lengths: What is known of the lengths of thinking. It outlives the config.
    """

    def __init__(self, config: Config, lengths: ThinkingLengths) -> None:
        self._lengths = lengths
        self._quantiles = {
            name: expert.thinking.learned_quantile
            for name, expert in config.experts.items()
            if expert.thinking is not None and expert.thinking.learned_quantile is not None
        }

    def budget(self, expert: str, category: str, worth: ThinkingWorth) -> int | None:
        """Most tokens of an expert's thinking on a category; None where nothing bounds it."""
        quantile = self._quantiles.get(expert)
        if quantile is None:
            return None
        length = self._lengths.budget(expert, category, quantile, worth)
        # A thinking of this length ends before the budget does, and doesn't look as if it was cut.
        return None if length is None else length + _UNTOLD_TOKENS + 1

    def excess(self, expert: str, category: str, budget: int) -> float:
        """The expected tokens of thinking that a budget saves; 0 where nothing is known."""
        return self._lengths.excess(expert, category, budget)

    def observe(self, call: ExpertCall, category: str) -> None:
        """Learn from a call whose engine or endpoint told the tokens of thinking.

        Args:
            call: The call.
            category: The prompt's category; empty where it was not classified.
        """
        if call.reasoning_tokens is None:
            return
        tokens = call.reasoning_tokens // call.answers
        most = tokens + _UNTOLD_TOKENS
        ended = call.thinking_budget is not None and most >= call.thinking_budget
        # An answer may also have ended before its thinking did.
        self._lengths.observe(
            call.expert, category, tokens, cut=ended or (call.cut and most >= call.length)
        )
