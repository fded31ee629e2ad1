"""Exports whose writes are corrupted."""

import numpy as np
import pytest

from tlora_mlx import RunError, UserError
from tlora_mlx.storage.blocks import OpenFile


def finds_every_wrong_write(export, tmp_path, monkeypatch, more_than, match, first=0):
    """Have ``export`` write into a directory with each of many blocks corrupted in turn.

    It must refuse each and leave nothing behind; it writes more blocks than ``more_than``.
    """
    write, calls = OpenFile.write, []
    monkeypatch.setattr(
        OpenFile, "write", lambda file, at, data: (calls.append(at), write(file, at, data))
    )
    export(tmp_path / "counted")
    assert len(calls) > more_than
    before = sorted(tmp_path.iterdir())
    for number in range(first, len(calls), len(calls) // 7):
        count = iter(range(len(calls)))

        def corrupted(file, at, data, count=count, number=number):
            if next(count) == number:
                data = data.reshape(-1).view(np.uint8).copy()
                data[-1] ^= 0x41  # sign and exponent of a float, a header's last byte
            write(file, at, data)

        monkeypatch.setattr(OpenFile, "write", corrupted)
        with pytest.raises((RunError, UserError), match=match) as error:
            export(tmp_path / "out")
        assert type(error.value) in (RunError, UserError)
        assert sorted(tmp_path.iterdir()) == before
