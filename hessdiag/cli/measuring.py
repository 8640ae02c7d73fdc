"""What `hessdiag measure` does with its request."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from hessdiag.cli.exits import OK, WIDE, Outputs, complain, one_line
from hessdiag.cli.processes import joined
from hessdiag.cli.request import Request
from hessdiag.cli.setup import Prepared, prepare
from hessdiag.errors import ConfigurationError, HessdiagError
from hessdiag.measuring import Measurement, Plan
from hessdiag.measuring.entry import measure
from hessdiag.measuring.resume import UNSAVED
from hessdiag.measuring.spread import LEAST, spread
from hessdiag.methods.base import AUTO
from hessdiag.show.result_file import document, read_document, strict, write_json
from hessdiag.show.sentences import warnings
from hessdiag.show.table import print_measurement, terminal
from hessdiag.show.text import counted, plain

ONE_THREAD_BELOW = 100_000
"""Parameters below which several threads wait for each other longer than they work, above all on a busy machine."""


def run(request: Request) -> int:
    """One measurement and its outputs; returns the exit code."""
    request.check()
    with joined(request.device, request.timeout) as world:
        plan = None if request.plan is None else plan_of(request.plan, request.method)
        prepared = prepare(request, world)
        if prepared.objective.size < ONE_THREAD_BELOW:
            torch.set_num_threads(1)
        if request.dry_run:
            if world.rank == 0:
                dry_run(request, prepared)
            return OK
        found = measure(
            prepared.objective,
            prepared.batches,
            method=request.method,
            rtol=request.rtol,
            confidence=request.confidence,
            seed=request.seed,
            min_replicates=request.min_replicates,
            max_replicates=request.max_replicates,
            max_seconds=request.max_seconds,
            target=request.target,
            plan=plan,
            keep_diagonal=request.save_diagonal is not None or request.html is not None,
            progress=not request.quiet and world.rank == 0,
            resume=request.resume,
        )
        # Every process takes part in the spread or none: what time is left differs between their clocks.
        if world.agree(wanted(request, found), prepared.objective.device):
            prepared.facts["spread"] = around(prepared, found)
        if world.rank:  # torchrun ends the others as soon as one exits with anything but 0, the first while it writes
            return OK
        code = hand_over(request, prepared, found)
    return code or (OK if found.norm.total.half_width <= request.rtol else WIDE)


def wanted(request: Request, found: Measurement) -> bool:
    """Whether the spread over samples is to be told, and there is time for it."""
    if not request.spread or request.target != "data" or (request.quiet and not (request.json or request.html)):
        return False
    if found.status.partition(";")[0].startswith(("interrupted", "stopped")) or found.samples < LEAST:
        return False
    # It takes about as long as the measurement, for which the user has set an end.
    return request.max_seconds is None or 2.0 * found.seconds < request.max_seconds


def around(prepared: Prepared, found: Measurement) -> dict[str, Any]:
    """The spread over samples, or why there is none: whatever happens here, the measurement is kept."""
    try:
        told = spread(found, prepared.objective, prepared.batches)
    except (HessdiagError, MemoryError) as error:
        return {"missing": one_line(error)}
    except KeyboardInterrupt:
        return {"missing": "interrupted"}
    whole = int(prepared.facts["data"]["of"])
    content = told.to_dict()
    if whole > found.samples:
        rms, low, high = told.expected(whole)
        seconds = found.seconds * whole / found.samples
        content["whole"] = {"samples": whole, "rms": rms, "low": low, "high": high, "seconds": seconds}
    return content


def dry_run(request: Request, prepared: Prepared) -> None:
    """The cost of every method, as a table or as JSON."""
    from hessdiag.measuring.forecast import forecast
    from hessdiag.show.costs import print_costs

    found = forecast(prepared.objective, prepared.batches)
    if request.json is not None:
        content = {"schema": "hessdiag-forecast/1", "methods": [one.to_dict() for one in found]}
        write_json(request.json, strict(content))
        if request.json == "-":
            return
    name = f"{request.source}: {counted(prepared.objective.size, 'parameter')}, "
    name += counted(found[0].batches, "batch", "batches")
    print_costs(terminal(), found, title=plain(name), replicates=request.min_replicates)


def plan_of(path: Path, method: str) -> Plan:
    """The plan inside an earlier result."""
    content: dict[str, Any] = read_document(path)
    try:
        plan = Plan.from_dict(content["plan"])
    except (TypeError, ValueError, AttributeError) as error:
        raise ConfigurationError(f"--plan {path}: holds no plan ({error})") from None
    if method not in {AUTO, plan.method}:
        raise ConfigurationError(f"--plan {path}: is for {plan.method}, not --method {method}; leave one of them out")
    return plan


def hand_over(request: Request, prepared: Prepared, found: Measurement) -> int:
    """The result: the number first, then every file, so that none is lost for another's sake; the exit code."""
    content, outputs = document(found, prepared.facts), Outputs()
    with outputs.attempt("stdout"):
        if request.json == "-":
            write_json(request.json, content)
        elif request.quiet:
            low, high = found.interval
            print(f"{found.rms!r} {low!r} {high!r}")
        else:
            print_measurement(content)
    if request.quiet or request.json == "-":
        for line in warnings(content):
            complain(f"warning: {line}")
    if request.json not in (None, "-"):
        with outputs.attempt("--json"):
            write_json(str(request.json), content)
    if request.html is not None:
        from hessdiag.show.html import write_page

        with outputs.attempt("--html"):
            write_page(request.html, content, found.diagonal)
    if request.save_diagonal is not None and found.diagonal is not None:
        with outputs.attempt("--save-diagonal"):
            found.diagonal.save(request.save_diagonal)
    for note in found.notes:
        if note.startswith(UNSAVED):
            outputs.failed("--resume", note)
    return outputs.close()
