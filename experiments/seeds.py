"""Random numbers by name: every draw comes from a generator keyed by (seed, purpose, epoch, step).

So nothing of a generator's state has to survive an interruption, and no draw depends on how many were made before.
"""

from __future__ import annotations

import hashlib

import torch


def derived(seed: int, *names: int | str) -> int:
    """A 63-bit seed from `seed` and a path of names, by SHA-256."""
    text = "/".join(str(part) for part in ("experiments", seed, *names))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


def generator(device: torch.device | str, seed: int, *names: int | str) -> torch.Generator:
    """A generator on `device`, seeded by `derived`."""
    return torch.Generator(device).manual_seed(derived(seed, *names))
