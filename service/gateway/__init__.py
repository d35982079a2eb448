"""The gateway: authenticates, routes, admits and answers requests of clients."""
