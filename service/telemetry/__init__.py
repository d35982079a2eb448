"""Metrics and logs. Labels are bounded, units stand in names, prompts are nowhere."""
