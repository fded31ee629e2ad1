"""Make what ``examples/`` ships: a small Llama, its tokenizer, and a small real task.

The text is what every Python has: the standard library. The model is trained on its docstrings
alone; the task is to write a function's code from its docstring, split by file, and no docstring
of a file whose functions are in the validation or test split is trained on.

    python scripts/make_example_model.py            # 15 minutes on 2 cores with OpenBLAS
"""

from __future__ import annotations

import argparse
import ast
import json
import math
import random
import sysconfig
import textwrap
import time
import warnings
from collections.abc import Iterable, Iterator, Mapping
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
from mlx.utils import tree_flatten
from mlx_lm.models.llama import Model, ModelArgs
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

END = "<|endoftext|>"
LEFT_OUT = {"site-packages", "dist-packages", "test", "tests", "idlelib", "lib2to3", "ensurepip"}
LEFT_OUT |= {"pydoc_data", "encodings", "turtledemo", "__pycache__", "idle_test"}
CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 2048,
    "hidden_size": 128,
    "intermediate_size": 352,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "hidden_act": "silu",
    "max_position_embeddings": 1024,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "attention_bias": False,
    "mlp_bias": False,
    "tie_word_embeddings": True,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "pad_token_id": 0,
    "torch_dtype": "float32",
}
ROWS = {"valid": 64, "test": 64, "train": 600}
MAX_TOKENS = 256


def sources() -> Iterator[tuple[str, str, ast.Module]]:
    """(path below the standard library, source, syntax tree) of every file, in sorted order."""
    root = Path(sysconfig.get_paths()["stdlib"])
    paths = {path.relative_to(root): path for path in root.rglob("*.py")}
    return parsed(path for relative, path in paths.items() if not LEFT_OUT & set(relative.parts))


def parsed(paths: Iterable[Path]) -> Iterator[tuple[str, str, ast.Module]]:
    """(path below the standard library, source, syntax tree) of these files, in sorted order.

    A file that is not Python, or not in UTF-8, is passed over.
    """
    for path in sorted(paths):
        try:
            source = path.read_text(encoding="utf-8")
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # invalid escapes in old modules
                tree = ast.parse(source)
        except (SyntaxError, UnicodeDecodeError):
            continue
        yield str(path.relative_to(sysconfig.get_paths()["stdlib"])), source, tree


def docstrings(tree: ast.Module) -> list[str]:
    """The docstrings of a module, its classes and functions."""
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    found = (ast.get_docstring(node) for node in ast.walk(tree) if isinstance(node, kinds))
    return [text.strip() for text in found if text and len(text.strip()) >= 20]


def functions(source: str, tree: ast.Module) -> list[dict[str, str]]:
    """Rows of the task: a function's docstring as prompt, its source without it as completion."""
    rows = []
    lines = source.splitlines()
    for node in ast.walk(tree):
        if not isinstance(node, ast.FunctionDef) or len(node.body) < 2 or node.decorator_list:
            continue
        text = ast.get_docstring(node)
        if not text or not 20 <= len(text) <= 400:
            continue
        first = node.body[0]
        kept = lines[node.lineno - 1 : first.lineno - 1] + lines[first.end_lineno : node.end_lineno]
        code = textwrap.dedent("\n".join(kept)).strip() + "\n"
        if not 40 <= len(code) <= 500 or not _parses(code):
            continue
        rows.append({"prompt": f'"""{text}"""\n', "completion": code})
    return rows


def _parses(code: str) -> bool:
    try:
        ast.parse(code)
        return True
    except SyntaxError:  # the docstring shared a line with something else
        return False


def collect(seed: int) -> tuple[list[str], dict[str, list[dict[str, str]]]]:
    """The docstrings to pretrain on, and candidate rows per split, no file in two splits."""
    texts: dict[str, list[str]] = {}
    rows: dict[str, list[dict[str, str]]] = {}
    seen: set[str] = set()
    for path, source, tree in sources():
        texts[path] = docstrings(tree)
        rows[path] = [row for row in functions(source, tree) if row["completion"] not in seen]
        seen |= {row["completion"] for row in rows[path]}
    splits, held_out = split_by_file(rows, ROWS, seed)
    pretraining = [text for path in sorted(texts) if path not in held_out for text in texts[path]]
    return list(dict.fromkeys(pretraining)), splits


def split_by_file(
    rows: Mapping[str, list[dict[str, str]]], numbers: Mapping[str, int], seed: int
) -> tuple[dict[str, list[dict[str, str]]], set[str]]:
    """Candidate rows by split, no file in two splits, and the files that are not trained on.

    Args:
        rows: by file.
        numbers: how many rows each split gets in the end, the training split last; of the others
            there are some more to choose from, since not all are short enough.
        seed: of the files' order.
    """
    files = sorted(path for path in rows if rows[path])
    random.Random(seed).shuffle(files)
    splits: dict[str, list[dict[str, str]]] = {split: [] for split in numbers}
    held_out = set()
    for path in files:
        split = next((s for s in numbers if len(splits[s]) < 1.3 * numbers[s]), "train")
        splits[split] += rows[path]
        held_out |= {path} if split != "train" else set()
    return splits, held_out


def train_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer that gives back every text exactly."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=CONFIG["vocab_size"],
        special_tokens=[END],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=END,
        pad_token=END,
        clean_up_tokenization_spaces=False,
    )


def pretrain(
    model: Model, tokens: np.ndarray, held_out: np.ndarray, steps: int, seed: int
) -> tuple[float, float]:
    """Train on windows of 257 tokens, 16 at a time; returns the held-out loss before and after."""
    window, batch, warmup, peak = 256, 16, max(1, steps // 15), 3e-3
    random_state = np.random.default_rng(seed)
    schedule = optim.join_schedules(
        [
            optim.linear_schedule(peak / warmup, peak, warmup),
            optim.cosine_decay(peak, steps - warmup, peak / 20),
        ],
        [warmup],
    )
    optimizer = optim.AdamW(schedule, betas=[0.9, 0.95], weight_decay=0.1, bias_correction=True)

    def loss_of(model: Model, rows: mx.array) -> mx.array:
        return nn.losses.cross_entropy(model(rows[:, :-1]), rows[:, 1:], reduction="mean")

    gradient = nn.value_and_grad(model, loss_of)
    state = [model.state, optimizer.state]

    @partial(mx.compile, inputs=state, outputs=state)
    def step(rows: mx.array) -> mx.array:
        loss, gradients = gradient(model, rows)
        gradients, _ = optim.clip_grad_norm(gradients, 1.0)
        optimizer.update(model, gradients)
        return loss

    def held_out_loss() -> float:
        count = len(held_out) // (window + 1)
        rows = mx.array(held_out[: count * (window + 1)].reshape(count, window + 1))
        losses = [loss_of(model, rows[i : i + batch]).item() for i in range(0, count, batch)]
        return sum(losses) / len(losses)

    before, start = held_out_loss(), time.perf_counter()
    for done in range(1, steps + 1):
        offsets = random_state.integers(0, len(tokens) - window - 1, batch)
        loss = step(mx.array(np.stack([tokens[o : o + window + 1] for o in offsets])))
        mx.eval(loss, state)
        if done % 100 == 0 or done == steps:
            seconds = time.perf_counter() - start
            print(
                f"step {done}/{steps}: loss {loss.item():.3f}, held out {held_out_loss():.3f}, "
                f"{seconds:.0f} s",
                flush=True,
            )
    return before, held_out_loss()


def new_model(config: dict[str, Any], seed: int) -> Model:
    """A random Llama as transformers initialises one: N(0, 0.02²), so that tied logits start small.

    Args:
        config: the contents of ``config.json``.
        seed: of the weights.
    """
    mx.random.seed(seed)
    model = Model(ModelArgs.from_dict(config))
    small = [
        (name, 0.02 * mx.random.normal(value.shape))
        for name, value in tree_flatten(model.parameters())
        if value.ndim == 2
    ]
    model.load_weights(small, strict=False)
    return model


def save_model(path: Path, model: Model, config: dict[str, Any]) -> None:
    """Write weights and configuration as transformers reads them."""
    weights = dict(tree_flatten(model.parameters()))
    mx.save_safetensors(str(path / "model.safetensors"), weights, {"format": "pt"})
    (path / "config.json").write_text(json.dumps(config, indent=1) + "\n")
    generation = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
    (path / "generation_config.json").write_text(json.dumps(generation, indent=1) + "\n")


def write_split(
    path: Path,
    rows: list[dict[str, str]],
    number: int,
    tokenizer: PreTrainedTokenizerFast,
    seed: int,
) -> None:
    """Write ``number`` rows, drawn at random from those that are short enough, none twice."""
    unique = {row["completion"]: row for row in rows}.values()
    fitting = [r for r in unique if len(tokenizer.encode("".join(r.values()))) < MAX_TOKENS]
    random.Random(seed).shuffle(fitting)
    write_jsonl(path, fitting[:number])
    print(f"{path.stem}: {min(len(fitting), number)} of {len(fitting)} rows")


def token_windows(
    texts: list[str], tokenizer: PreTrainedTokenizerFast, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """The tokens of all texts, shuffled, each text ended: to train on, and a fiftieth held out."""
    random.Random(seed).shuffle(texts)
    encoded = [[*tokenizer.encode(text), tokenizer.eos_token_id] for text in texts]
    cut = len(encoded) // 50
    held_out, tokens = (np.array([*chain(*part)]) for part in (encoded[:cut], encoded[cut:]))
    print(f"{len(tokens):,} tokens to train on, {len(held_out):,} held out")
    return tokens, held_out


def write_jsonl(path: Path, rows: list[dict[str, str]]) -> None:
    """One JSON object a line."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def make(
    output: Path,
    config: dict[str, Any],
    tokenizer: PreTrainedTokenizerFast,
    texts: list[str],
    splits: dict[str, list[dict[str, str]]],
    numbers: dict[str, int],
    steps: int,
    seed: int,
) -> None:
    """Write the task's splits, train a model on the texts, and write it beside them.

    Args:
        output: gets ``model/`` and ``data/``.
        config: the model's ``config.json``.
        tokenizer: the model's.
        texts: to train on; they are shuffled in place.
        splits: candidate rows by split.
        numbers: how many rows each split gets.
        steps: of training.
        seed: of rows, order and weights.
    """
    model_path, data_path = output / "model", output / "data"
    for path in (model_path, data_path):
        path.mkdir(parents=True, exist_ok=True)
    tokenizer.save_pretrained(model_path)
    for split, rows in splits.items():
        write_split(data_path / f"{split}.jsonl", rows, numbers[split], tokenizer, seed)
    tokens, held_out = token_windows(texts, tokenizer, seed)
    model = new_model(config, seed)
    before, after = pretrain(model, tokens, held_out, steps, seed)
    uniform = math.log(len(tokenizer))
    print(f"held-out loss {before:.3f} -> {after:.3f} (ln {len(tokenizer)} = {uniform:.3f})")
    save_model(model_path, model, config)


def main() -> None:
    """Collect, train, write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path("examples"))
    parser.add_argument("--steps", type=int, default=900)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    texts, splits = collect(args.seed)
    print(f"{len(texts)} docstrings, {sum(map(len, texts)):,} characters")
    # The tokenizer also sees code, so that the task's sequences stay short; the model does not.
    code = [row["completion"] for row in splits["train"]]
    tokenizer = train_tokenizer(texts + code)
    make(args.output, CONFIG, tokenizer, texts, splits, ROWS, args.steps, args.seed)


if __name__ == "__main__":
    main()
