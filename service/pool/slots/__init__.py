"""Slots: places in a pool that hold one engine each."""
