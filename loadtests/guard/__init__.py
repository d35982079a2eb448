"""Load tests of the guard."""
