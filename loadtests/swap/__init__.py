"""Load tests of swapping weights on a CPU."""
