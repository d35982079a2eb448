"""What is counted and kept: limits, budgets, usage and small values, in memory or in Redis."""
