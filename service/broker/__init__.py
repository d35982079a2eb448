"""The choice: which expert, in which pool."""
