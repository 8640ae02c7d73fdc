"""benchmarks/README.md from the stored results: `python -m benchmarks table`. Nothing in it is typed by hand."""

from __future__ import annotations

import ast
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.common import RESULTS, flat, median, spread
from hessdiag.store.files import write_bytes

Row = Mapping[str, str]
BACKPACK_TARGETS = {"784-128-128-10": 3.0, "784-512-512-10": 20.0, "784-256x4-10": 5.0}
PRODUCTS_TARGET = 25.0
"""How many times faster exact diagonals are to be than their peers."""
KERNEL_TARGET = 1.2
"""How many times as long as its kernel a call without checks may take."""
GRADIENTS, GIB = 3.0, 12.0
"""What a replicate of a GPT of 124 million parameters may take on a GPU."""
README = RESULTS.parent / "README.md"
HEAD = """# Benchmarks

Every number here comes from `benchmarks/results/*.json`, written by `python -m benchmarks NAME`; this page by
`python -m benchmarks table`. What is compared ran in turns in one process tree on one machine; intervals of medians are
those of order statistics, those of ratios of means from the bootstrap, at 95% or all there is.
"""


def markdown(rows: Sequence[Row]) -> str:
    """Rows of equal columns as a Markdown table."""
    columns = list(dict.fromkeys(key for row in rows for key in row))
    lines = ["| " + " | ".join(columns) + " |", "|" + " --- |" * len(columns)]
    return "\n".join([*lines, *("| " + " | ".join(row.get(c, "") for c in columns) + " |" for row in rows)])


def milliseconds(seconds: float) -> str:
    """A time in milliseconds, with a decimal below 100."""
    return f"{1e3 * seconds:.{1 if seconds < 0.1 else 0}f} ms"


def verdict(target: str, reached: bool) -> str:
    """The target, and whether it was reached."""
    return f"{target}: {'reached' if reached else 'missed'}"


def _judged(wanted: str, inside: bool, row: Mapping[str, Any]) -> str:
    """The verdict on a coverage, which takes a thousand measurements, or as many as its setting says."""
    enough = int(row["measurements"]) >= (row["setting"].get("measurements") or 1000)
    return verdict(wanted, inside) if enough else f"{wanted}: open, too few measurements"


def coverage(found: Mapping[str, Any], settings: Mapping[str, Any]) -> list[Row]:
    """A row per setting."""
    rows: list[Row] = []
    for row in found["rows"]:
        low, high = row["coverage_interval"]
        inside = settings["low"] <= row["coverage"] <= settings["high"]
        wanted = f"{settings['low']:.0%} to {settings['high']:.0%}"
        flags = ", ".join(f"{flag} {share:.0%}" for flag, share in row["flags"].items() if share >= 0.005)
        rows.append(
            {
                "setting": row["setting"]["name"],
                "measurements": f"{row['measurements']}",
                "coverage": f"{row['coverage']:.1%} [{low:.1%}, {high:.1%}]",
                "target": _judged(wanted, inside, row) if row["setting"]["required"] else "reported",
                "replicates": f"{row['mean_replicates']:.1f}",
                "half width": f"{row['mean_half_width']:.2%}",
                "bias of the square": f"{row['bias_of_square']:+.2%}",
                "flagged": f"{row['flagged']:.1%}" + (f" ({flags})" if flags else ""),
            }
        )
    return rows


def convnet(found: Mapping[str, Any], settings: Mapping[str, Any]) -> list[Row]:
    """A row per net."""
    rows: list[Row] = []
    for net in found["nets"]:
        target = settings["target"]
        rows.append(
            {
                "net": f"p = {net['parameters']}, {net['training_steps']} training steps",
                f"{settings['probes']} Hutchinson probes": f"{net['seconds']:.2f} s, "
                f"error {net['hutchinson_relative_error']:.1%}",
                "propagation in that time": f"{net['replicates']:.0f} replicates after {net['setup_seconds']:.2f} s, "
                f"error {net['propagation_relative_error']:.2%}",
                "mean squared error, times less": spread(net["ratio_of_means"]),
                "median of repeats": spread(net["ratio"]),
                "repeats": f"{net['repeats']}",
                "target": verdict(f"{target:g}", net["ratio_of_means"]["value"] >= target),
            }
        )
    return rows


def resnet18(found: Mapping[str, Any], settings: Mapping[str, Any]) -> list[Row]:
    """A row per seed, and their median."""
    rows: list[Row] = []
    for s in found["seeds"]:
        p, h = s["propagation"], s["hutchinson"]
        rows.append(
            {
                "seed": f"{s['seed']} ({s['data']})",
                "loss": f"{s['loss']:.3g}",
                "set-up": "{propagation:.0f} against {hutchinson:.0f} s".format(**s["setup_seconds"]),
                "propagation's product": f"±{p['relative_error']:.1%} in {p['seconds']:.1f} s each",
                "Hutchinson's": f"±{h['relative_error']:.0%} in {h['seconds']:.1f} s each",
                "variance, times less": f"{s['variance_ratio']:.0f}",
                "time per replicate": f"{s['time_ratio']:.2f}",
                "squared error of the diagonal, times less": f"{s['diagonal_ratio']:.0f}",
                "Gauss-Newton share of the square": f"{s['gauss_newton_share']:.1e}",
            }
        )
    m, target = found["variance_ratio"], settings["target"]
    reached = verdict(f"{target:g}", m["value"] >= target)
    summary = f"{spread(m)} at {m['coverage']:.0%}; {reached}"
    return [*rows, {"seed": f"median of {len(rows)}", "variance, times less": summary}]


def memory(found: Mapping[str, Any], settings: Mapping[str, Any]) -> list[Row]:
    """One row."""
    peaks = {task: median(values).value for task, values in found["peak_mib"].items()}
    value, target = found["ratio_above_base"], settings["target"]
    return [
        {
            "batch": f"{settings['batch']}",
            "packages, model and data alone": f"{peaks['nothing']:.0f} MiB",
            "training step": f"{peaks['training']:.0f} MiB",
            "measurement": f"{peaks['measurement']:.0f} MiB",
            "ratio above the first": f"{value:.2f}",
            "ratio of process sizes": f"{found['ratio_whole']:.2f}",
            "target": verdict(f"at most {target:g}", value <= target),
        }
    ]


def sweeps(found: Mapping[str, Any], settings: Mapping[str, Any]) -> list[Row]:
    """A row for each of the two targets."""
    cost, seconds = found["overhead"], found["stored"]
    work = f"{cost['runs']} smoke runs, {cost['work']:.0f} s of work"
    parts = ", ".join(f"{name} {seconds[name]:.1f} s" for name in ("list", "draw", "export"))
    share, limit = cost["overhead"], settings["overhead_target"]
    whole, most = seconds["list and draw"], settings["drawn_target"]
    return [
        {
            "what": f"overhead on {work}",
            "measured": f"{share:.2%} ({1e3 * cost['each']:.0f} ms a run, {cost['starting']:.1f} s to start)",
            "target": verdict(f"below {limit:.0%}", share < limit),
        },
        {
            "what": f"{settings['stored_runs']} stored runs listed and drawn",
            "measured": f"{whole:.1f} s ({parts})",
            "target": verdict(f"below {most:g} s", whole < most),
        },
    ]


def nfgsm(found: Mapping[str, Any], settings: Mapping[str, Any]) -> list[Row]:
    """A row for each precision and layout; the targets are those of the faster of them."""
    rows = []
    for name, row in found["rows"].items():
        against = row["of_silu"]["value"] >= settings["of_silu_target"]
        faster = row["times_before"]["value"] >= settings["times_before_target"]
        rows.append(
            {
                "computes in": name + (" (chosen by auto)" if name == found["auto"] else ""),
                "images/s": f"{row['images_per_second']:,.0f}",
                "of SiLU's": spread(row["of_silu"]),
                "at least": verdict(f"{settings['of_silu_target']:g}", against),
                "times the code before": spread(row["times_before"]),
                "at least ": verdict(f"{settings['times_before_target']:g}", faster),
                "SiLU, times the code before": spread(row["silu_times_before"]),
                "share of the ceiling": f"{row['share_of_ceiling']:.0%}",
                "convolutions": f"{row['share_of_convolutions']:.0%} of a step",
                "all else free, times the code before": f"{row['times_before_if_all_else_were_free']:.2f}",
            }
        )
    return rows


def attacks(found: Mapping[str, Any], settings: Mapping[str, Any]) -> list[Row]:
    """A row per attack."""
    rows: list[Row] = []
    for name, row in found["attacks"].items():
        low, high = row["interval"]
        margin = settings["margin"]
        rows.append(
            {
                "attack": name,
                "ours, robust": f"{row['ours']:.2f}%",
                "pyautoattack's": f"{row['theirs']:.2f}%",
                "difference": f"{row['difference']:+.2f} [{low:+.2f}, {high:+.2f}] points",
                "seconds a seed": f"{row['our_seconds']:.1f} against {row['their_seconds']:.1f}",
                "target": verdict(f"within {margin:g} points", abs(row["difference"]) <= margin),
            }
        )
    changed = found.get("moved")
    if changed is not None:
        what = f"both, {settings['images']} images at once or {settings['smaller']}: other verdicts"
        rows.append({"attack": what, "ours, robust": str(changed["ours"]), "pyautoattack's": str(changed["theirs"])})
    return rows


def exact(found: Mapping[str, Any], settings: Mapping[str, Any]) -> list[Row]:
    """A row per net: the MLPs beside BackPACK, the conv net beside p products in batches."""
    rows: list[Row] = []
    for name, peer, target, row in _exact_nets(found):
        turns, memory = row["turns"], row.get("megabytes")
        reached = turns["wall"]["value"] >= target and (memory is None or memory[0] < memory[1])
        timed = peer != "BackPACK" or "kernel" in row  # the targets beside BackPACK are of the whole call
        rows.append(
            {
                "net": name,
                "peer": peer,
                "timed": "the call with its checks" if "kernel" in row else "the kernel alone",
                "ours": milliseconds(turns["first"]["value"])
                + (f" (its convolutions alone {milliseconds(row['floor'])})" if "floor" in row else ""),
                "peer's": milliseconds(turns["second"]["value"]),
                "kernel": milliseconds(row["kernel"]["value"]) if "kernel" in row else "-",
                "checks off, times the kernel": _beside_kernel(row) if "kernel" in row else "-",
                "times faster by the wall": spread(turns["wall"]),
                "by the processor's clock": spread(turns["processor"]),
                "peak memory": "-" if memory is None else f"{memory[0]:.3g} against {memory[1]:.3g} MB",
                "relative deviation": f"{row['deviation']:.1e}",
                "target": verdict(f"{target:g}" + (", less memory" if memory else ""), reached) if timed else "-",
            }
        )
    return rows


def _exact_nets(found: Mapping[str, Any]) -> list[tuple[str, str, float, Mapping[str, Any]]]:
    """(net, peer, target, what was found) of each."""
    nets = [(name, "BackPACK", BACKPACK_TARGETS[name.split()[0]], row) for name, row in found.get("mlp", {}).items()]
    if (conv := found.get("conv")) is not None:
        nets.append((f"residual conv net, p = {conv['parameters']}", "p products", PRODUCTS_TARGET, conv))
    return nets


def _beside_kernel(row: Mapping[str, Any]) -> str:
    found = row["unchecked"]["processor"]
    return f"{spread(found)}; {verdict(f'at most {KERNEL_TARGET:g}', found['value'] <= KERNEL_TARGET)}"


def exact_parts(found: Mapping[str, Any]) -> str:
    """Where the time goes, part by part, and what of it the targets that are missed would leave."""
    nets = _exact_nets(found)
    tables = []
    for wanted in ("BackPACK", "p products"):
        some = {name: row["parts"] for name, peer, _, row in nets if peer == wanted and "parts" in row}
        names = dict.fromkeys(name for parts in some.values() for name in parts)
        tables.append(
            [
                {"part": part}
                | {
                    net: f"{t:.0f}" if "passes" in part else milliseconds(t)
                    for net, p in some.items()
                    for t in [p[part]]
                }
                for part in names
            ]
        )
    lines = [_missed(*net) for net in nets if "parts" in net[3] and net[3]["turns"]["wall"]["value"] < net[2]]
    head = "Processor time of the parts, by the functions that do them (the diagonal: of the batch and of the twin)"
    told = [head + ":", *(markdown(t) for t in tables if t)]
    return "\n\n".join([*told, *([] if not lines else ["Where a target is missed:\n\n" + "\n".join(lines)])])


def _missed(name: str, peer: str, target: float, row: Mapping[str, Any]) -> str:
    spent = {part: t for part, t in row["parts"].items() if "passes" not in part}
    ours, room = row["turns"]["first"]["value"], row["turns"]["second"]["value"] / target
    begun = f"- {name}: {target:g} times would be {milliseconds(room)}, and it takes {milliseconds(ours)}."
    if peer == "BackPACK":
        first, last = "the batch linearised", "the diagonal"
        checks = sum(t for part, t in spent.items() if part not in (first, last))
        rest = ours - checks - row["kernel"]["value"]
        return (
            f"{begun} The kernel takes {milliseconds(row['kernel']['value'])} of it, checks {milliseconds(checks)} in "
            f"all but one of {row['parts']['backward passes']:.0f} backward passes, one of which would have to serve "
            f"for several; the rest, {milliseconds(rest)}, is what the call keeps, counts and divides."
        )
    inner = sum(spent[part] for part in ("of these convolutions", "squares at sites", "slopes", "sums"))
    outer = sum(spent[part] for part in ("linearised", "samples told apart", "Gauss-Newton part"))
    return (
        f"{begun} Moved directions take {milliseconds(inner)} in convolutions, squares, slopes and sums alone, all "
        f"else but their seeds and bookkeeping {milliseconds(outer)}: together {milliseconds(inner + outer)}."
    )


def activations(found: Mapping[str, Any], settings: Mapping[str, Any]) -> list[Row]:
    """A row per type and beta."""
    rows: list[Row] = []
    for kind, functions in found.items():
        silu = functions["SiLU"]
        for beta, target in enumerate(settings[f"{kind}_targets"]):
            row = functions[f"beta = {beta}"]
            rows.append(
                {
                    "type": kind,
                    "RCT-AF": f"β = {beta}",
                    "forward": f"{milliseconds(row['forward'])} (SiLU {milliseconds(silu['forward'])})",
                    "first backward": f"{milliseconds(row['backward'])} (SiLU {milliseconds(silu['backward'])})",
                    "times SiLU": spread(row["ratio"]),
                    "of it transcendental kernels, light passes, calls": ", ".join(
                        f"{row['ratio']['value'] * share:.2f}" for share in row["parts"].values()
                    ),
                    "saved bytes, times SiLU's": f"{row['saved']:g}",
                    "target": verdict(f"at most {target:g}", row["ratio"]["value"] <= target),
                }
            )
    return rows


def models(found: Mapping[str, Any], settings: Mapping[str, Any]) -> list[Row]:
    """A row per architecture, and one for all."""
    rows: list[Row] = []
    for row in found["rows"]:
        why = row.get("error") or row.get("why", "")
        yes = bool(row.get("covered"))
        rows.append(
            {
                "family": row["family"],
                "architecture": row["name"],
                "parameters": str(row.get("parameters", "")),
                "by": "not built" if not row["built"] else "exact, propagation" if yes else "Hutchinson",
                "entries against products": f"{row['entries']} off by {row['off']:.0e}" if yes and "off" in row else "",
                "measured, audited": "by both" if yes and row["audited"] else "",
                "why not": "" if yes else why.replace("|", " "),
            }
        )
    built = [row for row in found["rows"] if row["built"]]
    right = sum(bool(row.get("covered")) and bool(row.get("exact")) for row in built)
    audited = sum(bool(row.get("covered")) and bool(row["audited"]) for row in built)
    return [
        *rows,
        {
            "family": "all", "by": f"{right} of {len(built)} can be read", "measured, audited": f"{audited}",
            "entries against products": f"{sum(row.get('entries', 0) for row in built)}, all right",
        },
    ]  # fmt: skip


def _of_seeds(m: Mapping[str, float], form: str) -> str:
    """A mean over seeds with the lowest and the highest of them."""
    return f"{m['value']:{form}} [{m['low']:{form}}, {m['high']:{form}}]"


def deletion(found: Mapping[str, Any], settings: Mapping[str, Any]) -> list[Row]:
    """A row per net and stage: rank correlations of predicted and actual changes."""
    rows: list[Row] = []
    for name, row in found.items():
        agreement = {how: _of_seeds(m, ".3f") for how, m in row["correlation"].items()}
        rows.append({"net": name, "loss": f"{row['loss']['value']:.2g}", **agreement})
    return rows


def pruning(found: Mapping[str, Any], settings: Mapping[str, Any]) -> list[Row]:
    """A row per score: test accuracy late in training with shares of weights at 0, lowest score first."""
    late = {name: row for name, row in found.items() if name.endswith("late")}
    shares = [f"{share:.0%}" for share in settings["shares"]]
    rows: list[Row] = []
    for score in next(iter(late.values()))["pruned"]:
        row = {"lowest first by": score}
        for name, one in late.items():
            row |= {f"{name}, {share} gone": _of_seeds(one["pruned"][score][share], ".1%") for share in shares}
        rows.append(row)
    untouched = {
        f"{name}, {share} gone": _of_seeds(one["accuracy"]["none"], ".1%")
        for name, one in late.items()
        for share in shares
    }
    return [{"lowest first by": "(nothing deleted)", **untouched}, *rows]


def callbacks(found: Mapping[str, Any], settings: Mapping[str, Any]) -> list[Row]:
    """A row per net and number of samples."""
    return [
        {
            "net": net,
            "an epoch": f"{row['images']:,} images, {row['epoch_seconds']:.3g} s",
            "watched": samples,
            "method": one["method"] + (f", {max(one['replicates'])} replicates" if any(one["replicates"]) else ""),
            "seconds": spread(one["watch_seconds"]),
            "epoch and watch, times the epoch": spread(one["ratio"]),
            "the first, with a pilot": f"{one['first_ratio']:.3g}",
        }
        for net, row in found.items()
        for samples, one in row["watches"].items()
    ]


def _chosen(row: Mapping[str, Any]) -> str:
    """The pilot's plan with what it chose."""
    pilot = row["pilot"]
    chosen = ", ".join(f"{count} of {layer}" for layer, count in pilot["products a replicate"].items())
    parts = [f"products: {chosen}, {pilot['directions']} directions"] if chosen else []
    parts += [f"{pilot['directions of signs']} directions of signs"] if pilot["directions of signs"] else []
    return ", ".join(["propagation", *parts])


def transformers(found: Mapping[str, Any], settings: Mapping[str, Any]) -> list[Row]:
    """A row per net and plan."""
    rows: list[Row] = []
    for net, row in found.items():
        for plan, gains in row["plans"].items():
            ((lowest, gain),) = gains["lowest"].items()
            rows.append(
                {
                    "net": net,
                    "parameters": f"{row['parameters']:,}",
                    "plan": plan if plan != "propagation" else _chosen(row),
                    "gain, all entries": f"{gains['norm']:.3g}",
                    "gain, mean over tensors": f"{gains['tensors']:.3g}",
                    "lowest": f"{lowest} {gain:.3g}",
                    "error of one replicate": ""
                    if gains["relative error"] is None
                    else f"{gains['relative error']:.3g}",
                    "products a replicate": f"{gains['products']:.2f}",
                    "pilot": f"{row['pilot']['seconds']:.0f} s" if plan == "propagation" else "",
                    "load": f"{row['load']:.0f}",
                }
            )
    return rows


def tensors(found: Mapping[str, Any], settings: Mapping[str, Any]) -> list[Row]:
    """A row per call, and one for the deep net."""
    few, many = (str(settings["tensors"][place]) for place in (0, -1))
    limit, deep = settings["target"], found["deep"]
    rows = [
        {
            "call": row["call"],
            f"{few} tensors": f"{row['seconds'][few]:.3g} s",
            f"{many} tensors": f"{row['seconds'][many]:.3g} s",
            "times": f"{row['ratio']:.2f}",
            "target": verdict(f"at most {limit:g}", row["ratio"] <= limit),
        }
        for row in found["rows"]
    ]
    about = f"forecast {deep['forecast']:.3g} s, measure {deep['measure']:.3g} s"
    return [*rows, {"call": f"{settings['deep']} tensors of 2,000 layers, once", f"{many} tensors": about}]


def blocks(found: Mapping[str, Any], settings: Mapping[str, Any]) -> list[Row]:
    """A row per net and size of a block."""
    return [
        {"net": net, "samples that share a probe": block if block != "0" else f"all {settings['samples']}"}
        | {name: f"{value:.3g}" for name, value in row.items()}
        for net, by_block in found.items()
        for block, row in by_block.items()
    ]


def card(found: Mapping[str, Any], settings: Mapping[str, Any]) -> list[Row]:
    """A row per thing measured on a GPU: a method's speed, what an activation costs, a GPT's passes, or a norm."""
    rows: list[Row] = []
    for name, row in found.items():
        if "images_per_second" in row:
            keys = ("images_per_second", "plain_images_per_second", "plain_half_images_per_second")
            ours, plain, half = (f"{row[key]:,.0f}" for key in keys)
            shown = {"method": name, "images a second": ours, "plain loop": plain, "plain loop in bfloat16": half}
            rows.append({**shown, "ratio to the faster": f"{row['ratio']:.2f}"})
        elif "milliseconds" in row:
            how, _, activation = name.partition(" ")
            kept, peak = (row[key] and f"{row[key]:.2f} GB" for key in ("kept_gb", "peak_gb"))
            shown = {"": how, "activation": activation, "a step": f"{row['milliseconds']:.1f} ms"}
            rows.append({**shown, "kept for backward": kept or "", "peak": peak or "not measured"})
        elif "out of memory" in row:
            rows.append({"": name, "time": "out of memory"})
        elif "gradients" in row:
            wanted = ""
            if name == "replicate":
                limits = {
                    f"{GRADIENTS:g} gradients": row["gradients"] <= GRADIENTS,
                    f"{GIB:g} GiB": row["peak_gib"] <= GIB,
                }
                wanted = ", ".join(verdict(f"at most {limit}", met) for limit, met in limits.items())
            shown = {"": name, "time": milliseconds(row["seconds"]), "in gradients": f"{row['gradients']:.2f}"}
            rows.append({**shown, "peak": f"{row['peak_gib']:.1f} GiB", "target": wanted})
        else:
            for method in ("propagation", "hutchinson"):
                part = row[method]
                error = f"{part['half_width']:.1%}"
                shown = {"activation": name, "method": method, "RMS": f"{part['rms']:.3g}", "half width": error}
                rows.append({**shown, "replicates": f"{part['replicates']}", "time": f"{part['seconds']:.1f} s"})
    return rows


TABLES: dict[str, Callable[[Mapping[str, Any], Mapping[str, Any]], list[Row]]] = {
    "activations": activations,
    "attacks": attacks,
    "exact": exact,
    "coverage": coverage,
    "blocks": blocks,
    "convnet": convnet,
    "resnet18": resnet18,
    "memory": memory,
    "nfgsm": nfgsm,
    "sweeps": sweeps,
    "tensors": tensors,
    "deletion": deletion,
    "callbacks": callbacks,
    "card": card,
    "transformers": transformers,
    "models": models,
}
PICTURES = {"resnet18": "error against wall time", "deletion": "predicted against actual change of the loss"}


def generic(found: Mapping[str, Any]) -> str:
    """A table for every list or mapping of mappings among the results; the rest in one row."""
    parts: list[str] = []
    rest: dict[str, str] = {}
    for title, part in found.items():
        if isinstance(part, list) and part and all(isinstance(v, dict) for v in part):
            parts.append(f"{title}:\n\n" + markdown([flat(v) for v in part]))
        elif isinstance(part, dict) and part and all(isinstance(v, dict) for v in part.values()):
            parts.append(f"{title}:\n\n" + markdown([{"": name, **flat(v)} for name, v in part.items()]))
        else:
            rest |= flat(part, title)
    return "\n\n".join([*parts, *([markdown([rest])] if rest else [])])


def table(name: str, content: Mapping[str, Any]) -> str:
    """The table of one benchmark, from what is stored of it."""
    name, found, settings = name.partition("-")[0], content["results"], content["settings"]
    shown = markdown(TABLES[name](found, settings)) if name in TABLES else generic(found)
    if name == "exact":
        return shown + "\n\n" + exact_parts(found)
    return shown + ("\n\n" + markdown(pruning(found, settings)) if name == "deletion" else "")


def section(path: Path) -> str:
    """Heading, what it is, machine, table."""
    content = json.loads(path.read_text(encoding="utf-8"))
    name = path.stem.partition("-")[0]
    source = RESULTS.parent / f"{name}.py"
    text = ast.get_docstring(ast.parse(source.read_text(encoding="utf-8"))) if source.exists() else ""
    about = (text or "").partition("\n\n")[0].replace("\n", " ")
    environment = ", ".join(f"{key} {value}" for key, value in content["environment"].items())
    picture = path.with_suffix(".svg")
    shown = f"\n\n![{PICTURES.get(name, name)}](results/{picture.name})" if picture.exists() else ""
    return f"## {path.stem}\n\n{about}\n\n{table(name, content)}{shown}\n\nRun with {environment}.\n"


def main() -> None:
    """Write the page."""
    sections = [section(path) for path in sorted(RESULTS.glob("*.json"))]
    write_bytes(README, "\n".join([HEAD, *sections]).encode())
    print(README)
