"""Fitting and judging routers from recorded outcomes. Nothing here runs in the service."""
