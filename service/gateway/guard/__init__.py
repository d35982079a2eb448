"""Screens in front of the router: prompt injection, and personal data."""
