"""The wire between gateways and pools: errors, snapshots, client, server, directory."""
