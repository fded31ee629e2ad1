"""The public exports; they print the proof, like the command, and return the directory."""

import tlora_mlx


def shown(proof):
    print(proof.summary())
    return proof.directory


def export_peft(adapter, output, layout="portable", dtype="float32", base_model=None):
    options = {"layout": layout, "dtype": dtype, "base_model": base_model}
    return shown(tlora_mlx.export_peft(adapter, output, **options))


def export_mlx_lm(adapter, output, dtype="float32"):
    return shown(tlora_mlx.export_mlx_lm(adapter, output, dtype=dtype))


def export_merged(adapter, output, base_model=None):
    return shown(tlora_mlx.export_merged(adapter, output, base_model=base_model))


def export_dequantized(adapter, output):
    return shown(tlora_mlx.export_dequantized(adapter, output))


def export_requantized(adapter, output):
    return shown(tlora_mlx.export_requantized(adapter, output))
