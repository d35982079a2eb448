"""Load tests of tenants, limits and budgets."""
