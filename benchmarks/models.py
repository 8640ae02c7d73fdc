"""Public architectures: which of them the exact method and propagation cover, and whether their entries are right.

All parameters together must be read (`Linearisation`), in float64. Then some tensors of at most `entries` scalars each,
from the whole depth of the net, by the exact method: three entries of each against Hessian-vector products. Nets of at
most `audited` parameters go through the ordinary calls besides, by both methods with their audits; what is refused is
left to Hutchinson, whose audit must pass.
Norms that a model computes in float32 whatever its own type are computed in float64 here. Outputs beyond +-`largest`
are divided by one number: random weights can saturate a loss until its second derivatives are rounding.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

import hessdiag as hd
from benchmarks.architectures import Architecture, Case, architectures
from benchmarks.common import RESULTS, store
from hessdiag.errors import HessdiagError, UncoveredModelError
from hessdiag.graph import Linearisation
from hessdiag.kernels import exact_batch as exact
from hessdiag.kernels.products import Products
from hessdiag.problem.forward import InDouble


@dataclass(frozen=True)
class Settings:
    """What is compared."""

    seed: int = 0
    tensors: int = 4
    entries: int = 64
    audited: int = 100_000
    tolerance: float = 1e-9
    largest: float = 4.0  # of an output


SETTINGS = Settings()


def prepared(architecture: Architecture, settings: Settings) -> Case:
    """The model in float64 and evaluation mode, its BatchNorms with statistics of their own."""
    torch.manual_seed(settings.seed)
    case = architecture.build()
    model = case.model.double().eval()
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.running_var is not None:
            module.running_var.uniform_(0.5, 2.0)
    inputs = case.inputs.double() if case.inputs.is_floating_point() else case.inputs
    targets = case.targets.double() if case.targets.is_floating_point() else case.targets
    return Case(model, inputs, targets, case.options)


def in_double(call: Callable[[nn.Module, Any], Any] | None, case: Case, largest: float) -> Callable[..., Any]:
    """The same call, with what it converts to a shorter type converted to float64, and its outputs of ordinary size."""

    def forward(model: nn.Module, inputs: Any) -> Any:
        with InDouble():  # type: ignore[no-untyped-call]
            return model(inputs) if call is None else call(model, inputs)

    with torch.no_grad():
        outputs = forward(case.model, case.inputs)
    size = float(outputs.abs().max()) if isinstance(outputs, torch.Tensor) else 0.0
    return forward if size <= largest else lambda model, inputs: forward(model, inputs) * (largest / size)


def chosen(objective: hd.Objective, settings: Settings) -> list[str]:
    """Small tensors from the first to the last layer, those without any effect left out."""
    names = [name for name, p in objective.parameters.items() if p.numel() <= settings.entries]
    if len(names) <= settings.tensors:
        return names
    step = (len(names) - 1) / (settings.tensors - 1)
    return [names[round(step * place)] for place in range(settings.tensors)]


def run(architecture: Architecture, settings: Settings) -> dict[str, Any]:
    """One row: what covers it, how far entries are off, or why not."""
    begun = time.perf_counter()
    row: dict[str, Any] = {"family": architecture.family, "name": architecture.name}
    try:
        case = prepared(architecture, settings)
    except Exception as error:  # somebody else's code
        return row | {"built": False, "why": f"{type(error).__name__}: {error}".splitlines()[0]}
    options = {"loss": "cross_entropy"} | case.options
    options["forward"] = in_double(options.get("forward"), case, settings.largest)
    objective = hd.Objective(case.model, **options)
    row |= {"built": True, "parameters": objective.size}
    data = [(case.inputs, case.targets)]
    try:
        Linearisation(objective, case.inputs, case.targets)
        row["covered"] = True
    except UncoveredModelError as error:
        row |= {"covered": False, "why": str(error)}
    few = hd.Objective(case.model, **options, parameters=chosen(objective, settings))
    row["exact"] = False
    if row["covered"]:
        outer, inner = exact.batch_diagonal(Linearisation(few, case.inputs, case.targets))
        products = Products(few, case.inputs, case.targets, parts=False)
        compared, off, largest = 0, 0.0, 0.0
        for name, value in few.parameters.items():
            places = sorted({place * (value.numel() - 1) // 2 for place in range(3)})
            found = (outer[name] + inner[name]).reshape(-1)
            largest = max(largest, float(found.abs().max()))
            for place, truth in zip(places, products.entries(name, places)):
                compared, off = compared + 1, max(off, abs(float(found[place]) - truth))
        row |= {"entries": compared, "off": off / largest if largest else off}
        row["exact"] = row["off"] <= settings.tolerance
    row |= {"propagation": row["covered"], "audited": objective.size <= settings.audited or not row["covered"]}
    if row["audited"]:
        for method in ("exact", "propagation") if row["covered"] else ("hutchinson",):
            probes = {} if method == "exact" else {"min_replicates": 10, "max_replicates": 10}
            hd.measure(few, data, method=method, rtol=0.5, **probes)
    return row | {"seconds": time.perf_counter() - begun}


def said(row: Mapping[str, Any]) -> str:
    """A row as a line."""
    where = f"{row['family']}: {row['name']}"
    if not row["built"]:
        return f"{where:36} not built: {row['why']}"
    if "error" in row:
        return f"{where:36} {row['error']}"
    if not row["covered"]:
        return f"{where:36} Hutchinson: {row['why']}"
    audited = ", measured by both and audited" if row["audited"] else ""
    return f"{where:36} read{audited}; {row['entries']} entries off by {row['off']:.0e}"


def main() -> None:
    """Go through all that can be built here, print, store."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pytorch-cifar", type=Path, help="a clone of github.com/kuangliu/pytorch-cifar")
    parser.add_argument("--only", action="append", default=[], help="family or name; may be given several times")
    parser.add_argument("--results", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    rows: list[dict[str, Any]] = []
    for architecture in architectures(cifar=arguments.pytorch_cifar):
        if arguments.only and not {architecture.family, architecture.name} & set(arguments.only):
            continue
        try:
            row = run(architecture, SETTINGS)
        except HessdiagError as error:
            row = {"family": architecture.family, "name": architecture.name, "built": True, "covered": False}
            row |= {"error": f"{type(error).__name__}: {error}", "exact": False, "propagation": False}
        rows.append(row)
        print(said(row), flush=True)
        store("models", SETTINGS, {"rows": rows}, folder=arguments.results)
    covered = sum(bool(row.get("covered")) and bool(row.get("exact")) for row in rows)
    print(f"{covered} of {sum(row['built'] for row in rows)} can be read by exact and propagation, entries right")


if __name__ == "__main__":
    main()
