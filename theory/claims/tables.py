"""Table 1, Table 2 and what sections 4.4 and A.6 say about their numbers: a claim per cell and per
comparison.
"""

from __future__ import annotations

from theory.claims.model import IMPROVEMENTS, RANGE, TABLE1, TABLE2, Claim

ROBUST = {row.key: row.robust for row in TABLE1}
CURVATURE = {row.key: row.curvature for row in TABLE1}
MEMORY = {row.key: row.memory for row in TABLE2}
MINUTES = {row.key: row.minutes for row in TABLE2}


def _curvature(value: float) -> str:
    return r"\infty" if value == float("inf") else f"{value:g}"


def _table1() -> tuple[Claim, ...]:
    claims = []
    for row in TABLE1:
        place = f"Table 1, {row.name}"
        claims += [
            Claim(
                f"T1.{row.key}.standard",
                f"{place}, standard accuracy",
                f"{row.standard}% clean accuracy after DAJAT on CIFAR-10 with ResNet-18.",
                "empirical",
            ),
            Claim(
                f"T1.{row.key}.robust",
                f"{place}, robust accuracy",
                f"{row.robust}% robust accuracy (AutoAttack, 8/255) after DAJAT on CIFAR-10 with ResNet-18.",
                "empirical",
            ),
            Claim(
                f"T1.{row.key}.curvature",
                f"{place}, max|σ''|",
                f"max|σ''| of {row.name} is {row.curvature:g}.",
                "derivation",
                rf"\max|\sigma''|={_curvature(row.curvature)}",
            ),
        ]
    return tuple(claims)


def _table2() -> tuple[Claim, ...]:
    claims = []
    for row in TABLE2:
        place = f"Table 2, {row.name}"
        claims += [
            Claim(
                f"T2.{row.key}.memory",
                f"{place}, GPU memory",
                f"{row.memory} GB for standard training of ResNet-18 at batch 128.",
                "empirical",
            ),
            Claim(
                f"T2.{row.key}.time",
                f"{place}, training time",
                f"{row.minutes} minutes for 20 epochs of ResNet-18 at batch 128 on a 2080 Ti.",
                "empirical",
            ),
        ]
    return tuple(claims)


def _improvements() -> tuple[Claim, ...]:
    return tuple(
        Claim(
            f"S4.4.improvement-{key}",
            "section 4.4",
            f"{ROBUST[key]} exceeds GELU's {ROBUST['gelu']} by {gain} (percentage points).",
            "arithmetic",
            f"{ROBUST[key]}-{ROBUST['gelu']}={gain}",
        )
        for key, gain in IMPROVEMENTS.items()
    )


TABLES = (
    *_table1(),
    *_table2(),
    *_improvements(),
    Claim(
        "S4.4.improvements",
        "section 4.4",
        "The improvements over GELU are 2.88, 3.1 and 2.8 for β = 0, 1, 2.",
        "arithmetic",
        r",\ ".join(f"{ROBUST[key]}-{ROBUST['gelu']}={gain}" for key, gain in IMPROVEMENTS.items()),
    ),
    Claim(
        "S4.4.best-baseline",
        "section 4.4",
        "GELU has the best robust accuracy of the baselines in Table 1.",
        "arithmetic",
    ),
    Claim(
        "S4.4.outperforms-all",
        "section 4.4",
        "Each RCT-AF row of Table 1 has a higher robust accuracy than every baseline row.",
        "arithmetic",
    ),
    Claim(
        "S4.4.relu-infinite",
        "section 4.4",
        "ReLU and leaky ReLU have effectively infinite curvature at the kink.",
        "derivation",
        r"\sup|\sigma''|=\infty",
    ),
    Claim(
        "S4.4.smooth-at-most-1",
        "sections 4.4, 4.5",
        "GELU, Swish, ELU and Mish are smooth and have max|σ''| at most 1.",
        "derivation",
        r"\max|\sigma''|\le1.0",
    ),
    Claim(
        "S4.4.smooth-below-rct",
        "section 4.4",
        "GELU, Swish, ELU and Mish fall below RCT-AF because their curvature is insufficient.",
        "empirical",
    ),
    Claim(
        "S4.4.relu-below-rct",
        "section 4.4",
        "ReLU and leaky ReLU fall below RCT-AF because the kink sharpens the loss landscape.",
        "empirical",
    ),
    Claim(
        "S4.4.seven-in-range",
        "section 4.4",
        "max|σ''| = 7, used in Table 1, lies in 4 to 10.",
        "arithmetic",
        rf"{RANGE[0]}\le{CURVATURE['rct1']:g}\le{RANGE[1]}",
    ),
    Claim(
        "T1.rct.alpha",
        "Table 1, caption",
        "max|σ''| = 7 is reached with α = 28, 14, 7 for β = 0, 1, 2.",
        "derivation",
        r"\max_x\sigma''_{28,0}(x)=\max_x\sigma''_{14,1}(x)=\max_x\sigma''_{7,2}(x)=7",
    ),
    Claim(
        "A6.b0-memory-as-gelu",
        "section A.6",
        "β = 0 uses as much memory as GELU, 0.99 GB.",
        "arithmetic",
        f"{MEMORY['rct0']}={MEMORY['gelu']}",
    ),
    Claim(
        "A6.b0-time-between",
        "section A.6",
        "β = 0 trains in a time between ReLU and GELU.",
        "arithmetic",
        f"{MINUTES['relu']}<{MINUTES['rct0']}<{MINUTES['gelu']}",
    ),
    Claim(
        "A6.b1-memory-as-mish",
        "section A.6",
        "β = 1 uses as much memory as Mish, 1.25 GB.",
        "arithmetic",
        f"{MEMORY['rct1']}={MEMORY['mish']}",
    ),
    Claim(
        "A6.b1-time-between",
        "section A.6",
        "β = 1 trains in a time between ReLU and GELU.",
        "arithmetic",
        f"{MINUTES['relu']}<{MINUTES['rct1']}<{MINUTES['gelu']}",
    ),
    Claim(
        "A6.b2-highest-cost",
        "section A.6",
        "β = 2 needs the most memory and time of Table 2.",
        "arithmetic",
        f"{MEMORY['rct2']}={max(MEMORY.values())},\\ {MINUTES['rct2']}={max(MINUTES.values())}",
    ),
    Claim(
        "A6.higher-order-time",
        "section A.6",
        "Higher orders β bring substantial overhead in time.",
        "empirical",
    ),
    Claim(
        "A6.higher-order-memory",
        "section A.6",
        "Higher orders β bring substantial overhead in memory.",
        "empirical",
    ),
    Claim(
        "A6.no-advantage-of-b2",
        "section A.6",
        "β = 0 and 1 reach the robustness of β = 2 once max|σ''| is tuned, at less cost.",
        "empirical",
    ),
)
