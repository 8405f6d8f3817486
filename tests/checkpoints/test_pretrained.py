"""Other programs' models in and out: the same numbers as transformers', and back to the last bit."""

import json
import shutil

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from toolmem import ToolmemError, checkpoints
from toolmem.checkpoints import exports
from toolmem.checkpoints.pretrained import open_model
from toolmem.cli.convert import convert
from toolmem.data.hf_tokenizer import train_tokenizer

LLAMA3 = {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}  # fmt: skip
SMALL = {
    "vocab_size": 300, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5, "bos_token_id": None, "eos_token_id": None, "pad_token_id": None,
}  # fmt: skip
MAMBA = {
    "vocab_size": 300, "hidden_size": 32, "num_hidden_layers": 2, "bos_token_id": None,
    "eos_token_id": None, "pad_token_id": None,
}  # fmt: skip
KINDS = {
    "llama": ("Llama", SMALL),
    "llama, tied": ("Llama", {**SMALL, "tie_word_embeddings": True, "rope_theta": 100000.0}),
    "llama, biases": ("Llama", {**SMALL, "attention_bias": True, "mlp_bias": True}),
    "llama, wide heads": ("Llama", {**SMALL, "head_dim": 16}),
    "llama 3": ("Llama", {**SMALL, "rope_scaling": LLAMA3, "rope_theta": 500000.0}),
    "llama, linear": ("Llama", {**SMALL, "rope_scaling": {"rope_type": "linear", "factor": 4.0}}),
    "mistral": ("Mistral", {**SMALL, "sliding_window": None}),
    "mistral, window": ("Mistral", {**SMALL, "sliding_window": 5}),
    "qwen2": ("Qwen2", {**SMALL, "tie_word_embeddings": True}),
    "qwen2, windows": (
        "Qwen2",
        {**SMALL, "use_sliding_window": True, "sliding_window": 5, "max_window_layers": 2},
    ),
    "qwen3": ("Qwen3", {**SMALL, "head_dim": 16}),
    "qwen3, wide heads": ("Qwen3", {**SMALL, "head_dim": 128}),
    "smollm3": ("SmolLM3", {**SMALL, "no_rope_layer_interval": 4}),
    "smollm3, all rope": ("SmolLM3", {**SMALL, "no_rope_layers": [1, 1, 1, 1]}),
    "mamba": ("Mamba", {**MAMBA, "state_size": 6, "expand": 2, "time_step_rank": 3}),
    "mamba, biases": ("Mamba", {**MAMBA, "use_bias": True, "tie_word_embeddings": False}),
    "mamba2": (
        "Mamba2",
        {**MAMBA, "num_heads": 4, "head_dim": 16, "state_size": 8, "n_groups": 2, "chunk_size": 4},
    ),
}


def their_model(kind, seed=0):
    """A random model of transformers', no weight of which is 0 or 1."""
    name, options = KINDS[kind]
    config = getattr(transformers, f"{name}Config")(**options)
    torch.manual_seed(seed)
    model = getattr(transformers, f"{name}ForCausalLM")(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model


def tokens(seed=1):
    return torch.randint(0, 300, (2, 24), generator=torch.Generator().manual_seed(seed))


def quietly_converted(source, target, **options):
    convert(str(source), str(target), **options)
    return target


@pytest.fixture
def tokenizer_json():
    texts = ["a few words, of which some are said again: a few words"] * 4
    return train_tokenizer(texts, 296).spec()["json"]


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_there_and_back(kind, tmp_path, tokenizer_json):
    theirs = their_model(kind)
    theirs.save_pretrained(tmp_path / "theirs")
    (tmp_path / "theirs" / "tokenizer.json").write_text(tokenizer_json)
    path = quietly_converted(tmp_path / "theirs", tmp_path / "ours.ckpt")
    ours = checkpoints.load(path)
    wanted = theirs(tokens()).logits
    torch.testing.assert_close(ours.model(tokens()), wanted, atol=2e-5, rtol=1e-4)
    back = quietly_converted(path, tmp_path / "back")
    saved = {}
    for file in (tmp_path / "theirs").glob("*.safetensors"):
        saved |= load_file(file)
    again = load_file(back / "model.safetensors")
    assert again.keys() == saved.keys()
    for name, tensor in saved.items():
        assert torch.equal(again[name], tensor), name
    loaded = transformers.AutoModelForCausalLM.from_pretrained(back).eval()
    assert type(loaded) is type(theirs)
    assert torch.equal(loaded(tokens()).logits, wanted)


@pytest.mark.parametrize("kind", ["llama, tied", "llama 3", "qwen2", "qwen3", "llama, linear"])
@torch.no_grad()
def test_gguf_there_and_back(kind, tmp_path, tokenizer_json):
    theirs = their_model(kind)
    theirs.save_pretrained(tmp_path / "theirs")
    (tmp_path / "theirs" / "tokenizer.json").write_text(tokenizer_json)
    file = quietly_converted(tmp_path / "theirs", tmp_path / "model.gguf")
    path = quietly_converted(file, tmp_path / "ours.ckpt")
    ours = checkpoints.load(path).model
    torch.testing.assert_close(ours(tokens()), theirs(tokens()).logits, atol=2e-5, rtol=1e-4)
    with open_model(tmp_path / "theirs") as first, open_model(file) as second:
        assert first.spec["init_args"] == second.spec["init_args"]
        for name, lazy in first.tensors.items():
            assert torch.equal(lazy.read(), second.tensors[name].read()), name


@pytest.mark.parametrize(
    ("kind", "error"), [("llama, tied", 1e-5), ("qwen2", 1e-5), ("qwen3, wide heads", 1e-5)]
)
@torch.no_grad()
def test_transformers_reads_our_gguf(kind, error, tmp_path, tokenizer_json):
    theirs = their_model(kind)
    theirs.save_pretrained(tmp_path / "theirs")
    (tmp_path / "theirs" / "tokenizer.json").write_text(tokenizer_json)
    quietly_converted(tmp_path / "theirs", tmp_path / "model.gguf")
    again = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, gguf_file="model.gguf", dtype=torch.float32
    ).eval()
    torch.testing.assert_close(
        again(tokens()).logits, theirs(tokens()).logits, atol=error, rtol=1e-4
    )


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "q8_0"])
def test_gguf_in_fewer_bits(dtype, tmp_path, tokenizer_json):
    from gguf import GGUFReader, dequantize

    their_model("llama").save_pretrained(tmp_path / "theirs")
    (tmp_path / "theirs" / "tokenizer.json").write_text(tokenizer_json)
    file = quietly_converted(tmp_path / "theirs", tmp_path / "model.gguf", dtype=dtype)
    with open_model(tmp_path / "theirs") as first, open_model(file) as second:
        for name, lazy in first.tensors.items():
            found, wanted = second.tensors[name].read().float(), lazy.read()
            if wanted.ndim == 1:
                assert torch.equal(found, wanted)
            elif dtype == "q8_0":  # a block of 32 in steps of its largest over 127
                largest = wanted.unflatten(-1, (-1, wanted.shape[-1])).abs().amax(-1, keepdim=True)
                assert ((found - wanted).abs() <= 0.51 * largest.flatten(1) / 127 + 1e-3).all()
            else:
                assert torch.equal(found, wanted.to(getattr(torch, dtype)).float())
        for tensor in GGUFReader(
            file
        ).tensors:  # the library's own reader agrees on what lies there
            values = torch.from_numpy(dequantize(tensor.data, tensor.tensor_type).copy()).flatten()
            from toolmem.models.interop.gguf import GGUFFile

            assert torch.equal(GGUFFile(file).tensors[tensor.name].read().float().flatten(), values)


def test_weights_keep_their_dtype(tmp_path, tokenizer_json):
    theirs = their_model("llama, tied").to(torch.bfloat16)
    theirs.save_pretrained(tmp_path / "theirs")
    (tmp_path / "theirs" / "tokenizer.json").write_text(tokenizer_json)
    path = quietly_converted(tmp_path / "theirs", tmp_path / "ours.ckpt")
    state = checkpoints.read(path)["state_dict"]
    assert {tensor.dtype for tensor in state.values()} == {torch.bfloat16}
    model = checkpoints.load(path).model
    assert model.embedding.weight.dtype == torch.float32
    assert model.head.weight is model.embedding.weight
    back = load_file(quietly_converted(path, tmp_path / "back") / "model.safetensors")
    assert all(
        torch.equal(back[name], one)
        for name, one in load_file(tmp_path / "theirs" / "model.safetensors").items()
    )
    wide = load_file(
        quietly_converted(path, tmp_path / "wide", dtype="float32") / "model.safetensors"
    )
    assert {tensor.dtype for tensor in wide.values()} == {torch.float32}


def test_shards(tmp_path, tokenizer_json, monkeypatch):
    theirs = their_model("llama")
    theirs.save_pretrained(tmp_path / "theirs", max_shard_size="20KB")
    (tmp_path / "theirs" / "tokenizer.json").write_text(tokenizer_json)
    assert len(list((tmp_path / "theirs").glob("*.safetensors"))) > 2
    monkeypatch.setattr(exports, "LARGEST_FILE", 20_000)
    back = quietly_converted(tmp_path / "theirs", tmp_path / "back")
    assert len(list(back.glob("*.safetensors"))) > 2
    again = transformers.AutoModelForCausalLM.from_pretrained(back)
    for name, tensor in theirs.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor), name


def edited(folder, **changes):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changes}))


@pytest.mark.parametrize(
    ("changes", "says"),
    {
        "architecture": ({"model_type": "gpt_bigcode"}, ["'gpt_bigcode'", "llama"]),
        "activation": ({"hidden_act": "gelu"}, ["hidden_act", "gelu"]),
        "scaling": ({"rope_scaling": {"rope_type": "yarn", "factor": 2.0}}, ["yarn", "llama3"]),
        "bias": ({"attention_bias": True}, ["attention_bias", "mlp_bias"]),
        "missing": ({"hidden_size": None}, ["config"]),
        "shape": ({"intermediate_size": 40}, ["gate_proj", "[48, 32]", "[40, 32]"]),
        "layers": ({"num_hidden_layers": 5}, ["model.layers.4", "missing"]),
        "fewer layers": ({"num_hidden_layers": 3}, ["model.layers.3", "no place"]),
        "many layers": ({"num_hidden_layers": 10**12}, ["num_hidden_layers"]),
        "long": ({"max_position_embeddings": 10**12}, ["max_position_embeddings"]),
        "quantised": ({"quantization_config": {"quant_method": "gptq"}}, ["gptq"]),
        "partial": ({"partial_rotary_factor": 0.5}, ["partial_rotary_factor"]),
        "vocabulary": ({"vocab_size": 280}, ["280"]),
    }.values(),
)
def test_what_is_refused_is_named(changes, says, tmp_path, tokenizer_json):
    their_model("llama").save_pretrained(tmp_path / "theirs")
    (tmp_path / "theirs" / "tokenizer.json").write_text(tokenizer_json)
    edited(tmp_path / "theirs", **changes)
    with pytest.raises(ToolmemError) as caught:
        convert(str(tmp_path / "theirs"), str(tmp_path / "ours.ckpt"))
    assert all(text in str(caught.value) for text in says), caught.value
    assert not (tmp_path / "ours.ckpt").exists()


def test_other_files_that_are_refused(tmp_path, tokenizer_json):
    folder = tmp_path / "theirs"
    their_model("llama").save_pretrained(folder)
    weights = folder / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-100])
    with pytest.raises(ToolmemError, match="100 bytes are missing"):
        convert(str(folder), str(tmp_path / "ours.ckpt"))
    weights.unlink()
    with pytest.raises(ToolmemError, match=r"no model\.safetensors"):
        convert(str(folder), str(tmp_path / "ours.ckpt"))
    with pytest.raises(ToolmemError, match="no folder nobody/nothing"):
        convert("nobody/nothing", str(tmp_path / "ours.ckpt"))
    weights.write_bytes(whole)
    (folder / "tokenizer.json").write_text("{}")
    with pytest.raises(ToolmemError, match=r"not a tokenizer\.json"):
        convert(str(folder), str(tmp_path / "ours.ckpt"))
    (folder / "config.json").write_text("[1]")
    with pytest.raises(ToolmemError, match=r"config\.json holds a list"):
        convert(str(folder), str(tmp_path / "ours.ckpt"))


def test_an_extra_tensor_is_named(tmp_path, tokenizer_json):
    folder = tmp_path / "theirs"
    their_model("llama").save_pretrained(folder)
    (folder / "tokenizer.json").write_text(tokenizer_json)
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.0.self_attn.sinks"] = torch.zeros(4)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(ToolmemError, match=r"layers\.0\.self_attn\.sinks has no place"):
        convert(str(folder), str(tmp_path / "ours.ckpt"))
    shutil.rmtree(folder)


def test_a_checkpoint_in_shards_goes_out_too(tmp_path, tokenizer_json):
    their_model("qwen3").save_pretrained(tmp_path / "theirs")
    (tmp_path / "theirs" / "tokenizer.json").write_text(tokenizer_json)
    shards = quietly_converted(tmp_path / "theirs", tmp_path / "ours.ckpt", ranks=3)
    assert len(list(shards.glob("*.safetensors"))) == 3
    back = quietly_converted(shards, tmp_path / "back")
    saved, again = (load_file(tmp_path / name / "model.safetensors") for name in ("theirs", "back"))
    assert back.is_dir() and saved.keys() == again.keys()
    assert all(torch.equal(again[name], tensor) for name, tensor in saved.items())
