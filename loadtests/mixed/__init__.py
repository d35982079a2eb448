"""Load tests of mixed traffic on few slots."""
