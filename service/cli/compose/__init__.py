"""`coe compose`: buys a composition and writes it as a config."""
