"""Makes mixtures of experts from dense experts, and measures them."""
