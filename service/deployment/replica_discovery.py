"""Hearing of replicas as they come and go."""

from __future__ import annotations

from ray.serve.request_router import PendingRequest, RequestRouter, RunningReplica

from service.rpc import pool_addresses
from service.rpc.client import PoolAddress


class DiscoveryRequestRouter(RequestRouter):
    """Serve's hook for who gets a handle's calls, used to hear of replicas as they come and go.

    The calls themselves (only `wake`) go to any replica.
    """

    def update_replicas(self, replicas: list[RunningReplica]) -> None:
        """Serve's replicas have changed; runs in the handle's loop, which may not be ours."""
        super().update_replicas(replicas)
        found = []
        for replica in replicas:
            told = replica.replica_metadata
            if {"url", "kind", "boot"} <= told.keys():
                found.append(PoolAddress(told["url"], told["kind"], told["boot"]))
        pool_addresses.put(str(self._deployment_id), found)

    async def choose_replicas(
        self,
        candidate_replicas: list[RunningReplica],
        pending_request: PendingRequest | None = None,
    ) -> list[list[RunningReplica]]:
        """Any order will do."""
        del pending_request
        return [candidate_replicas] if candidate_replicas else []
