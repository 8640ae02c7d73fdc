"""torch.compile for one run: a fresh compiler, and no silent return to eager steps.

A compiled function holds at most `torch._dynamo.config.recompile_limit` (8) variants; past them torch runs it eager and
says so once, in a log. Each activation of a sweep is a variant of the same code, so a worker would train its ninth run
eager. So each run starts with an empty compiler, and meets an error where even one run needs more variants.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

from hessdiag.errors import ConfigurationError

LIMITS = ("fail_on_recompile_limit_hit", "fail_on_cache_limit_hit")  # torch calls it one or the other
HITS = ("FailOnRecompileLimitHit", "FailOnCacheLimitHit")


@contextmanager
def fresh_compiler(wanted: bool) -> Iterator[None]:
    """Nothing compiled before is kept or used; running out of variants is a ConfigurationError where torch can tell."""
    if not wanted:
        yield
        return
    import torch._dynamo as dynamo
    import torch._dynamo.exc as exceptions

    name = next((name for name in LIMITS if hasattr(dynamo.config, name)), None)
    hits = tuple(getattr(exceptions, hit) for hit in HITS if hasattr(exceptions, hit))
    dynamo.reset()
    guard: Any = nullcontext() if name is None else dynamo.config.patch({name: True})
    try:
        with guard:
            yield
    except hits as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ConfigurationError(
            f"compile: torch would go on uncompiled, since a function has too many variants ({reason}); "
            "set drop_last = 'auto' if batches differ in size, or compile = false"
        ) from error
    finally:
        dynamo.reset()  # what was compiled for this run holds its network
