"""`hf:DIR`: folders that transformers wrote, compared with what the library itself makes of them; nothing is fetched."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from typer.testing import CliRunner

import hessdiag as hd
from hessdiag.callbacks import TrainerWatch
from hessdiag.checkpoint import load_checkpoint, pretrained
from hessdiag.cli.program import app
from hessdiag.data import load_named
from hessdiag.errors import CheckpointError, ConfigurationError, HessdiagError

transformers = pytest.importorskip("transformers", reason="the extra hessdiag[hf] is not installed")
SIZES = {"hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 12}


def bert() -> Any:
    config = transformers.BertConfig(vocab_size=30, max_position_embeddings=16, num_labels=3, **SIZES)
    return transformers.BertForSequenceClassification(config)


def vit() -> Any:
    config = transformers.ViTConfig(image_size=8, patch_size=4, num_channels=1, num_labels=10, **SIZES)
    return transformers.ViTForImageClassification(config)


def resnet() -> Any:
    config = transformers.ResNetConfig(
        num_channels=1, embedding_size=4, hidden_sizes=[4, 8], depths=[1, 1], num_labels=10, layer_type="basic"
    )
    return transformers.ResNetForImageClassification(config)


def llama() -> Any:
    config = transformers.LlamaConfig(
        vocab_size=30, max_position_embeddings=16, num_key_value_heads=2, tie_word_embeddings=True, **SIZES
    )
    return transformers.LlamaForCausalLM(config)


@pytest.fixture
def written(tmp_path: Path) -> Callable[..., Path]:
    def write(make: Callable[[], Any], **options: Any) -> Path:
        torch.manual_seed(0)
        made = make().eval()
        for module in made.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.running_mean.uniform_()
        folder = tmp_path / make.__name__
        made.save_pretrained(folder, **options)
        return folder

    return write


@pytest.mark.parametrize("make", [bert, vit, resnet, llama])
@pytest.mark.parametrize("shards", [False, True])
def test_the_network_is_that_of_the_library(make: Any, shards: bool, written: Callable[..., Path]) -> None:
    folder = written(make, **({"max_shard_size": "2KB"} if shards else {}))
    assert (folder / "model.safetensors.index.json").exists() == shards
    found = load_checkpoint(folder, factory=f"hf:{folder}")
    reference = getattr(transformers, type(make()).__name__).from_pretrained(folder, local_files_only=True)
    state = reference.state_dict()
    assert found.model.state_dict().keys() == state.keys()
    assert all(torch.equal(found.model.state_dict()[name], state[name]) for name in state)
    assert type(found.model) is type(reference)
    assert not found.model.training
    assert found.config == {"architecture": type(reference).__name__}
    assert found.model.config._attn_implementation == "eager"


def test_a_language_model_is_measured_at_the_loss_of_the_library(written: Callable[..., Path], tmp_path: Path) -> None:
    """Of the next token, without being told; and the Trainer's callback does the same."""
    folder = written(llama)
    ids = torch.randint(30, (4, 6), generator=torch.Generator().manual_seed(0))
    np.savez(tmp_path / "tokens.npz", input_ids=ids.numpy(), labels=ids.numpy())
    args = ["measure", "--model", f"hf:{folder}", "--data", f"npz:{tmp_path / 'tokens.npz'}", "--no-spread"]
    result = CliRunner().invoke(app, [*args, "--json", "-"])
    assert result.exit_code == 0, result.output
    content = json.loads(result.stdout)
    model = transformers.LlamaForCausalLM.from_pretrained(folder, local_files_only=True, attn_implementation="eager")
    own = model.eval()(input_ids=ids, labels=ids).loss.item()
    assert content["loss"] == pytest.approx(own, rel=1e-5)
    assert content["cli"]["own_loss"]["fits"] == content["cli"]["own_loss"]["shift"] == 1
    logged: list[dict[str, float]] = []
    trainer = SimpleNamespace(log=logged.append)
    watch = TrainerWatch(trainer, [{"input_ids": ids, "labels": ids}])
    watch.on_epoch_end(None, SimpleNamespace(epoch=1.0), SimpleNamespace(should_log=False), model=model)
    assert logged[0]["hessian_rms"] == pytest.approx(content["rms"], rel=1e-5)


def test_weights_in_bfloat16_are_measured_in_float32(written: Callable[..., Path]) -> None:
    folder = written(lambda: bert().to(torch.bfloat16))
    content = json.loads((folder / "config.json").read_text())
    assert "bfloat16" in (content.get("dtype"), content.get("torch_dtype"))
    found = load_checkpoint(folder, factory=f"hf:{folder}")
    assert {p.dtype for p in found.model.parameters()} == {torch.float32}
    assert any("stored as torch.bfloat16" in note for note in found.notes)


def test_pickled_weights_are_read_by_us_alone(written: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    folder = written(bert)
    torch.save(bert_state := load_checkpoint(folder, factory=f"hf:{folder}").model.state_dict(), folder / "x.bin")
    (folder / "model.safetensors").unlink()
    (folder / "x.bin").rename(folder / "pytorch_model.bin")
    monkeypatch.setattr(torch, "load", lambda *_, **__: pytest.fail("torch.load was called"))
    found = load_checkpoint(folder, factory=f"hf:{folder}").model.state_dict()
    assert all(torch.equal(found[name], bert_state[name]) for name in bert_state)


def test_what_the_library_would_make_up_is_refused(written: Callable[..., Path]) -> None:
    from safetensors.torch import load_file, save_file

    folder = written(bert)
    path = folder / "model.safetensors"
    state = load_file(path)
    save_file({**state, "more": torch.ones(2)}, path)
    found = load_checkpoint(folder, factory=f"hf:{folder}")
    assert any("not used by BertForSequenceClassification: more" in note for note in found.notes)
    save_file({name: t for name, t in state.items() if name != "classifier.weight"}, path)
    with pytest.raises(CheckpointError, match=r"1 missing \(classifier.weight\)"):
        load_checkpoint(folder, factory=f"hf:{folder}")
    save_file({**state, "classifier.weight": torch.ones(4, 8)}, path)
    with pytest.raises(CheckpointError, match=r"misshapen: classifier.weight"):
        load_checkpoint(folder, factory=f"hf:{folder}")


def test_from_the_cache_by_name_and_never_from_the_network(
    written: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, commit = written(resnet), "0123456789" * 4
    repository = tmp_path / "hub" / "models--them--net"
    (repository / "snapshots").mkdir(parents=True)
    (repository / "blobs").mkdir()
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    (repository / "snapshots" / commit).mkdir()
    for number, file in enumerate(sorted(folder.iterdir())):
        file.rename(repository / "blobs" / str(number))
        (repository / "snapshots" / commit / file.name).symlink_to(Path("../../blobs") / str(number))
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    events: list[str] = []
    watching = [True]
    sys.addaudithook(lambda event, _: events.append(event) if watching[0] and event.startswith("socket.") else None)
    try:
        found = load_checkpoint(pretrained.folder_of("hf:them/net"), factory="hf:them/net")
        assert found.config == {"architecture": "ResNetForImageClassification"}
        with pytest.raises(CheckpointError, match=r"`hf download them/other` brings it there"):
            pretrained.folder_of("hf:them/other")
    finally:
        watching[0] = False
    assert events == []
    (repository / "refs" / "main").write_text("../../../../etc")
    assert pretrained.folder_of("hf:them/net").name == commit  # the only one there is


CONFIGS: dict[str, tuple[dict[str, Any], str]] = {
    "no kind": ({"model_type": None}, "names no model_type"),
    "no class": ({"architectures": []}, "names no class"),
    "a function": ({"architectures": ["pipeline"]}, "has no network pipeline"),
    "dotted": ({"architectures": ["os.system"]}, "names no class"),
    "unknown class": ({"architectures": ["MyModel"]}, "has no network MyModel"),
    "unknown kind": ({"model_type": "mine"}, "knows no model_type"),
    "endless": ({"num_hidden_layers": 10**7}, "more than .* parts"),
    "beyond layers": ({"num_hidden_layers": 10**9}, "more than 16777216"),
    "labels": ({"num_labels": 10**8}, "more than 100000"),
    "gigantic": ({"hidden_size": 2**24, "intermediate_size": 2**24}, "wants .* the tensors have"),
    "beyond": ({"vocab_size": 10**30}, "more than 16777216"),
    "negative": ({"hidden_size": -8}, "cannot be built|refuses it"),
    "of text": ({"hidden_size": "x"}, "cannot be built|refuses it"),
    "nested": ({"x": json.loads("[" * 30 + "]" * 30)}, "nested"),
    "from elsewhere": ({"use_timm_backbone": True}, "from elsewhere"),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_hostile_configs(name: str, written: Callable[..., Path]) -> None:
    folder = written(bert)
    change, words = CONFIGS[name]
    content = {**json.loads((folder / "config.json").read_text()), **change}
    (folder / "config.json").write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match=words) as caught:
        load_checkpoint(folder, factory=f"hf:{folder}")
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 700


def test_a_folders_code_is_not_imported(written: Callable[..., Path], tmp_path: Path) -> None:
    folder = written(bert)
    (folder / "evil.py").write_text(f"open({str(tmp_path / 'executed')!r}, 'w')\n")
    content = json.loads((folder / "config.json").read_text())
    content["auto_map"] = {"AutoConfig": "evil.Config", "AutoModel": "evil.Model"}
    content["attn_implementation"] = content["_attn_implementation"] = "them/kernel"
    content["quantization_config"] = {"quant_method": "bitsandbytes"}
    (folder / "config.json").write_text(json.dumps(content))
    load_checkpoint(folder, factory=f"hf:{folder}")
    assert not (tmp_path / "executed").exists()


def test_from_the_command_line(written: Callable[..., Path], tmp_path: Path) -> None:
    """Tokens by name, logits meant without a word: the number is the library's."""
    folder = written(bert)
    rng = np.random.default_rng(0)
    mask = np.ones((12, 6), np.int64)
    mask[::2, 4:] = 0
    arrays = {"input_ids": rng.integers(1, 30, (12, 6)), "attention_mask": mask, "labels": rng.integers(0, 3, 12)}
    np.savez(tmp_path / "tokens.npz", **arrays)
    line = ["measure", "--model", f"hf:{folder}", "--data", f"npz:{tmp_path / 'tokens.npz'}", "--dtype", "float64"]
    line += ["--layers", r"classifier\..*", "--method", "reference", "--no-spread", "--json", str(tmp_path / "a.json")]
    done = CliRunner().invoke(app, line)
    assert done.exit_code in (0, 1), done.output
    told = json.loads((tmp_path / "a.json").read_text())
    model = load_checkpoint(folder, factory=f"hf:{folder}").model.double()
    objective = hd.Objective(
        model,
        parameters=r"classifier\..*",
        output=lambda returned: returned.logits,
        forward=lambda model, inputs: model(**inputs),
    )
    data = load_named(f"npz:{tmp_path / 'tokens.npz'}")
    m = hd.measure(objective, data.batches(128, dtype=torch.float64), method="reference")
    assert told["norm"]["total"]["rms"] == pytest.approx(m.rms, rel=1e-12)
    assert told["cli"]["data"]["shape"] == {"input_ids": [6], "attention_mask": [6]}
    assert told["cli"]["checkpoint"]["name"] == f"hf:{folder}"


def test_a_language_model_has_the_loss_that_its_library_says(written: Callable[..., Path], tmp_path: Path) -> None:
    folder = written(llama)
    rng = np.random.default_rng(0)
    ids = rng.integers(1, 30, (6, 7))
    labels = np.where(rng.random(ids.shape) < 0.2, -100, ids)
    np.savez(tmp_path / "text.npz", input_ids=ids, labels=labels)
    line = ["measure", "--model", f"hf:{folder}", "--data", f"npz:{tmp_path / 'text.npz'}", "--dtype", "float64"]
    line += ["--shift", "1", "--layers", r"model\.norm\..*", "--method", "reference", "--no-spread", "--json", "-"]
    done = CliRunner().invoke(app, line)
    assert done.exit_code in (0, 1), done.output
    told = json.loads(done.stdout)
    model = load_checkpoint(folder, factory=f"hf:{folder}").model.double()
    tokens = {"input_ids": torch.from_numpy(ids), "labels": torch.from_numpy(labels)}
    with torch.no_grad():
        returned = model(**tokens)
        wide = nn.functional.cross_entropy(returned.logits[:, :-1].reshape(-1, 30), tokens["labels"][:, 1:].reshape(-1))
    assert told["loss"] == pytest.approx(float(wide), rel=1e-12)
    assert told["loss"] == pytest.approx(float(returned.loss), rel=1e-6)  # which the library takes in float32


def test_without_the_library_the_extra_is_named(written: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    folder = written(bert)
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ConfigurationError, match=r"pip install 'hessdiag\[hf\]'"):
        load_checkpoint(folder, factory=f"hf:{folder}")


def test_names_that_are_no_folder() -> None:
    for text, words in (("hf:", "names no folder"), ("hf:../../etc", "no folder"), ("hf:a/b/c", "no folder")):
        with pytest.raises(HessdiagError, match=words):
            pretrained.folder_of(text)
