"""Mixture-of-experts models: made of dense experts, and measured. Owns no engine."""
