"""Composition problems: bought compositions against greedy ones, and the search's time and gap."""
