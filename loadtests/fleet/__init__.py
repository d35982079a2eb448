"""A fleet of accelerators on a virtual clock, with the service's own decisions."""
