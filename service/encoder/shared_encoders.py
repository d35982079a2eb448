"""The encoders of one process: gateways of successive configs use one worker."""

from __future__ import annotations

from service.encoder.encoder_client import EncoderClient, EncoderSettings


class SharedEncoders:
    """One client for each kind of settings. It lives from the first use to the last."""

    def __init__(self) -> None:
        self._users: dict[EncoderSettings, int] = {}
        self._clients: dict[EncoderSettings, EncoderClient] = {}

    def acquire(self, settings: EncoderSettings) -> EncoderClient:
        """Return a started client. Every call needs a later `release`."""
        client = self._clients.get(settings)
        if client is None:
            client = self._clients[settings] = EncoderClient(settings)
            client.start()
        self._users[settings] = self._users.get(settings, 0) + 1
        return client

    async def release(self, client: EncoderClient) -> None:
        """Undo one `acquire`. The last release ends the worker."""
        settings = client.settings
        self._users[settings] -= 1
        if self._users[settings] == 0:
            del self._users[settings], self._clients[settings]
            await client.close()
