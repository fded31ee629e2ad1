import json

import mlx.core as mx
import pytest
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file

from tlora_mlx.errors import RunError, UserError
from tlora_mlx.storage.files import new_directory, replace_file, user_path, write_text
from tlora_mlx.storage.safetensors import TensorFile, check_safetensors, write_tensors


def test_a_path_that_is_not_utf_8_is_refused():
    """It could not be written into a configuration or a card."""
    with pytest.raises(UserError, match=r"path 'a\\udcff' is not UTF-8 text; rename it"):
        user_path("a\udcff")


def test_safetensors_reads_what_we_write(tmp_path):
    mx.random.seed(0)
    tensors = {
        "b.f32": mx.random.normal((3, 5)),
        "a.bf16": mx.random.normal((7,)).astype(mx.bfloat16),
        "c.f16": mx.random.normal((4, 3)).astype(mx.float16).T,
        "d.empty": mx.zeros((0, 4)),
    }
    path = tmp_path / "t.safetensors"
    write_tensors(path, tensors, {"format": "mlx"})
    with safe_open(path, "np") as file:
        assert file.metadata() == {"format": "mlx"}
    read = load_file(path)
    assert read.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert str(read[name].dtype).removeprefix("torch.") == str(tensor.dtype).rsplit(".", 1)[1]
        assert read[name].float().tolist() == tensor.astype(mx.float32).tolist()
    first = path.read_bytes()
    write_tensors(path, dict(reversed(tensors.items())), {"format": "mlx"})
    assert path.read_bytes() == first


def test_a_failed_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "file"
    write_text(path, "before")

    def fail(beside):
        beside.write_text("half")
        raise OSError(28, "No space left on device")

    with pytest.raises(RunError, match="No space left on device; any existing file is unchanged"):
        replace_file(path, fail)
    assert path.read_text() == "before"
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_a_new_directory_is_complete_or_missing(tmp_path):
    def fail():
        with new_directory(tmp_path / "a") as beside:
            (beside / "half").write_text("")
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert list(tmp_path.iterdir()) == []
    with new_directory(tmp_path / "b" / "a") as beside:
        (beside / "file").write_text("whole")
    assert [p.name for p in (tmp_path / "b" / "a").iterdir()] == ["file"]
    with pytest.raises(UserError, match="already exists"), new_directory(tmp_path / "b"):
        pass


def header_of(**entries):
    text = json.dumps(entries).encode()
    return len(text).to_bytes(8, "little") + text


def entry(dtype="F32", shape=(2,), offsets=(0, 8)):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


HEADERS = {
    "absurd size": (2**62).to_bytes(8, "little") + b"{}",
    "longer than the file": (99).to_bytes(8, "little") + b"{}",
    "no length": b"\1\0",
    "no JSON": (3).to_bytes(8, "little") + b"{a}",
    "a list": (2).to_bytes(8, "little") + b"[]",
    "overlap": header_of(a=entry(), b=entry(offsets=(4, 12))) + bytes(12),
    "gap": header_of(a=entry(), b=entry(offsets=(12, 20))) + bytes(20),
    "cut": header_of(a=entry()) + bytes(7),
    "more than it says": header_of(a=entry()) + bytes(9),
    "another size": header_of(a=entry(shape=(3,))) + bytes(8),
    "negative": header_of(a=entry(shape=(-2,))) + bytes(8),
    "unknown dtype": header_of(a=entry("F31")) + bytes(8),
    "a pair of three": header_of(a=entry(offsets=(0, 8, 8))) + bytes(8),
    "metadata": header_of(__metadata__={"a": 1}, a=entry()) + bytes(8),
    "twice": (9 * 2 + 1).to_bytes(8, "little") + b'{"a": 1, "a":    1}',
}


@pytest.mark.parametrize("fault", HEADERS)
def test_headers_that_are_refused(fault, tmp_path):
    path = tmp_path / "t.safetensors"
    path.write_bytes(HEADERS[fault])
    with pytest.raises(UserError, match="the file is damaged or cut short") as error:
        check_safetensors(path, "the file")
    assert len(str(error.value).splitlines()) == 1
    with pytest.raises(SafetensorError):  # so says its own package
        safe_open(path, "np")


def test_headers_that_are_taken(tmp_path):
    path = tmp_path / "t.safetensors"
    tensors = {
        "a": entry(),
        "b": entry("F8_E4M3", (3, 1), (8, 11)),
        "c": entry("I64", (0,), (11, 11)),
    }
    path.write_bytes(header_of(__metadata__={"a": "b"}, **tensors) + bytes(11))
    safe_open(path, "np")
    file = TensorFile(path, "the file")
    assert list(file) == ["a", "b", "c"]
    assert "b" in file
    assert "d" not in file
    assert file.metadata == {"a": "b"}
    assert file.size == path.stat().st_size
    assert file["a"].tolist() == [0, 0]
    assert file["c"].shape == (0,)
    with pytest.raises(UserError, match=r"b in .* has dtype F8_E4M3, which MLX does not support"):
        file["b"]
