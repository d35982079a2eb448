"""Load tests of mixtures of experts."""
