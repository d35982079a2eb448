"""Helpers that tests share: configs, engines driven directly, servers, whole clusters."""
