"""The model card of a demo expert, generated from the facts of its training run."""

from __future__ import annotations

import os
import platform
from dataclasses import dataclass
from pathlib import Path

from router_models.experts.evaluate import Comparison
from router_models.experts.training_texts import Split


@dataclass(frozen=True, slots=True)
class TrainingRun:
    """The facts of one training run."""

    expert: str
    base: str
    rank: int
    alpha: float
    peak_lr: float
    row_tokens: int
    max_tokens: int
    seed: int
    steps: int
    examples: int
    tokens: int
    wall_s: float
    threads: int
    dtype: str
    torch_version: str


def write(folder: Path, run: TrainingRun, split: Split, result: Comparison) -> None:
    unit = "higher is better" if result.measure == "exact match" else "lower is better"
    weights_bytes = (folder / "adapter_model.safetensors").stat().st_size
    facts = {
        "data": split.source,
        "licence of the data": split.licence,
        "prompt form": split.prompt_form,
        "held out": split.held_out_by,
        "adapter": (
            f"rank {run.rank}, alpha {run.alpha:g}, on gate_proj, up_proj and down_proj of every "
            f"layer, float16, {weights_bytes / 1e6:.1f} MB"
        ),
        "training": (
            f"{run.steps} steps, {run.examples:,} conversations ({run.tokens:,} tokens), loss on "
            f"the answer only, AdamW, cosine from {run.peak_lr:g}, seed {run.seed}"
        ),
        "rows": (
            f"packed to {run.row_tokens} tokens; conversations over {run.max_tokens} tokens left "
            "out of training"
        ),
        "training time": f"{run.wall_s / 60:.1f} minutes, {run.tokens / run.wall_s:.0f} tokens/s",
        "hardware": (
            f"{run.threads} {'thread' if run.threads == 1 else 'threads'} of {cpu_name()}, "
            "shared with other work; "
            f"PyTorch {run.torch_version}, Python {platform.python_version()}, {run.dtype}"
        ),
    }
    table = "\n".join(f"| {name} | {text} |" for name, text in facts.items())
    again = f"python -m router_models.experts.evaluate --expert {run.expert}"
    (folder / "README.md").write_text(
        f"""---
base_model: {run.base}
library_name: peft
license: apache-2.0
---

# {run.expert}

A LoRA adapter of `{run.base}` for the demo composition, made by
`python -m router_models.experts.train --expert {run.expert}`.

| | |
| --- | --- |
{table}

## Measured on {result.rows:,} held-out rows

| {result.measure} ({unit}) | value | standard error |
| --- | --- | --- |
| base | {result.base:.4f} | {result.base_error:.4f} |
| this adapter | {result.tuned:.4f} | {result.tuned_error:.4f} |
| gain | {result.gain:+.4f} | {result.gain_error:.4f} |

Base and adapter saw the same rows through the same chat template, in {run.dtype}. Standard
errors come from resampling {"modules" if run.expert == "code" else "rows"}, the gain's in pairs.
Measure again with `{again}`.

{_LIMITS[run.expert]}
""",
        encoding="utf-8",
    )


_LIMITS = {
    "math": (
        "Part of the gain is the form of GSM8K's answers. Bits per byte says how well the worked\n"
        "answer is predicted, not how many final numbers are right."
    ),
    "intents": (
        "The base is asked in the same way and so does not know that an intent is wanted: the\n"
        "number says what the adapter adds to a bare utterance, not what the base could do with\n"
        "the list of intents in its prompt. Utterances outside the 150 intents get one of them."
    ),
    "code": (
        "Part of the gain is the form of the answer (a code block at once, no explanation). The\n"
        "base may have seen these modules in its own training; held out means from the adapter."
    ),
}


def cpu_name() -> str:
    """The processor's name as Linux gives it."""
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return f"{line.split(':', 1)[1].strip()} ({os.cpu_count()} cores)"
    except OSError:
        pass
    return platform.processor() or platform.machine()
