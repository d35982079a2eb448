"""Discovery of pools by Ray Serve's request router."""

from __future__ import annotations

from ray.serve.request_router import PendingRequest, RequestRouter, RunningReplica

from service.rpc import pool_address_registry
from service.rpc.pool_link import PoolAddress


class DiscoveryRequestRouter(RequestRouter):
    """A request router of Serve that publishes the addresses of pools as replicas change.

    The handle's calls (only `wake`) go to any replica.
    """

    def update_replicas(self, replicas: list[RunningReplica]) -> None:
        """Publish the replicas' addresses. Serve calls this in the handle's loop."""
        super().update_replicas(replicas)
        found = []
        for replica in replicas:
            metadata = replica.replica_metadata
            if {"url", "kind", "boot"} <= metadata.keys():
                found.append(PoolAddress(metadata["url"], metadata["kind"], metadata["boot"]))
        pool_address_registry.put(str(self._deployment_id), found)

    async def choose_replicas(
        self,
        candidate_replicas: list[RunningReplica],
        pending_request: PendingRequest | None = None,
    ) -> list[list[RunningReplica]]:
        """Return the candidates in any order."""
        del pending_request
        return [candidate_replicas] if candidate_replicas else []
