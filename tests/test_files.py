import mlx.core as mx
import pytest
from safetensors import safe_open
from safetensors.torch import load_file

from tlora_mlx.errors import RunError, UserError
from tlora_mlx.files import new_directory, replace_file, write_tensors, write_text


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


def test_a_failed_write_leaves_what_was_there(tmp_path):
    path = tmp_path / "file"
    write_text(path, "before")

    def fail(beside):
        beside.write_text("half")
        raise OSError(28, "No space left on device")

    with pytest.raises(RunError, match="No space left on device; what was there is unchanged"):
        replace_file(path, fail)
    assert path.read_text() == "before"
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_a_new_directory_is_whole_or_not_there(tmp_path):
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
    with pytest.raises(UserError, match="exists already"), new_directory(tmp_path / "b"):
        pass
