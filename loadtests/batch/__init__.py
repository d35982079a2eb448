"""Whole batches: choices under a budget, order on one engine, and people beside them."""
