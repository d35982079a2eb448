"""Ray Serve: the only package that imports ray.

Serve places, starts, scales, health-checks and replaces; no token travels through it. A pool
binds a port of its own and tells it as replica metadata, which gateways follow.
"""
