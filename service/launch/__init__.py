"""`coe serve` on one machine: start, supervision, HAProxy."""
