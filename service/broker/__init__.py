"""Pure decisions: which recipe to take, at what price, within which budget."""
