"""Which experts to buy memory for, where they run, and which recipe answers each category."""
