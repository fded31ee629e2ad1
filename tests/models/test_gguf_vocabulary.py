"""Tokenizers in GGUF files: llama.cpp splits texts into the tokenizer's own tokens."""

import json
import shutil

import pytest
from helpers.adapters import make_run
from helpers.llama_cpp import LlamaCpp, library, rarely
from helpers.models import ROWS, save_model
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, trainers
from tokenizers import pre_tokenizers as pre
from transformers import PreTrainedTokenizerFast

from tlora_mlx import UserError, export_gguf, read_run
from tlora_mlx.models.gguf_vocabulary import _SPLITS

TEXTS = [
    "def add():\n    return 1234 + 56\n",
    "I'm sure WE'LL take  three   spaces,\n\n two\tlines \r\n and Größe, naïve 東京 🙂.",
    "<bos>hello<turn> world<eos> again<plain>x",
    " leading and trailing ",
    "x" * 20 + "12345678",
]
TEMPLATE = "{% for m in messages %}{{ m.role }}: {{ m.content }}<turn>{% endfor %}"


def byte_level(*first, own=True):
    return pre.Sequence([*first, pre.ByteLevel(add_prefix_space=False, use_regex=own)])


def by_regex(name):
    pattern, ignore_merges = next(key for key, value in _SPLITS.items() if value == name)
    return byte_level(pre.Split(Regex(pattern), "isolated"), own=False), ignore_merges


RULES = {
    "gpt-2": (pre.ByteLevel(add_prefix_space=False), False),
    "smollm": (byte_level(pre.Digits(individual_digits=True)), False),
    **{name: by_regex(name) for name in _SPLITS.values()},
}
OFTEN = ("smollm", "llama-bpe", "qwen2")


def finished(tokenizer):
    tokenizer.add_special_tokens(["<bos>", "<turn>", "<eos>"])
    tokenizer.add_tokens([AddedToken("<plain>", normalized=False)])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<bos>", eos_token="<turn>", pad_token="<eos>"
    )
    fast.chat_template = TEMPLATE
    return fast


def bpe(rule):
    pre_tokenizer, ignore_merges = RULES[rule]
    tokenizer = Tokenizer(models.BPE(ignore_merges=ignore_merges))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizer, decoders.ByteLevel()
    alphabet = pre.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=290, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(TEXTS * 3 + [row["completion"] for row in ROWS], trainer)
    return finished(tokenizer)


def sentencepiece(prepends):
    """As transformers converts Llama 2's (with a space in front) and Gemma's (without)."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    steps = [normalizers.Prepend("▁")] if prepends else []
    tokenizer.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback()])
    special = ["<unk>", *(f"<0x{i:02X}>" for i in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=294, special_tokens=special, show_progress=False)
    tokenizer.train_from_iterator(["return add three spaces"], trainer)
    fast = finished(tokenizer)
    stored = fast.backend_tokenizer.to_str()
    # The trainer declares the bytes to be special tokens; SentencePiece's are not.
    stored = json.loads(stored)
    stored["added_tokens"] = [t for t in stored["added_tokens"] if "<0x" not in t["content"]]
    fast._tokenizer = Tokenizer.from_str(json.dumps(stored))
    return fast


@pytest.fixture(scope="module")
def model_path(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("model") / "model", vocab_size=320)


def in_llama_cpp(tokenizer, model_path, path):
    shutil.copytree(model_path, path / "model")
    for file in (path / "model").glob("*token*"):
        file.unlink()
    tokenizer.save_pretrained(path / "model")
    run = read_run(make_run(path / "run", path / "model", lambda i, shape: 1))
    export_gguf(run, path / "gguf", outtype="f32")
    return LlamaCpp(path / "gguf" / "model.gguf")


@pytest.mark.parametrize(
    "kind",
    [
        *(pytest.param(rule, marks=[] if rule in OFTEN else rarely) for rule in RULES),
        "llama",
        "gemma",
    ],
)
def test_the_same_tokens(kind, model_path, tmp_path):
    tokenizer = bpe(kind) if kind in RULES else sentencepiece(kind == "llama")
    read = in_llama_cpp(tokenizer, model_path, tmp_path)
    # llama.cpp puts Llama 2's space in front after special tokens, too; transformers does not.
    texts = [t for t in TEXTS if kind != "llama" or "<bos>" not in t]
    for text in texts:
        assert read.tokens(text) == tokenizer(text).input_ids, text
    assert read.template() == TEMPLATE
    ends = [id for id in range(read.size) if library().llama_vocab_is_eog(read.vocabulary, id)]
    assert tokenizer.eos_token_id in ends


def test_an_unknown_rule_is_refused(model_path, tmp_path):
    tokenizer = bpe("gpt-2")
    split = byte_level(pre.Split(Regex("[a-m]+"), "isolated"), own=False)
    tokenizer.backend_tokenizer.pre_tokenizer = split
    with pytest.raises(UserError, match=r"splits text is not known.*convert_hf_to_gguf\.py"):
        in_llama_cpp(tokenizer, model_path, tmp_path)
    assert not (tmp_path / "gguf").exists()
