"""The network of a folder as transformers writes it: `hf:DIR`, or `hf:NAME` from the local cache.

The folder's config.json names a class of the installed transformers, which builds it; nothing is downloaded, no code
of the folder is imported (auto_map is ignored), and its weights are read by this package alone. A config is as little
to be believed as a checkpoint: its numbers are bounded before the library sees them, and the network is tried without
memory (torch's meta device), so that none is built that would be much larger than its weights.

Attention is the plain ("eager") one: fused kernels have no second derivatives.
"""

from __future__ import annotations

import os
import re
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from hessdiag.checkpoint.layout import some
from hessdiag.errors import CheckpointError, ConfigurationError, ran_out
from hessdiag.store.files import BadFileError, PathLike, parse_json, path_text, read_bytes, shown, size_text

SCHEME = "hf:"
CONFIG = "config.json"
CONFIG_BUDGET = 4 * 2**20
LARGEST = 2**24
"""Whole numbers of a config are sizes: this exceeds every vocabulary and every context."""
MOST_LABELS = 100_000
"""The library makes a name for each."""
PARTS = 50
"""Modules, parameters and buffers that a network may have for each tensor of its file; most have two or three."""
SPARE_BYTES = 256 * 2**20
"""What a network may hold beside the weights of its file: tables that it computes."""
OWN = "build the model in a function of yours, --model package.module:factory"
DROPPED = (
    *("dtype", "torch_dtype", "auto_map", "quantization_config"),
    *("attn_implementation", "_attn_implementation", "_experts_implementation"),
)
"""Entries that would round the weights, or that name code, kernels or packages from elsewhere."""
_NAME = re.compile(r"[A-Za-z0-9][\w.-]{0,95}(/[A-Za-z0-9][\w.-]{0,95})?", re.ASCII)


def folder_of(text: str) -> Path:
    """The folder that `hf:DIR` or `hf:NAME` means; a name is looked up in the local cache, never on the network."""
    place = text.removeprefix(SCHEME)
    if not place:
        raise ConfigurationError(f"{text!r} names no folder; write hf:DIR")
    path = Path(place).expanduser()
    if os.path.isdir(path):
        return path
    if not _NAME.fullmatch(place) or ".." in place:
        raise CheckpointError(f"{text}: there is no folder {shown(place)[1:-1]}")
    cache = _cache()
    repository = cache / f"models--{place.replace('/', '--')}"
    found = _snapshot(repository)
    if found is None:
        raise CheckpointError(
            f"{text}: neither a folder nor in the cache {cache}; nothing is downloaded here: `hf download {place}` "
            "brings it there"
        )
    return found


def advice(path: PathLike) -> str:
    """What a folder with such a config.json is to be called by; nothing of any other."""
    if not os.path.isfile(os.path.join(path, CONFIG)):
        return ""
    return f"; with its {CONFIG} it is a folder of transformers: --model {SCHEME}{path_text(path)}"


def network(text: str, tensors: Mapping[str, Tensor]) -> tuple[nn.Module, dict[str, Any], tuple[str, ...]]:
    """The network of that folder's config.json with these weights, what it is called, and notes.

    The library renames and ties weights as it does for its own files (from_pretrained of a state dict in memory, which
    opens none); whatever it would have to make up is refused.
    """
    try:
        content = parse_json(read_bytes(folder_of(text) / CONFIG, budget=CONFIG_BUDGET), finite=False)
        kind, name = _named(content)
        _check_numbers(content)
    except BadFileError as reason:
        raise BadFileError(f"{CONFIG}: {reason}") from None
    library = _library()
    with _quiet(library), torch.random.fork_rng(devices=[]):
        config, made = _classes(library, kind, name, content)
        floats = {tensor.dtype for tensor in tensors.values() if tensor.is_floating_point()}
        wide = torch.float64 if torch.float64 in floats else torch.float32
        state = {key: t.to(wide) if t.is_floating_point() else t for key, t in tensors.items()}
        try:
            with torch.device("meta"), _counted(PARTS * (len(tensors) + 100)):
                sketch: nn.Module = made(config)
            _check_size(sketch, state)
            model, told = made.from_pretrained(
                None,
                config=config,
                state_dict=state,
                output_loading_info=True,
                ignore_mismatched_sizes=True,
                local_files_only=True,
                trust_remote_code=False,
            )
        except BadFileError:
            raise
        except Exception as error:  # whatever a class of the library makes of a config
            if ran_out(error):
                raise BadFileError(f"no memory to build {name} by its {CONFIG}") from None
            raise BadFileError(f"{name} cannot be built by its {CONFIG} ({_first_line(error)})") from None
    missing = sorted(map(str, told["missing_keys"]))
    misshapen = sorted(str(entry[0] if isinstance(entry, tuple) else entry) for entry in told["mismatched_keys"])
    if missing or misshapen:
        what = f"{len(missing)} missing ({some(missing)})" if missing else f"misshapen: {some(misshapen)}"
        raise BadFileError(f"its tensors are not those of {name}: {what}")
    unused = sorted(map(str, told["unexpected_keys"]))
    odd = sorted(str(kind) for kind in floats - {torch.float32})
    notes = [f"{name} by transformers {library.__version__}, attention as plain operations"]
    if odd:
        notes.append(f"weights stored as {', '.join(odd)}: the model is {wide}")
    if unused:
        notes.append(f"not used by {name}: {some(unused)}")
    filled: nn.Module = model.to(wide)
    return filled, {"architecture": name}, tuple(notes)


def _named(content: Any) -> tuple[str, str]:
    """The kind of network and the class, as the config names them."""
    if not isinstance(content, dict):
        raise BadFileError("no table of options")
    kind, classes = content.get("model_type"), content.get("architectures")
    if not isinstance(kind, str):
        raise BadFileError("names no model_type")
    first = classes[0] if isinstance(classes, list) and classes else None
    if not isinstance(first, str) or not first.isidentifier():
        raise BadFileError(f"names no class under 'architectures': {OWN}")
    return kind, first


def _check_numbers(content: Any) -> None:
    """Refuse numbers that no network has, and what would fetch something."""
    todo: list[tuple[str, Any, int]] = [("", content, 0)]
    while todo:
        name, value, depth = todo.pop()
        if depth > 20:
            raise BadFileError("nested more than 20 deep")
        if isinstance(value, dict):
            if value.get("use_timm_backbone") or value.get("use_pretrained_backbone") or value.get("backbone"):
                raise BadFileError(f"asks for a backbone from elsewhere: {OWN}")
            todo += [(str(key), entry, depth + 1) for key, entry in value.items()]
        elif isinstance(value, list):
            todo += [(name, entry, depth + 1) for entry in value]
        elif type(value) is int and "theta" not in name:
            most = MOST_LABELS if "label" in name else LARGEST
            if abs(value) > most:
                raise BadFileError(f"{shown(name)} = {shown(value)}: more than {most}")


@contextmanager
def _counted(most: int) -> Iterator[None]:
    """Refuse a network of more parts than that while it is being built: a config may claim layers without end."""
    left = [most]

    def count(*_: Any) -> None:
        left[0] -= 1
        if left[0] < 0:
            raise BadFileError(f"{CONFIG} claims a network of more than {most} parts, more than its tensors bear out")

    register = torch.nn.modules.module
    hooks = [
        register.register_module_module_registration_hook(count),
        register.register_module_parameter_registration_hook(count),
        register.register_module_buffer_registration_hook(count),
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _check_size(sketch: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Refuse a network that would hold much more than the file gives it."""
    held = sum(tensor.nbytes for tensor in weights.values())
    tables = {id(b): b for b in sketch.buffers()} | {id(p): p for p in sketch.parameters()}
    wanted = sum(tensor.numel() * tensor.element_size() for tensor in tables.values())
    if wanted > 4 * held + SPARE_BYTES:
        raise BadFileError(f"{CONFIG} wants {size_text(wanted)}, the tensors have {size_text(held)}")


def _classes(library: ModuleType, kind: str, name: str, content: dict[str, Any]) -> tuple[Any, Any]:
    """The config as the library's object, and the class of the network."""
    made = getattr(library, name, None)
    if not (isinstance(made, type) and issubclass(made, library.PreTrainedModel)):
        raise BadFileError(
            f"{CONFIG}: transformers {library.__version__} has no network {shown(name)[1:-1]}: another version may; "
            f"or {OWN}"
        )
    known = library.CONFIG_MAPPING
    if kind not in known:
        raise BadFileError(f"{CONFIG}: transformers {library.__version__} knows no model_type {shown(kind)}")
    plain = {key: value for key, value in content.items() if key not in DROPPED}
    try:
        return known[kind].from_dict(plain, attn_implementation="eager"), made
    except Exception as error:
        raise BadFileError(f"{CONFIG}: transformers refuses it ({_first_line(error)})") from None


def _library() -> ModuleType:
    """transformers, imported with the network switched off."""
    before = os.environ.get("HF_HUB_OFFLINE")
    os.environ["HF_HUB_OFFLINE"] = "1"
    try:
        import transformers
    except ImportError as error:
        raise ConfigurationError(f"hf: needs transformers ({_first_line(error)}): pip install 'hessdiag[hf]'") from None
    finally:
        if before is None:
            del os.environ["HF_HUB_OFFLINE"]
        else:
            os.environ["HF_HUB_OFFLINE"] = before
    found: ModuleType = transformers
    return found


@contextmanager
def _quiet(library: ModuleType) -> Iterator[None]:
    """The library's own advice is not ours to give."""
    logging = library.utils.logging
    before, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity(logging.CRITICAL)
    logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.set_verbosity(before)
        if bars:
            logging.enable_progress_bar()


def _cache() -> Path:
    """Where the Hugging Face libraries keep what they fetched."""
    if os.environ.get("HF_HUB_CACHE"):
        return Path(os.environ["HF_HUB_CACHE"]).expanduser()
    home = os.environ.get("HF_HOME") or os.path.join(os.environ.get("XDG_CACHE_HOME") or "~/.cache", "huggingface")
    return Path(home).expanduser() / "hub"


def _snapshot(repository: Path) -> Path | None:
    """The folder of the version called main, or the only one there is."""
    try:
        commit = read_bytes(repository / "refs" / "main", budget=200).decode("ascii", "replace").strip()
    except BadFileError:
        commit = ""
    if re.fullmatch(r"[0-9a-f]{40}", commit) and os.path.isdir(repository / "snapshots" / commit):
        return repository / "snapshots" / commit
    try:
        found = [entry for entry in (repository / "snapshots").iterdir() if entry.is_dir()]
    except OSError:
        return None
    return found[0] if len(found) == 1 else None


def _first_line(error: Exception) -> str:
    return shown((str(error).splitlines() or [type(error).__name__])[0], 120)[1:-1]
