import json
import os
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import mlx.core as mx
import pytest
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file

from tlora_mlx.errors import RunError, UserError
from tlora_mlx.storage.files import (
    new_directory,
    read_json,
    replace_file,
    sweep,
    user_path,
    write_text,
)
from tlora_mlx.storage.foreign import file_in
from tlora_mlx.storage.safetensors import TensorFile, check_safetensors, write_tensors


def test_a_path_that_is_not_utf_8_is_refused():
    """It could not be written into a configuration or a card."""
    with pytest.raises(UserError, match=r"path 'a\\udcff' is not UTF-8 text; rename it"):
        user_path("a\udcff")


def test_what_cannot_be_a_path(tmp_path):
    (tmp_path / "circle").symlink_to("circle")
    for text in ("a\0b", "x" * 5000, "x" * 300, str(tmp_path / "circle")):
        with pytest.raises(UserError, match="cannot be used as a path: ") as error:
            user_path(text)
        assert len(str(error.value)) < 200


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

    def fail(file):
        file.write(b"half")
        raise OSError(28, "No space left on device")

    with pytest.raises(RunError, match="No space left on device; any existing file is unchanged"):
        replace_file(path, fail)
    assert path.read_text() == "before"
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_links_are_replaced_and_not_followed(tmp_path):
    victim, path = tmp_path / "victim", tmp_path / "report.html"
    victim.write_text("mine")
    path.symlink_to(victim)
    (tmp_path / ".report.html.part").symlink_to(victim)
    write_text(path, "page")
    assert (path.read_text(), path.is_symlink(), victim.read_text()) == ("page", False, "mine")
    (tmp_path / "gone").symlink_to(tmp_path / "nowhere")
    with pytest.raises(UserError, match="already exists"), new_directory(tmp_path / "gone"):
        pass
    assert not (tmp_path / "nowhere").exists()


def test_what_killed_processes_left_is_swept_and_what_lives_is_not(tmp_path):
    name = "0123456789abcdef"
    (tmp_path / f".file.{name}.part").write_text("half")
    (tmp_path / f".file.extra.{name}.part").write_text("another file's")
    (tmp_path / ".file.mine.part").write_text("the user's")
    with new_directory(tmp_path / "file") as staging:
        assert not (tmp_path / f".file.{name}.part").exists()
        (staging / "a").write_text("first")
        sweep(tmp_path, "file")
        with new_directory(tmp_path / "file"):
            assert staging.exists()
        shutil.rmtree(tmp_path / "file")
    assert (tmp_path / "file" / "a").read_text() == "first"
    kept = [f".file.extra.{name}.part", ".file.mine.part", "file"]
    assert sorted(p.name for p in tmp_path.iterdir()) == kept


def test_several_writers_of_one_file(tmp_path):
    """Each write succeeds, and whoever reads meanwhile reads one of them whole."""
    path = tmp_path / "file"
    texts = [letter * 50_000 for letter in "abcd"]
    write_text(path, texts[0])
    with ThreadPoolExecutor(4) as pool:
        writers = [pool.submit(lambda t=t: [write_text(path, t) for _ in range(20)]) for t in texts]
        while not all(writer.done() for writer in writers):
            assert path.read_text() in texts
        assert [writer.result() for writer in writers] == [[None] * 20] * 4
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_the_umask_is_respected(tmp_path):
    for mask in (0o077, 0o002):
        before = os.umask(mask)
        try:
            write_text(tmp_path / "file", "")
            with new_directory(tmp_path / f"{mask}") as staging:
                (staging / "a").touch()
        finally:
            os.umask(before)
        assert (tmp_path / "file").stat().st_mode & 0o777 == 0o666 & ~mask
        assert (tmp_path / f"{mask}").stat().st_mode & 0o777 == 0o777 & ~mask


def test_links_in_a_directory_that_somebody_made(tmp_path, monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    made = tmp_path / "made"
    (made / "deeper").mkdir(parents=True)
    (tmp_path / "cache" / "models--a--b" / "blobs").mkdir(parents=True)
    blob, secret = (
        tmp_path / "cache" / "models--a--b" / "blobs" / "0f",
        tmp_path / "cache" / "token",
    )
    for file in (made / "own", blob, secret):
        file.write_text("")
    (made / "inside").symlink_to("own")
    (made / "blob").symlink_to(blob)
    for name in ("own", "inside", "blob", "missing", "deeper/../own"):
        assert file_in(made, name) == made / name
    (made / "environ").symlink_to("/proc/self/environ")
    (made / "token").symlink_to(secret)
    (made / "deeper" / "up").symlink_to("../..")
    for name in ("environ", "token", "../cache/token", "deeper/up/cache/token"):
        with pytest.raises(UserError, match="outside of its directory; if you trust it, replace"):
            file_in(made, name)
    # The cache of another HF_HOME.
    snapshot = tmp_path / "other" / "models--a--b" / "snapshots" / "0f"
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").symlink_to("../../blobs/0f")
    assert file_in(snapshot, "config.json") == snapshot / "config.json"


def test_only_files_and_pipes_are_read(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(UserError, match="the plan is not valid JSON"):  # empty: nobody writes
        read_json(tmp_path / "pipe", "the plan")
    for device in ("/dev/null", "/dev/urandom"):
        with pytest.raises(UserError, match=f"the plan cannot be read: {device}: it is not a file"):
            read_json(Path(device), "the plan")
    with pytest.raises(UserError, match=r"the plan cannot be read: .*: Is a directory"):
        read_json(tmp_path, "the plan")
    reader, writer = os.pipe()
    os.write(writer, b"[1]")
    os.close(writer)
    assert read_json(Path(f"/dev/fd/{reader}"), "the plan") == [1]  # as in <(command)
    os.close(reader)


def test_devices_and_pipes_are_not_replaced(tmp_path):
    """Root could put a report where /dev/full was, or /dev/stdout, which is a link."""
    (tmp_path / "dev").symlink_to("/dev")
    os.mkfifo(tmp_path / "pipe")
    new = Path("/dev/not-there-tlora")
    for path in (tmp_path / "pipe", new, tmp_path / "dev" / new.name):
        try:
            with pytest.raises(RunError, match=f"cannot write {path}: it is not a file"):
                write_text(path, "report")
            assert not new.exists()
        finally:
            new.unlink(missing_ok=True)
    assert (tmp_path / "pipe").is_fifo()


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
