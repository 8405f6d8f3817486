"""Adapters in checkpoints and in peft's format, against the library peft itself."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from toolmem import checkpoints
from toolmem.checkpoints.adapters import CONFIG, WEIGHTS, merged, read_peft, write_peft
from toolmem.checkpoints.convert import convert
from toolmem.data.tokenizers import ByteTokenizer
from toolmem.errors import ToolmemError
from toolmem.models import Transformer
from toolmem.models.lora import LoRA, adapted
from toolmem.training import AdamW, Constant, LanguageModelModule

SHAPE = {
    "dim": 24,
    "n_layers": 2,
    "n_heads": 3,
    "n_kv_heads": 1,
    "hidden_dim": 40,
    "max_seq_len": 32,
}
KINDS = {
    "lora": LoRA(rank=2, alpha=6),
    "rank_stabilized": LoRA(rank=4, alpha=6, rank_stabilized=True),
    "dora": LoRA(rank=2, alpha=6, dora=True),
    "some": LoRA(rank=2, alpha=6, targets=("qkv", r"blocks\.1\..*down")),
}


def base():
    torch.manual_seed(0)
    return Transformer(ByteTokenizer().vocab_size, **SHAPE)


def disturb(model):
    generator = torch.Generator().manual_seed(1)
    for layer in adapted(model).values():
        for parameter in (layer.lora_a, layer.lora_b, layer.lora_m):
            if parameter is not None:
                parameter.data += 0.05 * torch.randn(parameter.shape, generator=generator)
    return model


def trained(how, path):
    """A checkpoint as a run leaves it, of adapters that do something."""
    module = LanguageModelModule(base(), AdamW(), Constant(), lora=how)
    disturb(module.model)
    about = checkpoints.describe(module.model, {"tokenizer": ByteTokenizer().spec()})
    about["model"]["lora"] = how.plain()
    state = {
        "state_dict": module.state_dict(),
        "global_step": 7,
        "epoch": 0,
        checkpoints.KEY: about,
    }
    checkpoints.write(state, path)
    return module.model.eval()


def tokens():
    return torch.randint(200, (2, 11), generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize("kind", KINDS)
def test_a_checkpoint_loads_and_converts_as_a_plain_model(kind, tmp_path):
    path = tmp_path / "run.ckpt"
    expected = trained(KINDS[kind], path)(tokens())
    loaded = checkpoints.load(path)
    assert not adapted(loaded.model) and loaded.step == 7
    torch.testing.assert_close(loaded.model(tokens()), expected, atol=1e-5, rtol=1e-5)
    convert(path, tmp_path / "merged.ckpt", "file")
    assert merged(tmp_path / "merged.ckpt") is None
    again = checkpoints.load(tmp_path / "merged.ckpt")
    assert torch.equal(again.model(tokens()), loaded.model(tokens())) and again.step == 7
    convert(path, tmp_path / "weights.safetensors", "weights")
    assert not any("lora" in name for name in load_file(tmp_path / "weights.safetensors"))


def huggingface(path, folder):
    """The base model as transformers loads it."""
    from transformers import AutoModelForCausalLM

    from toolmem.checkpoints import exports, pretrained

    plain = base()
    about = checkpoints.describe(plain, {"tokenizer": ByteTokenizer().spec()})
    weights = {f"model.{name}": value for name, value in plain.state_dict().items()}
    checkpoints.write(
        {"state_dict": weights, "global_step": 0, "epoch": 0, checkpoints.KEY: about}, path
    )
    with pretrained.open_model(path) as model:
        architecture, config, tensors = exports._theirs(model)
    from transformers import LlamaConfig, LlamaForCausalLM

    assert architecture.theirs == "LlamaForCausalLM"
    theirs = LlamaForCausalLM(
        LlamaConfig(**{k: v for k, v in config.items() if k != "architectures"})
    )
    with pretrained.open_model(path) as model:
        _, _, tensors = exports._theirs(model)
        theirs.load_state_dict({name: lazy.read() for name, lazy in tensors.items()}, strict=False)
    theirs.save_pretrained(folder)
    return AutoModelForCausalLM.from_pretrained(folder).eval()


@pytest.mark.parametrize("kind", KINDS)
def test_peft_loads_what_was_written_and_computes_the_same(kind, tmp_path):
    peft = pytest.importorskip(
        "peft", reason="the extra dev is not installed: no peft to compare with"
    )
    expected = trained(KINDS[kind], tmp_path / "run.ckpt")(tokens())
    theirs = huggingface(tmp_path / "base.ckpt", tmp_path / "hf")
    torch.testing.assert_close(
        theirs(tokens()).logits, base().eval()(tokens()), atol=1e-5, rtol=1e-5
    )
    write_peft(tmp_path / "run.ckpt", tmp_path / "adapter", base=str(tmp_path / "hf"))
    found = peft.PeftModel.from_pretrained(theirs, str(tmp_path / "adapter")).eval()
    torch.testing.assert_close(found(tokens()).logits, expected, atol=1e-5, rtol=1e-4)
    # all of it was loaded: what peft writes of it is what we wrote
    found.save_pretrained(str(tmp_path / "again"))
    ours, again = (load_file(tmp_path / name / WEIGHTS) for name in ("adapter", "again"))
    assert ours.keys() == again.keys()
    assert all(torch.equal(ours[name], again[name]) for name in ours)
    # and it reads back as it was
    model = base().eval()
    how = read_peft(tmp_path / "adapter", model)
    assert how.rank == KINDS[kind].rank
    torch.testing.assert_close(model(tokens()), expected, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("rooted", [False, True])
def test_what_peft_trained_is_read(dora, rooted, tmp_path):
    peft = pytest.importorskip(
        "peft", reason="the extra dev is not installed: no peft to compare with"
    )
    theirs = huggingface(tmp_path / "base.ckpt", tmp_path / "hf")
    # query and value alone: the key of our one projection has no adapter
    config = peft.LoraConfig(
        r=3, lora_alpha=5, target_modules=["q_proj", "v_proj", "down_proj"], use_dora=dora,
        use_rslora=rooted, task_type="CAUSAL_LM",
    )  # fmt: skip
    adapter = peft.get_peft_model(theirs, config).eval()
    generator = torch.Generator().manual_seed(3)
    for name, parameter in adapter.named_parameters():
        if "lora_" in name:
            parameter.data += 0.05 * torch.randn(parameter.shape, generator=generator)
    adapter.save_pretrained(str(tmp_path / "adapter"))
    model = base().eval()
    how = read_peft(tmp_path / "adapter", model)
    assert how.rank == 6 and how.scale == pytest.approx(5 / (3**0.5 if rooted else 3))
    expected = adapter(tokens()).logits
    torch.testing.assert_close(model(tokens()), expected, atol=1e-5, rtol=1e-4)


def test_what_does_not_fit_is_refused_by_name(tmp_path):
    trained(KINDS["lora"], tmp_path / "run.ckpt")
    folder = tmp_path / "adapter"
    write_peft(tmp_path / "run.ckpt", folder)
    torch.manual_seed(0)
    other = Transformer(260, **(SHAPE | {"dim": 30}))
    with pytest.raises(ToolmemError, match="another model's"):
        read_peft(folder, other)
    config = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps(config | {"bias": "all"}))
    with pytest.raises(ToolmemError, match=r"adapter_config\.json: bias is 'all'"):
        read_peft(folder, base())
    (folder / CONFIG).write_text(json.dumps(config))
    tensors = load_file(folder / WEIGHTS)
    added = {"base_model.model.score.lora_A.weight": torch.ones(2, 2)}
    save_file({**tensors, **added}, folder / WEIGHTS)
    with pytest.raises(ToolmemError, match=r"score.*has no place in it"):
        read_peft(folder, base())
    some = {k: v for k, v in tensors.items() if "layers.0.self_attn.o_proj.lora_B" not in k}
    save_file(some, folder / WEIGHTS)
    with pytest.raises(ToolmemError, match=r"o_proj.*lacks a part"):
        read_peft(folder, base())
    (folder / WEIGHTS).write_bytes(b"nothing")
    with pytest.raises(ToolmemError, match="is damaged"):
        read_peft(folder, base())
    (folder / CONFIG).unlink()
    with pytest.raises(ToolmemError, match=r"has no adapter_config\.json"):
        read_peft(folder, base())
    with pytest.raises(ToolmemError, match="has no adapters"):
        convert(tmp_path / "run.ckpt", tmp_path / "plain.ckpt", "file")
        write_peft(tmp_path / "plain.ckpt", folder)


def test_the_command_line_merges_or_writes_adapters(tmp_path, capsys):
    from toolmem.cli import main

    trained(KINDS["dora"], tmp_path / "run.ckpt")
    assert main(["convert", str(tmp_path / "run.ckpt"), str(tmp_path / "whole.ckpt")]) == 0
    assert not adapted(checkpoints.load(tmp_path / "whole.ckpt").model)
    assert main(["convert", str(tmp_path / "run.ckpt"), str(tmp_path / "a.peft")]) == 0
    assert {file.name for file in (tmp_path / "a.peft").iterdir()} == {CONFIG, WEIGHTS}
    assert main(["convert", str(tmp_path / "whole.ckpt"), str(tmp_path / "b.peft")]) == 2
    assert "has no adapters" in capsys.readouterr().err
