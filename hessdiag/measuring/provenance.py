"""Where a number came from: versions, machine, seed, and the facts about model and data that it depends on."""

from __future__ import annotations

import platform
from datetime import datetime, timezone
from typing import Any

import numpy
import torch

from hessdiag.methods import Case


def provenance(case: Case, *, target: str) -> dict[str, Any]:
    """Plain values, all of them."""
    from hessdiag import __version__

    objective, survey, device = case.objective, case.survey, case.objective.device
    modes = {m.training for m in objective.model.modules() if isinstance(m, torch.nn.modules.batchnorm._BatchNorm)}
    return {
        "hessdiag": __version__,
        "torch": torch.__version__,
        "numpy": numpy.__version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else f"cpu ({platform.machine()})",
        "dtype": str(objective.dtype).removeprefix("torch."),
        "threads": torch.get_num_threads(),
        "processes": case.world.size,
        "seed": case.seed,
        "target": target,
        "method": case.plan.method,
        "model": type(objective.model).__name__,
        "loss": objective.loss.name,
        "loss_options": objective.loss.options,
        "l2": objective.l2,
        "samples": survey.samples,
        "counted": survey.counted,
        "batches": survey.batches,
        "largest_batch": survey.largest,
        "data_fingerprint": survey.data,
        "data_order": survey.order,
        "batchnorm": "none" if not modes else "eval",
        "when": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }
