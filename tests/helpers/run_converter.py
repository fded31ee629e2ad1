"""llama.cpp's converters as a process: CONVERTERS base MODEL OUT | lora ADAPTER BASE OUT.

They know tokenizers by a hash; those of the tests are declared to be GPT-2's kind, which they are.
"""

import runpy
import sys

converters, kind, source, *rest = sys.argv[1:]
sys.path[:0] = [converters, f"{converters}/gguf-py"]

from conversion.base import TextModel  # noqa: E402

TextModel.get_vocab_base_pre = lambda self, tokenizer: "gpt-2"
if kind == "lora":
    base, out = rest
    sys.argv = ["convert_lora_to_gguf.py", source, "--base", base]
else:
    (out,) = rest
    sys.argv = ["convert_hf_to_gguf.py", source]
sys.argv += ["--outtype", "f32", "--outfile", out]
runpy.run_path(f"{converters}/{sys.argv[0]}", run_name="__main__")
