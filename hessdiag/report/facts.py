"""The sentences around the numbers: what was measured, on what, how, and what to know about it."""

from __future__ import annotations

from typing import Any

from hessdiag.norm import STATUS
from hessdiag.report.text import plain, seconds, value

Row = tuple[str, str]


def title(content: dict[str, Any]) -> str:
    """One line that names the model."""
    checkpoint = content.get("cli", {}).get("checkpoint", {})
    config = checkpoint.get("config") or {}
    parts = [checkpoint.get("name", content["provenance"].get("model", "model"))]
    if config.get("network"):
        parts.append(f"{config['network']} with {config.get('activation', '?')}")
    parts.append(f"{content['parameters']:,} parameters")
    return ", ".join(plain(part) for part in parts)


def model_rows(content: dict[str, Any]) -> list[Row]:
    """Where the weights come from."""
    checkpoint = content.get("cli", {}).get("checkpoint")
    if not checkpoint:
        return []
    told = [f"sha256 {checkpoint['sha256'][:12]}"]
    if checkpoint.get("trained_by"):
        told.append(checkpoint["trained_by"])
    if checkpoint.get("epoch") is not None:
        told.append(f"epoch {checkpoint['epoch']}")
    if checkpoint.get("weights") == "ema":
        told.append("averaged weights")
    metrics = [
        f"{k} {value(v)}" for k, v in list((checkpoint.get("metrics") or {}).items())[:6] if _is_number(v)
    ]
    rows = [("checkpoint", plain(", ".join(told)))]
    if metrics:
        rows.append(("its metrics", plain(", ".join(metrics))))
    return rows


def data_rows(content: dict[str, Any]) -> list[Row]:
    """What was measured on: data, loss, mode, perturbation."""
    facts, cli = content["provenance"], content.get("cli", {})
    data = cli.get("data")
    rows = []
    if data:
        chosen = f", chosen with seed {data['data_seed']}" if data["chosen"] else ""
        rows.append(
            (
                "data",
                plain(
                    f"{data['name']} ({data['split']}), {data['samples']} samples{chosen}, "
                    f"batches of {data['batch_size']}, sha256 {data['sha256'][:12]}"
                ),
            )
        )
    else:
        rows.append(("data", f"{content['samples']} samples in {facts['batches']} batches"))
    l2 = f" + (l2/2)|theta|^2, l2 = {value(facts['l2'])}" if facts["l2"] else ""
    rows.append(("loss", plain(f"{facts['loss']} {value(content['loss'])}{l2}")))
    mode = {"eval": "eval mode (running statistics)", "none": "none in the model"}
    rows.append(("BatchNorm", mode.get(facts["batchnorm"], plain(facts["batchnorm"]))))
    perturbation = cli.get("perturbation")
    if perturbation:
        told = f"{perturbation['spec']}, crafted once and held fixed; clean loss {value(perturbation['clean_loss'])}"
        if perturbation.get("accuracy") is not None:
            told += (
                f", accuracy {value(100 * perturbation['clean_accuracy'])}% clean, "
                f"{value(100 * perturbation['accuracy'])}% perturbed"
            )
        rows.append(("perturbation", plain(told)))
    else:
        rows.append(("perturbation", "none (clean inputs)"))
    if cli.get("layers"):
        rows.append(("parameters", plain(f"those that match {cli['layers']!r}")))
    if facts["target"] == "population":
        rows.append(("target", "the population the samples come from"))
    return rows


def run_rows(content: dict[str, Any]) -> list[Row]:
    """How it was measured and how long it took."""
    facts = content["provenance"]
    count = content["replicates"]
    how = facts["method"] + (f", {count} replicates" if count else "") + f", seed {facts['seed']}"
    where = f"{facts['device']}, {facts['dtype']}, {facts['threads']} threads"
    if facts["processes"] > 1:
        where += f", {facts['processes']} processes"
    return [
        ("method", plain(how)),
        ("audit", audit(content)),
        ("where", plain(where)),
        ("wall time", seconds(content["seconds"])),
    ]


def audit(content: dict[str, Any]) -> str:
    """The outcome of the measurement's own check."""
    found = content.get("audit")
    if not found:
        return "none was made"
    if not found["entries"]:
        return "nothing to compare"
    worst = max(found["entries"], key=lambda e: _size(e["deviation"]) / e["tolerance"])
    word = "passed" if found["passed"] else "FAILED"
    return plain(
        f"{word}: {len(found['entries'])} comparisons with autograd in {found['dtype']}, worst "
        f"{value(worst['deviation'], 2)} ({worst['check']}, {worst['layer']}; allowed {value(worst['tolerance'], 1)})"
    )


def status(content: dict[str, Any]) -> str:
    """The status and what it means."""
    text = content["status"]
    head = text.partition(";")[0]
    return plain(f"{text} ({STATUS[head]})" if head in STATUS else text)


def notes(content: dict[str, Any]) -> list[str]:
    """All notes: of the measurement, the checkpoint, the data, and every flag of the total."""
    cli = content.get("cli", {})
    flags = [f for f in content["norm"]["total"]["flags"] if f not in ("exact",)]
    found = [f"{flag}: {STATUS[flag]}" for flag in flags[1:] if flag in STATUS]
    found += content["notes"]
    found += cli.get("checkpoint", {}).get("notes", [])
    found += cli.get("data", {}).get("notes", [])
    return [plain(note) for note in found]


def _is_number(x: Any) -> bool:
    return isinstance(x, (int, float)) and not isinstance(x, bool)


def _size(x: Any) -> float:
    return float(x) if isinstance(x, (int, float)) else float("inf")
