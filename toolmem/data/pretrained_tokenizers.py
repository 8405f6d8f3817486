"""Pretrained models' tokenizers: out of a folder or a GGUF file's metadata, and into either.

A GGUF file has no ``tokenizer.json``, but a vocabulary, merges or scores, and the name of a way to split
text. What they mean together is taken from transformers' own reader of such files, so that both give the
same tokens (a file that names ``smollm`` is split as GPT-2 splits, for one).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from toolmem.data.hf_tokenizer import BYTE_TO_CHAR, HFTokenizer
from toolmem.data.tokenizers import ROLE_TOKENS, ByteTokenizer, Tokenizer
from toolmem.errors import ToolmemError

GGML = "tokenizer.ggml."
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED = 1, 2, 3, 4, 5  # types of tokens in GGUF
GGUF_IDS = {
    "bos_token": "bos_token_id", "eos_token": "eos_token_id", "unk_token": "unknown_token_id",
    "pad_token": "padding_token_id",
}  # fmt: skip
_LETTERS = r"\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}"
_LOWER = r"\p{Ll}\p{Lm}\p{Lo}\p{M}"
_ENDINGS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_SPACES = r"\s*[\r\n]+|\s+(?!\S)|\s+"
_LLAMA3 = (
    _ENDINGS
    + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|"
    + _SPACES
)  # fmt: skip
_QWEN2 = _LLAMA3.replace("{1,3}", "")
_TEKKEN = (
    rf"[^\r\n\p{{L}}\p{{N}}]?[{_LETTERS}]*[{_LOWER}]+|[^\r\n\p{{L}}\p{{N}}]?[{_LETTERS}]+[{_LOWER}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|" + _SPACES
)
_GPT4O = (
    rf"[^\r\n\p{{L}}\p{{N}}]?[{_LETTERS}]*[{_LOWER}]+{_ENDINGS}?"
    rf"|[^\r\n\p{{L}}\p{{N}}]?[{_LETTERS}]+[{_LOWER}]*{_ENDINGS}?"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|" + _SPACES
)
# tokenizer.ggml.pre -> how text is split; None as GPT-2 does
SPLITS: dict[str, str | None] = {
    **dict.fromkeys(
        ("default", "gpt-2", "smollm", "phi-2", "olmo", "mpt", "starcoder", "refact", "command-r",
         "roberta-bpe", "codeshell", "exaone"),
    ),
    **dict.fromkeys(
        ("llama-bpe", "llama3", "llama-v3", "falcon3", "falcon-h1", "pixtral", "dbrx", "smaug-bpe"),
        _LLAMA3,
    ),
    **dict.fromkeys(("qwen2", "deepseek-r1-qwen", "megrez"), _QWEN2),
    "tekken": _TEKKEN,
    **dict.fromkeys(("gpt-4o", "llama4"), _GPT4O),
}  # fmt: skip
CONFIG_KEYS = ("bos_token", "eos_token", "unk_token", "pad_token")


# Reading


def tokenizer_from_gguf(metadata: Mapping[str, Any], vocab_size: int, source: str) -> HFTokenizer:
    """The tokenizer that a GGUF file's metadata describe.

    Args:
        metadata: the file's.
        vocab_size: ids that the model has.
        source: the file, for messages.

    Raises:
        ToolmemError: when it has none, or one of a kind that is not read here, naming it.
    """
    kind = metadata.get(GGML + "model")
    tokens = metadata.get(GGML + "tokens")
    if not isinstance(tokens, list) or not tokens or not all(isinstance(t, str) for t in tokens):
        raise ToolmemError(f"{source}: it has no tokenizer ({GGML}tokens)")
    if kind not in ("gpt2", "llama"):
        raise ToolmemError(
            f"{source}: a tokenizer of kind {kind!r:.40} is not read here: gpt2 and llama are"
        )
    types = metadata.get(GGML + "token_type") or [NORMAL] * len(tokens)
    special = _special_tokens(metadata, tokens, source)
    try:
        definition = (
            _byte_level(metadata, tokens, types, source)
            if kind == "gpt2"
            else _sentencepiece(metadata, tokens, special)
        )
        added = dict.fromkeys(special.values(), True)
        for token, one in zip(tokens, types, strict=True):
            if one in (CONTROL, USER_DEFINED):
                added.setdefault(token, one == CONTROL)
        places = {token: i for i, token in enumerate(tokens)}
        definition["added_tokens"] = [
            _added(places[token], token, is_special)
            for token, is_special in sorted(added.items(), key=lambda item: places[item[0]])
        ]
    except (TypeError, ValueError, AttributeError) as error:
        raise ToolmemError(f"{source}: its tokenizer is damaged ({error})") from error
    starts = metadata.get(GGML + "add_bos_token", kind == "llama")
    if starts and "bos_token" in special:
        definition["post_processor"] = _begins_by(special["bos_token"], places)
    template = metadata.get("tokenizer.chat_template")
    return _pretrained(
        json.dumps(definition, ensure_ascii=False),
        template if isinstance(template, str) else None,
        special,
        vocab_size,
        source,
    )


def _special_tokens(metadata: Mapping[str, Any], tokens: list[str], source: str) -> dict[str, str]:
    found = {}
    for name, key in GGUF_IDS.items():
        number = metadata.get(GGML + key)
        if number is None:
            continue
        if not isinstance(number, int) or not 0 <= number < len(tokens):
            raise ToolmemError(f"{source}: {GGML}{key} is {number!r:.40}, and no token has that id")
        found[name] = tokens[number]
    return found


def _pretrained(
    definition: str,
    template: str | None,
    special: Mapping[str, str],
    vocab_size: int,
    source: str,
) -> HFTokenizer:
    found = HFTokenizer.pretrained(
        definition, template, special, vocab_size=vocab_size, source=source
    )
    if found.vocab_size > vocab_size:
        raise ToolmemError(
            f"{source}: its tokenizer has {found.vocab_size} ids, and its model {vocab_size}: they do not "
            "belong together"
        )
    return found


def _added(number: int, token: str, special: bool) -> dict[str, Any]:
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    return {"id": number, "content": token, **flags, "special": special}


def _begins_by(token: str, places: Mapping[str, int]) -> dict[str, Any]:
    piece = {"SpecialToken": {"id": token, "type_id": 0}}
    return {
        "type": "TemplateProcessing",
        "single": [piece, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [
            piece, {"Sequence": {"id": "A", "type_id": 0}},
            piece, {"Sequence": {"id": "B", "type_id": 1}},
        ],
        "special_tokens": {token: {"id": token, "ids": [places[token]], "tokens": [token]}},
    }  # fmt: skip


def _definition(**parts: Any) -> dict[str, Any]:
    return {
        "version": "1.0", "truncation": None, "padding": None, "added_tokens": [], "normalizer": None,
        "post_processor": None, **parts,
    }  # fmt: skip


def _bpe(vocabulary: Mapping[str, int], merges: list[list[str]], **options: Any) -> dict[str, Any]:
    return {
        "type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": "",
        "end_of_word_suffix": "", "fuse_unk": False, "byte_fallback": False, "ignore_merges": False,
        "vocab": dict(vocabulary), "merges": merges, **options,
    }  # fmt: skip


def byte_level_definition(
    vocabulary: Mapping[str, int], merges: list[list[str]], split: str | None, regex: bool = True
) -> dict[str, Any]:
    """A byte-level BPE as the content of a ``tokenizer.json``.

    Args:
        vocabulary: token -> id, each byte as GPT-2 spells it.
        merges: pairs, first ones first.
        split: a regular expression for the pieces; None for GPT-2's.
        regex: split at all.
    """
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
    before: dict[str, Any] = {**level, "use_regex": regex}
    if split is not None:
        pieces = {
            "type": "Split", "pattern": {"Regex": split}, "behavior": "Isolated", "invert": False
        }  # fmt: skip
        before = {"type": "Sequence", "pretokenizers": [pieces, {**level, "use_regex": False}]}
    decoder = {**level, "add_prefix_space": True, "use_regex": True}
    return _definition(pre_tokenizer=before, decoder=decoder, model=_bpe(vocabulary, merges))


def _byte_level(
    metadata: Mapping[str, Any], tokens: list[str], types: list[int], source: str
) -> dict[str, Any]:
    split = metadata.get(GGML + "pre", "default")
    if not isinstance(split, str) or split not in SPLITS:
        raise ToolmemError(
            f"{source}: its tokenizer splits text in the way {split!r:.40}, which is not known here "
            f"(known: {', '.join(SPLITS)})"
        )
    merges = metadata.get(GGML + "merges")
    if not isinstance(merges, list):
        raise ToolmemError(f"{source}: its tokenizer has no merges ({GGML}merges)")
    alphabet = set(BYTE_TO_CHAR)
    vocabulary: dict[str, int] = {}
    for i, (token, kind) in enumerate(zip(tokens, types, strict=True)):
        if kind == NORMAL and not alphabet.issuperset(token):
            token = "".join(BYTE_TO_CHAR[byte] for byte in token.encode())
        vocabulary.setdefault(token, i)
    pairs = [merge.split(" ") for merge in merges]
    return byte_level_definition(vocabulary, pairs, SPLITS[split])


def _sentencepiece(
    metadata: Mapping[str, Any], tokens: list[str], special: Mapping[str, str]
) -> dict[str, Any]:
    """Llama 2's: BPE by scores, spaces as ▁, unknown letters by their bytes."""
    vocabulary = {token: i for i, token in enumerate(tokens)}
    merges = metadata.get(GGML + "merges")
    if merges is not None:
        pairs = [merge.split(" ") for merge in merges]
    else:
        pairs = _merges_by_score(vocabulary, metadata.get(GGML + "scores") or [0.0] * len(tokens))
    metaspace = {
        "type": "Metaspace", "replacement": "▁", "prepend_scheme": "first", "split": False
    }  # fmt: skip
    decoder = {
        "type": "Sequence",
        "decoders": [
            {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
            {"type": "ByteFallback"},
            {"type": "Fuse"},
            {"type": "Strip", "content": " ", "start": 1, "stop": 0},
        ],
    }
    model = _bpe(vocabulary, pairs, fuse_unk=True, byte_fallback=True)
    return _definition(pre_tokenizer=metaspace, decoder=decoder, model=model)


def _merges_by_score(vocabulary: Mapping[str, int], scores: list[float]) -> list[list[str]]:
    """All ways to make a token of two, the best score first; of one score, short beginnings last."""
    found = []
    for token, i in vocabulary.items():
        ways = [(token[:cut], token[cut:]) for cut in range(1, len(token))]
        ways = [way for way in ways if way[0] in vocabulary and way[1] in vocabulary]
        ways.sort(key=lambda way: (vocabulary[way[0]], vocabulary[way[1]]))
        found += [(scores[i], *way) for way in ways]
    found.sort(key=lambda one: (one[0], len(one[1]), len(one[2])), reverse=True)
    return [[left, right] for _, left, right in found]


def tokenizer_from_folder(folder: Path, vocab_size: int) -> HFTokenizer | None:
    """The tokenizer of a Hugging Face folder; None where there is no ``tokenizer.json``.

    Args:
        folder: has ``tokenizer.json``, and perhaps ``tokenizer_config.json`` and ``chat_template.jinja``.
        vocab_size: ids that the model has.

    Raises:
        ToolmemError: for a file that cannot be read.
    """
    file = folder / "tokenizer.json"
    if not file.is_file():
        return None
    config = read_json(folder / "tokenizer_config.json")
    tokens = {**read_json(folder / "special_tokens_map.json"), **config}
    special = {}
    for name in CONFIG_KEYS:
        token = tokens.get(name)
        token = token.get("content") if isinstance(token, dict) else token
        if isinstance(token, str):
            special[name] = token
    template = config.get("chat_template")
    if isinstance(template, list):  # several, by name
        named = {one.get("name"): one.get("template") for one in template if isinstance(one, dict)}
        template = named.get("default")
    beside = folder / "chat_template.jinja"
    if beside.is_file():
        template = _read_text(beside)
    return _pretrained(
        _read_text(file),
        template if isinstance(template, str) else None,
        special,
        vocab_size,
        str(file),
    )


def read_json(path: Path) -> dict[str, Any]:
    """A file's JSON object; an empty one where there is no file.

    Raises:
        ToolmemError: when it is no JSON object.
    """
    if not path.is_file():
        return {}
    try:
        found = json.loads(_read_text(path))
    except ValueError as error:
        raise ToolmemError(f"{path} is no JSON ({error})") from error
    if not isinstance(found, dict):
        raise ToolmemError(f"{path} holds a {type(found).__name__}, where an object is wanted")
    return found


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ToolmemError(f"cannot read {path}: {error}") from error


# Writing


def definition_of(tokenizer: Tokenizer) -> dict[str, Any] | None:
    """A tokenizer as the content of a ``tokenizer.json``, role tokens in it; None for symbols' ."""
    if isinstance(tokenizer, ByteTokenizer):
        letters = {char: byte for byte, char in enumerate(BYTE_TO_CHAR)}
        definition = byte_level_definition(letters, [], None, regex=False)
        roles = {tokenizer.role_ids[role]: token for role, token in ROLE_TOKENS.items()}
        definition["model"]["vocab"] |= {token: i for i, token in roles.items()}
        definition["added_tokens"] = [_added(i, token, True) for i, token in roles.items()]
        return definition
    if not isinstance(tokenizer, HFTokenizer):
        return None
    definition = json.loads(tokenizer.spec()["json"])
    known = {one["id"] for one in definition.get("added_tokens") or []}
    for role, token in tokenizer.role_tokens.items():
        if tokenizer.role_ids[role] not in known:
            definition["added_tokens"].append(_added(tokenizer.role_ids[role], token, True))
    return definition


def special_tokens_of(tokenizer: Tokenizer) -> dict[str, str]:
    """``bos_token``, ``eos_token`` and the like, as text."""
    if isinstance(tokenizer, HFTokenizer) and tokenizer.chat is not None:
        return dict(tokenizer.chat["special_tokens"])
    end = tokenizer.role_ids.get("end")
    return {} if end is None else {"eos_token": tokenizer.decode([end])}


def template_of(tokenizer: Tokenizer) -> str | None:
    """The chat template; of our own models one that writes their role tokens."""
    if isinstance(tokenizer, HFTokenizer) and tokenizer.chat is not None:
        template = tokenizer.chat["template"]
        return template if isinstance(template, str) else None
    if not tokenizer.role_ids.keys() >= ROLE_TOKENS.keys():
        return None
    tokens = {role: tokenizer.decode([tokenizer.role_ids[role]]) for role in ROLE_TOKENS}
    quoted = {role: json.dumps(token) for role, token in tokens.items()}
    return (
        "{% for message in messages %}"
        "{% if message['role'] == 'user' %}"
        "{% if not loop.first %}{{ " + quoted["end"] + " }}{% endif %}"
        "{{ " + quoted["user"] + " }}"
        "{% elif message['role'] == 'assistant' %}{{ " + quoted["assistant"] + " }}"
        "{% else %}{{ " + quoted["database"] + " }}{% endif %}"
        "{{ message['content'] }}"
        "{% endfor %}"
        "{% if add_generation_prompt %}{{ " + quoted["assistant"] + " }}"
        "{% else %}{{ " + quoted["end"] + " }}{% endif %}"
    )


def tokenizer_files(tokenizer: Tokenizer, max_length: int) -> dict[str, str]:
    """Name -> content of the files that transformers reads a tokenizer from; none for symbols.

    Args:
        tokenizer: any.
        max_length: tokens that its model takes.
    """
    definition = definition_of(tokenizer)
    if definition is None:
        return {}
    special, template = special_tokens_of(tokenizer), template_of(tokenizer)
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        "model_max_length": max_length,
        **special,
        **({} if template is None else {"chat_template": template}),
    }
    files = {
        "tokenizer.json": json.dumps(definition, ensure_ascii=False),
        "tokenizer_config.json": json.dumps(config, indent=2, ensure_ascii=False),
        "special_tokens_map.json": json.dumps(special, indent=2, ensure_ascii=False),
    }
    return files if template is None else {**files, "chat_template.jinja": template}


def gguf_metadata_of(tokenizer: Tokenizer, vocab_size: int, split: str | None) -> dict[str, Any]:
    """A byte-level tokenizer as a GGUF file's metadata: key -> value.

    Args:
        tokenizer: any.
        vocab_size: ids that the model has.
        split: ``tokenizer.ggml.pre`` of the file that it came from, if it came from one.

    Raises:
        ToolmemError: for one that llama.cpp's byte-level BPE is not.
    """
    definition = definition_of(tokenizer)
    model = (definition or {}).get("model") or {}
    vocabulary = model.get("vocab")
    name = _name_of_split((definition or {}).get("pre_tokenizer"), split)
    if definition is None or model.get("type") != "BPE" or name is None or not vocabulary:
        raise ToolmemError(
            "only byte-level BPE tokenizers that split text in a known way are written to GGUF: write a "
            "folder instead"
        )
    tokens = [f"[PAD{i}]" for i in range(vocab_size)]
    types = [UNUSED] * vocab_size
    for token, i in vocabulary.items():
        tokens[i], types[i] = token, NORMAL
    for one in definition.get("added_tokens") or []:
        tokens[one["id"]] = one["content"]
        types[one["id"]] = CONTROL if one.get("special") else USER_DEFINED
    merges = [" ".join(m) if isinstance(m, list) else m for m in model.get("merges") or []]
    special, places = special_tokens_of(tokenizer), {token: i for i, token in enumerate(tokens)}
    found: dict[str, Any] = {
        GGML + "model": "gpt2",
        GGML + "pre": name,
        GGML + "tokens": tokens,
        GGML + "token_type": types,
        GGML + "merges": merges,
        GGML + "add_bos_token": bool(getattr(tokenizer, "prefix_ids", [])),
    }
    for key, number in GGUF_IDS.items():
        if special.get(key) in places:
            found[GGML + number] = places[special[key]]
    if template := template_of(tokenizer):
        found["tokenizer.chat_template"] = template
    return found


def _name_of_split(before: Any, known: str | None) -> str | None:
    """llama.cpp's name of a way to split text; None where it has none."""
    if not isinstance(before, dict):
        return None
    parts = before["pretokenizers"] if before.get("type") == "Sequence" else [before]
    kinds = [part.get("type") for part in parts]
    level = parts[-1]
    if kinds[-1] != "ByteLevel" or level.get("add_prefix_space"):
        return None
    split: str | None = None
    if kinds == ["Digits", "ByteLevel"] and parts[0].get("individual_digits"):
        return "smollm"
    if kinds == ["Split", "ByteLevel"]:
        split = (parts[0].get("pattern") or {}).get("Regex")
        if split is None:
            return None
    elif kinds != ["ByteLevel"] or not level.get("use_regex", True):
        return None
    if known in SPLITS and SPLITS[str(known)] == split:
        return known
    names = [name for name, one in SPLITS.items() if one == split and name != "default"]
    return names[0] if names else None
