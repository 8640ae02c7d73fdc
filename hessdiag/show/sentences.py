"""The sentences around the numbers: what was measured, on what, how, and what to know about it."""

from __future__ import annotations

from typing import Any

from hessdiag.norm import STATUS
from hessdiag.show.text import bytes_, counted, interval, loss, plain, seconds, value

Row = tuple[str, str]


def title(content: dict[str, Any]) -> str:
    """One line that names the model."""
    checkpoint = content.get("cli", {}).get("checkpoint", {})
    config = checkpoint.get("config") or {}
    parts = [checkpoint.get("name", content["provenance"].get("model", "model"))]
    if config.get("network"):
        parts.append(f"{config['network']} with {config.get('activation', '?')}")
    parts.append(f"{counted(content['parameters'], 'parameter')}")
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
    metrics = [f"{k} {value(v)}" for k, v in list((checkpoint.get("metrics") or {}).items())[:6] if _is_number(v)]
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
                    f"{data['name']} ({data['split']}), {_count(data)}{chosen}, "
                    f"batches of {data['batch_size']}, sha256 {data['sha256'][:12]}"
                ),
            )
        )
    else:
        batches = counted(facts["batches"], "batch", "batches")
        rows.append(("data", f"{counted(content['samples'], 'sample')} in {batches}"))
    l2 = f" + (l2/2)|theta|^2, l2 = {value(facts['l2'])}" if facts["l2"] else ""
    if cli.get("normalize"):
        rows.append(("normalised", plain(f"inputs in [0, 1], by {cli['normalize']}")))
    rows.append(("loss", f"{loss(facts)} {value(content['loss'])}{l2}"))
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


def accuracy_rows(content: dict[str, Any]) -> list[Row]:
    """The accuracy on these data, the checkpoint's own beside it, and every warning."""
    found = content.get("cli", {}).get("accuracy")
    rows = [("warning", plain(line)) for line in warnings(content)]
    if not found:
        return rows
    told = f"{value(100 * found['value'])}% of {counted(found['samples'], found.get('unit', 'sample'))}"
    told += f" (chance: {value(100 * found['chance'], 3)}%)"
    if found["own"] is not None:
        told += f"; the checkpoint's own {found['own_name']}: {value(100 * found['own'])}%"
    return [("accuracy", plain(told)), *rows]


def warnings(content: dict[str, Any]) -> list[str]:
    """What makes a number misleading however exact it is."""
    cli = content.get("cli", {})
    found, own = cli.get("accuracy"), cli.get("own_loss")
    check = "check the order of the classes, the data, and how inputs are normalised (--normalize)"
    told = []
    if own and own["fits"] != own["shift"]:
        here = "is refused" if own["measured"] is None else f"is {value(own['measured'])}"
        hint = "say --loss, --ignore-index or --output as it was trained"
        if own["fits"] is not None:
            hint = f"with --shift {own['fits']} it is the model's"
        told.append(
            f"the model's own loss of the first {counted(own['samples'], 'sample')} is {value(own['value'])}, the one "
            f"measured {here}: {hint}"
        )
    if like := cli.get("data", {}).get("like_bytes"):
        told.append(
            f"inputs span [{value(like[0])}, {value(like[1])}] and are used as they are: if the model was trained on "
            "pixels in [0, 1], divide bytes by 255 or store them as uint8"
        )
    if found and found["no_better_than_chance"]:
        told.append(f"the accuracy is no better than chance: a network that has learned nothing? Else {check}")
    elif found and found["below_own"]:
        told.append(f"the accuracy is far below the checkpoint's own: {check}")
    return told


def spread_lines(content: dict[str, Any]) -> list[tuple[str, str, str, str]]:
    """(label, rms, interval, meaning) for other samples, and for all of the data."""
    found = content.get("cli", {}).get("spread")
    if not found or "missing" in found:
        return []
    sure = f" at {100 * found['confidence']:g}%"
    if found["low"] is None:
        return [("other samples", "n/a", "", "the noise of the replicates hides how far others would be")]
    lines = [
        (
            "other samples",
            value(found["rms"], 3),
            interval(found["low"], found["high"], 3) + sure,
            "expected of many more samples",
        )
    ]
    if whole := found.get("whole"):
        lines.append(
            (
                f"all {whole['samples']:,} samples",
                value(whole["rms"], 3),
                interval(whole["low"], whole["high"], 3) + sure,
                "expected of the whole data",
            )
        )
    return lines


def spread_rows(content: dict[str, Any]) -> list[Row]:
    """What the spread over samples took, or why there is none."""
    found = content.get("cli", {}).get("spread")
    if not found:
        return []
    if "missing" in found:
        return [("other samples", plain(f"not told: {found['missing']}"))]
    took = f"{found['groups']} groups of {counted(found['group_size'], 'sample')}, jackknifed"
    rows = [("other samples", f"{took}; {seconds(found['seconds'])}, {bytes_(found['bytes'])}")]
    if whole := found.get("whole"):
        rows.append(("whole data", f"{counted(whole['samples'], 'sample')} take about {seconds(whole['seconds'])}"))
    return rows


def run_rows(content: dict[str, Any]) -> list[Row]:
    """How it was measured and how long it took."""
    facts = content["provenance"]
    count = content["replicates"]
    how = facts["method"] + (f", {counted(count, 'replicate')}" if count else "") + f", seed {facts['seed']}"
    where = f"{facts['device']}, {facts['dtype']}, {counted(facts['threads'], 'thread')}"
    if facts["processes"] > 1:
        where += f", {facts['processes']} processes"
    return [
        ("method", plain(how)),
        ("audit", audit(content)),
        *spread_rows(content),
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
    made = [entry for entry in found["entries"] if entry["deviation"] is not None]
    if not made:
        return "nothing could be compared"
    worst = max(made, key=lambda e: _size(e["deviation"]) / e["tolerance"])
    word = "passed" if all(entry["passed"] for entry in made) else "FAILED"
    rest = len(found["entries"]) - len(made)
    return plain(
        f"{word}: {counted(len(made), 'comparison')} with autograd in {found['dtype']}, worst "
        f"{value(worst['deviation'], 2)} ({worst['check']}, {worst['layer']}; allowed {value(worst['tolerance'], 1)})"
        + (f"; {counted(rest, 'comparison')} could not be made" if rest else "")
    )


def exact_for(content: dict[str, Any]) -> str:
    """What stands in place of an interval; for these samples, since others would give another norm."""
    count = content["samples"]
    return f"exact for these {counted(count, 'sample')}" if count != 1 else "exact for this sample"


def status(content: dict[str, Any]) -> str:
    """The status and what it means."""
    text = content["status"]
    head = text.partition(";")[0]
    if text == "exact":
        return f"{exact_for(content)}; other samples would give another norm"
    return plain(f"{text} ({STATUS[head]})" if head in STATUS else text)


def badge(content: dict[str, Any]) -> tuple[str, str, bool]:
    """The status as a word, what it means, and whether there is nothing else to say."""
    text = content["status"]
    word, _, rest = text.partition(";")
    if text == "exact":
        return word, f"for these {counted(content['samples'], 'sample')}; others would give another norm", True
    told = "; ".join(part for part in (STATUS.get(word, ""), rest.strip()) if part)
    return ("ok, but" if rest and word == "ok" else plain(word)), plain(told), text == "ok"


def notes(content: dict[str, Any]) -> list[str]:
    """All notes: of the measurement, the checkpoint, the data, and every flag of the total."""
    cli = content.get("cli", {})
    flags = [f for f in content["norm"]["total"]["flags"] if f not in ("exact",)]
    found = [f"{flag}: {STATUS[flag]}" for flag in flags[1:] if flag in STATUS]
    found += content["notes"]
    own = cli.get("own_loss")
    if own and own["shift"] == own["fits"] == 1:
        found.append("the loss compares each place with the next token (shift=1), as the model's own does")
    found += cli.get("checkpoint", {}).get("notes", [])
    found += cli.get("data", {}).get("notes", [])
    return [plain(note) for note in found]


def _count(data: dict[str, Any]) -> str:
    whole = data.get("of")
    if whole and whole > data["samples"]:
        return f"{data['samples']:,} of {counted(whole, 'sample')}"
    return counted(data["samples"], "sample")


def _is_number(x: Any) -> bool:
    return isinstance(x, (int, float)) and not isinstance(x, bool)


def _size(x: Any) -> float:
    return float(x) if isinstance(x, (int, float)) else float("inf")
