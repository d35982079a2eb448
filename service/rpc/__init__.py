"""The HTTP protocol between gateways and pools: calls, snapshots and discovery."""
