"""Limits, budgets, keys and shared state, in memory or Redis."""
