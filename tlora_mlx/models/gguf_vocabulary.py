"""A tokenizer as GGUF metadata: tokens, merges, special tokens and the chat template.

llama.cpp knows two kinds that matter here: byte-level BPE, whose rule for splitting text it must
know by name, and SentencePiece's BPE with bytes as fallback, which merges by the tokens' scores
(ggml-org/llama.cpp, ``src/llama-vocab.cpp`` and ``conversion/base.py``, ``get_vocab_base``, as of
libllama 0.4.0).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from tlora_mlx.errors import UserError
from tlora_mlx.models.llama_cpp import WAY_ROUND
from tlora_mlx.storage.gguf_file import gguf_package

if TYPE_CHECKING:
    from gguf import GGUFWriter
    from mlx_lm.tokenizer_utils import TokenizerWrapper

_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_CASED = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"%s|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*%s"
)
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_REST_WITH_SLASH = r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"

# llama.cpp's name of a rule for splitting text, by the regular expression of tokenizer.json and
# whether merges are ignored for words that are tokens (``llama_vocab::impl::load`` and
# ``llm_tokenizer_bpe``).
_SPLITS = {
    (_CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}" + _REST, True): "llama-bpe",
    (_CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}" + _REST, False): "dbrx",
    (_CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}" + _REST, False): "qwen2",
    (_CASED % ("", "") + r"|\p{N}" + _REST_WITH_SLASH, True): "tekken",
    (_CASED % ((_CONTRACTIONS + "?",) * 2) + r"|\p{N}{1,3}" + _REST_WITH_SLASH, False): "gpt-4o",
}


def add_vocabulary(
    writer: GGUFWriter, tokenizer: TokenizerWrapper, config: Mapping[str, Any], size: int
) -> None:
    """Add a tokenizer to a GGUF file.

    Args:
        writer: the file.
        tokenizer: mlx-lm's wrapper, with the model's end tokens.
        config: the model's configuration, for special tokens that the tokenizer does not name.
        size: the number of embeddings; tokens without a text fill the rest.

    Raises:
        UserError: llama.cpp has no tokenizer of this kind.
    """
    inner = tokenizer._tokenizer
    backend = getattr(inner, "backend_tokenizer", None)
    if backend is None:
        raise UserError(f"the tokenizer has no tokenizer.json; {WAY_ROUND}")
    stored = json.loads(backend.to_str())
    model = stored["model"]
    if model.get("type") != "BPE":
        raise UserError(
            f"a tokenizer of type {model.get('type')} cannot be written as GGUF; {WAY_ROUND}"
        )
    merges = [pair.split(" ") if isinstance(pair, str) else pair for pair in model["merges"]]
    texts, types = _tokens(stored, set(tokenizer.eos_token_ids), size)
    if model.get("byte_fallback"):
        writer.add_tokenizer_model("llama")
        writer.add_tokenizer_pre("default")
        writer.add_token_scores(_scores(texts, merges))
        writer.add_add_space_prefix(_prepends_space(stored))
    else:
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(_split_rule(stored))
        writer.add_token_merges([" ".join(p.replace(" ", "Ġ") for p in pair) for pair in merges])
    writer.add_token_list(texts)
    writer.add_token_types(types)
    _add_special_tokens(writer, tokenizer, config)
    template = inner.chat_template
    if isinstance(template, dict):
        template = template.get("default")
    if template:
        writer.add_chat_template(template)


def _tokens(stored: dict[str, Any], ends: set[int], size: int) -> tuple[list[str], list[int]]:
    """The text and type of each token id."""
    kinds = gguf_package().TokenType
    texts, types = [f"[PAD{i}]" for i in range(size)], [int(kinds.UNUSED)] * size
    model = stored["model"]
    vocabulary = {id: text for text, id in model["vocab"].items()}
    added = {token["id"]: token for token in stored["added_tokens"]}
    if beyond := [id for id in vocabulary.keys() | added.keys() if id >= size]:
        raise UserError(f"the tokenizer has the token id {min(beyond)}, the model only {size} ids")
    for id, text in vocabulary.items():
        texts[id], types[id] = text, int(kinds.NORMAL)
        if model.get("byte_fallback") and len(text) == 6 and text.startswith("<0x"):
            types[id] = int(kinds.BYTE)
        if text == model.get("unk_token"):
            types[id] = int(kinds.UNKNOWN)
    for id, token in added.items():
        special = token["special"] or id in ends
        if types[id] != kinds.UNKNOWN:
            types[id] = int(kinds.CONTROL if special else kinds.USER_DEFINED)
        # llama.cpp looks for them in the text as it is, not in SentencePiece's form.
        texts[id] = token["content"] if special else token["content"].replace("▁", " ")
    return texts, types


def _scores(texts: list[str], merges: list[list[str]]) -> list[float]:
    """Scores with which SentencePiece's BPE merges in the order of ``merges``."""
    scores: dict[str, float] = {}
    for rank, pair in enumerate(merges):
        scores.setdefault("".join(pair), -float(rank))
    lowest = -float(len(merges))
    return [scores.get(text, lowest) for text in texts]


def _prepends_space(stored: dict[str, Any]) -> bool:
    """Whether text begins with SentencePiece's mark of a space that it does not have."""
    normalizer = stored.get("normalizer") or {}
    steps = normalizer.get("normalizers", [normalizer])
    pre = stored.get("pre_tokenizer") or {}
    spaces = pre.get("type") == "Metaspace" and pre.get("prepend_scheme", "always") != "never"
    return spaces or any(step.get("type") == "Prepend" for step in steps)


def _split_rule(stored: dict[str, Any]) -> str:
    """llama.cpp's name of the rule by which text is split before merging.

    Raises:
        UserError: it is not known.
    """
    pre = stored.get("pre_tokenizer") or {}
    steps = pre.get("pretokenizers", [pre])
    last, first = steps[-1], steps[:-1]
    if last.get("type") == "ByteLevel" and not last.get("add_prefix_space"):
        own = last.get("use_regex", True)
        if not first and own:
            return "gpt-2"
        if len(first) == 1 and own and first[0] == {"type": "Digits", "individual_digits": True}:
            return "smollm"
        if len(first) == 1 and not own and first[0].get("type") == "Split":
            pattern = first[0].get("pattern", {}).get("Regex")
            ignoring = bool(stored["model"].get("ignore_merges"))
            if rule := _SPLITS.get((pattern, ignoring)):
                return rule
    raise UserError(
        "llama.cpp's name for the way in which the tokenizer splits text is not known here "
        f"({json.dumps(pre)[:200]}); {WAY_ROUND}"
    )


def _add_special_tokens(
    writer: GGUFWriter, tokenizer: TokenizerWrapper, config: Mapping[str, Any]
) -> None:
    inner = tokenizer._tokenizer
    for name in ("bos", "eos", "unk", "pad"):
        id = getattr(inner, f"{name}_token_id", None)
        id = config.get(f"{name}_token_id") if id is None else id
        if isinstance(id, int):
            getattr(writer, f"add_{name}_token_id")(id)
    others = sorted(set(tokenizer.eos_token_ids) - {inner.eos_token_id})
    if others:
        template = str(inner.chat_template)
        used = [id for id in others if str(inner.convert_ids_to_tokens(id)) in template]
        writer.add_eot_token_id((used or others)[0])
    ids = inner("a").input_ids
    writer.add_add_bos_token(ids[0] == inner.bos_token_id)
    writer.add_add_eos_token(ids[-1] == inner.eos_token_id)
