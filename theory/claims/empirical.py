"""What the text and the captions claim from experiments beyond the tables, by section and figure."""

from __future__ import annotations

from theory.claims.model import Claim

EMPIRICAL = (
    Claim(
        "S3.2.residual-large",
        "section 3.2",
        "In adversarial training the residual is large in early and middle stages.",
        "empirical",
        r"|f-y|\gg0",
    ),
    Claim(
        "S4.2.below-4-rises",
        "section 4.2",
        "Below max|σ''| = 4, more curvature means more robustness for every β.",
        "empirical",
    ),
    Claim(
        "S4.2.peak-in-4-10",
        "abstract; section 4.2",
        "Robust accuracy peaks at a max|σ''| between 4 and 10 for every β.",
        "empirical",
        r"\arg\max\text{ RA}\in[4,10]",
    ),
    Claim(
        "S4.2.above-10-falls",
        "section 4.2",
        "Above max|σ''| = 10, more curvature means less robustness.",
        "empirical",
    ),
    Claim("S4.2.beta2-steepest", "section 4.2", "Above 10 the decline is steepest for β = 2.", "empirical"),
    Claim(
        "F3a.curves-differ",
        "figure 3(a)",
        "At equal α the three β differ substantially in robust accuracy.",
        "empirical",
    ),
    Claim(
        "F3b.overlap-below-15",
        "figure 3(b), section 4.2",
        "As functions of max|σ''| the three curves nearly overlap below 15.",
        "empirical",
    ),
    Claim(
        "F3b.curvature-governs",
        "figure 3(b), section 4.2",
        "max|σ''|, not β, primarily determines robustness.",
        "empirical",
    ),
    Claim(
        "F4.both-peak-in-4-10",
        "figure 4, section 4.3",
        "ResNet-18 and WideResNet-28-10 (TRADES, CIFAR-10, β = 1) both peak in 4-10.",
        "empirical",
    ),
    Claim(
        "F4.wider-is-higher",
        "figure 4, section 4.3",
        "WideResNet-28-10 has the higher robust accuracy.",
        "empirical",
    ),
    Claim(
        "F5.methods-peak-in-4-10",
        "figure 5, section 4.3",
        "DAJAT, DKL and TRADES (β = 1) all peak in 4-10.",
        "empirical",
    ),
    Claim(
        "F6.cifar100-peaks-in-4-10",
        "figure 6, section 4.3",
        "On CIFAR-100 the peak lies in 4-10 as well.",
        "empirical",
    ),
    Claim(
        "F6.cifar100-lower",
        "section 4.3",
        "Robust accuracy is lower on CIFAR-100 than on CIFAR-10.",
        "empirical",
    ),
    Claim(
        "S4.3.independent",
        "section 4.3",
        "The optimum in 4-10 does not depend on architecture, training method or data set.",
        "empirical",
    ),
    Claim(
        "F7a.u-shape",
        "figure 7(a), section 4.5",
        "After standard training the normalised Hessian diagonal norm is U-shaped in max|σ''|.",
        "empirical",
    ),
    Claim(
        "F7a.minimum-in-4-10",
        "figure 7(a), section 4.5",
        "Its minimum lies in 4-10 for every β.",
        "empirical",
    ),
    Claim("F7a.rises-above-10", "figure 7(a), sections 4.5, 5", "Above 10 the norm rises markedly.", "empirical"),
    Claim(
        "F7a.rises-below-4",
        "figure 7(a), section 4.5",
        "Below 4 the norm rises as max|σ''| falls.",
        "empirical",
    ),
    Claim(
        "F7b.clean-falls-below-4",
        "figure 7(b), section 4.5",
        "Below 4, clean accuracy falls as max|σ''| falls.",
        "empirical",
    ),
    Claim("S4.5.same-range", "section 4.5", "The norm is smallest where robustness is largest.", "empirical"),
    Claim(
        "F7.training-regime",
        "figure 7 against section 4.2",
        "The norm measured after standard training explains robustness after adversarial training.",
        "empirical",
    ),
    Claim(
        "S4.5.flat-is-robust",
        "sections 1, 4.5, 5",
        "A smaller norm of the Hessian diagonal goes with better robust generalisation.",
        "empirical",
    ),
    Claim(
        "S4.1.single-run",
        "section 4.1",
        "One run per (α, β) suffices for these conclusions despite run-to-run variation.",
        "empirical",
    ),
    Claim(
        "S1.significant-improvement",
        "section 1",
        "Keeping max|σ''| in the range significantly improves robustness.",
        "empirical",
    ),
)
