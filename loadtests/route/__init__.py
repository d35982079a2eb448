"""Load tests of classifying and choosing."""
