"""llama.cpp itself: the prebuilt library through ctypes, and its own converters."""

import ctypes as c
import os
import subprocess
import sys
from functools import cache
from pathlib import Path

import numpy as np
import pytest

from helpers.paths import ROOT

sys.path.insert(0, str(ROOT / "scripts"))
from get_llama_cpp import CannotFetchError, llama_cpp_directory

# What takes minutes in all; CI sets the variable.
rarely = pytest.mark.skipif(
    not os.environ.get("TLORA_LLAMA_CPP"), reason="set TLORA_LLAMA_CPP=1 to try all in llama.cpp"
)


class ModelParameters(c.Structure):
    """Of ``llama_model_params`` (include/llama.h), the fields that are used; the rest is opaque."""

    _fields_ = [
        ("devices", c.c_void_p),
        ("overrides", c.c_void_p),
        ("n_gpu_layers", c.c_int32),
        ("rest", c.c_char * 500),
    ]


class ContextParameters(c.Structure):
    """Of ``llama_context_params``, as of libllama 0.4.0, likewise."""

    _fields_ = [
        ("n_ctx", c.c_uint32),
        ("n_batch", c.c_uint32),
        ("n_ubatch", c.c_uint32),
        ("n_seq_max", c.c_uint32),
        ("n_rs_seq", c.c_uint32),
        ("n_outputs_max", c.c_uint32),
        ("n_outputs_max_per_seq", c.c_uint32),
        ("n_threads", c.c_int32),
        ("n_threads_batch", c.c_int32),
        ("ctx_type", c.c_int32),
        ("rope_scaling_type", c.c_int32),
        ("pooling_type", c.c_int32),
        ("attention_type", c.c_int32),
        ("flash_attn_type", c.c_int32),
        ("rope", c.c_float * 6),
        ("yarn_orig_ctx", c.c_uint32),
        ("defrag_thold", c.c_float),
        ("cb_eval", c.c_void_p),
        ("cb_eval_user_data", c.c_void_p),
        ("type_k", c.c_int32),
        ("type_v", c.c_int32),
        ("rest", c.c_char * 500),
    ]


class Batch(c.Structure):
    """``llama_batch``."""

    _fields_ = [
        ("n_tokens", c.c_int32),
        ("token", c.POINTER(c.c_int32)),
        ("embd", c.POINTER(c.c_float)),
        ("pos", c.POINTER(c.c_int32)),
        ("n_seq_id", c.POINTER(c.c_int32)),
        ("seq_id", c.POINTER(c.POINTER(c.c_int32))),
        ("logits", c.POINTER(c.c_int8)),
    ]


RETURNS = {
    "llama_model_default_params": ModelParameters,
    "llama_context_default_params": ContextParameters,
    "llama_batch_init": Batch,
    "llama_model_load_from_file": c.c_void_p,
    "llama_model_get_vocab": c.c_void_p,
    "llama_model_chat_template": c.c_char_p,
    "llama_init_from_model": c.c_void_p,
    "llama_adapter_lora_init": c.c_void_p,
    "llama_get_logits": c.POINTER(c.c_float),
    "llama_vocab_is_eog": c.c_bool,
}


@cache
def directory():
    """Where llama.cpp is; skips the test where it cannot be had."""
    try:
        return llama_cpp_directory()
    except CannotFetchError as error:
        return pytest.skip(str(error))


@cache
def library():
    lib = directory() / "lib"
    ggml = c.CDLL(str(next(lib.glob("libggml.v*.so"))), mode=c.RTLD_GLOBAL)
    llama = c.CDLL(str(next(lib.glob("libllama.v*.so"))), mode=c.RTLD_GLOBAL)
    ggml.ggml_backend_load_all_from_path(str(lib).encode())
    for name, type in RETURNS.items():
        getattr(llama, name).restype = type
    llama.llama_backend_init()
    return llama


class LlamaCpp:
    """A GGUF model in llama.cpp, with a LoRA adapter or without."""

    def __init__(self, path, adapter=None):
        lib = library()
        parameters = lib.llama_model_default_params()
        parameters.n_gpu_layers = 0
        self.model = c.c_void_p(lib.llama_model_load_from_file(str(path).encode(), parameters))
        assert self.model, f"llama.cpp does not load {path}"
        self.vocabulary = c.c_void_p(lib.llama_model_get_vocab(self.model))
        self.size = lib.llama_vocab_n_tokens(self.vocabulary)
        self.adapter = None
        if adapter:
            loaded = lib.llama_adapter_lora_init(self.model, str(adapter).encode())
            assert loaded, f"llama.cpp does not load {adapter}"
            self.adapter = c.c_void_p(loaded)

    def logits(self, tokens):
        """(len(tokens), vocabulary) float32."""
        lib, count = library(), len(tokens)
        parameters = lib.llama_context_default_params()
        assert (parameters.n_ctx, parameters.n_batch, parameters.type_k) == (512, 2048, 1)
        parameters.n_ctx = parameters.n_batch = parameters.n_ubatch = max(64, count)
        parameters.n_threads = parameters.n_threads_batch = 1  # more would spin, waiting
        parameters.type_k = parameters.type_v = parameters.flash_attn_type = 0  # float32
        context = c.c_void_p(lib.llama_init_from_model(self.model, parameters))
        assert context
        if self.adapter:
            one, scale = (c.c_void_p * 1)(self.adapter), (c.c_float * 1)(1.0)
            assert lib.llama_set_adapters_lora(context, one, c.c_size_t(1), scale) == 0
        batch = lib.llama_batch_init(count, 0, 1)
        batch.n_tokens = count
        for i, token in enumerate(tokens):
            batch.token[i], batch.pos[i], batch.n_seq_id[i] = token, i, 1
            batch.seq_id[i][0], batch.logits[i] = 0, 1
        assert lib.llama_decode(context, batch) == 0
        found = np.ctypeslib.as_array(lib.llama_get_logits(context), (count, self.size)).copy()
        lib.llama_batch_free(batch)
        lib.llama_free(context)
        return found

    def greedy(self, tokens, count):
        """The next tokens, up to one that ends generation."""
        new = []
        while len(new) < count:
            new.append(int(self.logits([*tokens, *new])[-1].argmax()))
            if library().llama_vocab_is_eog(self.vocabulary, new[-1]):
                break
        return new

    def tokens(self, text, special=True):
        """The text's tokens, with what the model adds in front."""
        data, out = text.encode(), (c.c_int32 * (len(text.encode()) + 8))()
        count = library().llama_tokenize(
            self.vocabulary, data, len(data), out, len(out), c.c_bool(True), c.c_bool(special)
        )
        return list(out[:count])

    def template(self):
        text = library().llama_model_chat_template(self.model, None)
        return text and text.decode()


def convert(kind, *arguments):
    """llama.cpp's own converter: ``base`` MODEL OUT, or ``lora`` ADAPTER BASE OUT."""
    script = Path(__file__).with_name("run_converter.py")
    command = [sys.executable, script, directory() / "converters", kind, *arguments]
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
