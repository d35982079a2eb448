"""Mixtures of experts: gates, steering profiles, routing statistics and kernels."""
