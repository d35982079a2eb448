"""A gateway with a simulated pool in a process of its own, which tests kill.

`python -m tests.support.batch_gateway_process FILE`: FILE has the config as JSON. It prints the
gateway's URL, and then serves until it is killed.
"""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path

from service.config import Config
from tests.support.in_process_service import run_gateway


async def serve(config: Config) -> None:
    """Serve until killed."""
    async with run_gateway(config) as s:
        print(s.url, flush=True)
        await asyncio.Event().wait()


if __name__ == "__main__":
    asyncio.run(serve(Config.model_validate_json(Path(sys.argv[1]).read_text())))
