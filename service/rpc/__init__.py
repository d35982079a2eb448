"""HTTP between gateways and pools: calls, snapshots, discovery."""
