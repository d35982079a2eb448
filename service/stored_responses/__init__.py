"""Stored responses and conversations: their items, their state, and what clients may do."""
