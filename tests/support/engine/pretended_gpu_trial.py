"""`coe doctor`'s trials in a process where vLLM believes that it has a GPU."""

from __future__ import annotations

import sys
from typing import Any


def main() -> int:
    """Run the trial that the command line names."""
    if "prepare" not in sys.argv:
        from vllm.triton_utils import triton

        import tests.support.engine.cuda_platform  # noqa: F401

        # vLLM's stand-in for Triton has no configs, whose fields some modules read on import.
        triton.Config = _TritonConfig

    from service.cli.doctor.trial_process import main as run

    return run()


class _TritonConfig:
    def __init__(self, kwargs: Any, num_stages: int = 1, num_warps: int = 1, **_: Any) -> None:
        self.kwargs, self.num_stages, self.num_warps = kwargs, num_stages, num_warps


if __name__ == "__main__":
    sys.exit(main())
