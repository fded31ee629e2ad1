"""Whatever the data and the sizes, the command exits with 0, or with one sentence and 2."""

import json
import shutil

import mlx.core as mx
import pytest
from helpers.models import save_model
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tlora_mlx import read_run

TEMPLATE = (
    "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
TEXT = st.one_of(
    st.text(max_size=30),
    st.sampled_from(["", " ", "\n", "🦊🎉", "a" * 700, "\x00", "<eos>", "e\u0301\u202e"]),
)
MESSAGE = st.fixed_dictionaries(
    {"role": st.sampled_from(["user", "assistant", "system"]), "content": TEXT}
)
KINDS = (
    st.fixed_dictionaries({"prompt": TEXT, "completion": TEXT}),
    st.fixed_dictionaries({"text": TEXT}),
    st.fixed_dictionaries({"messages": st.lists(MESSAGE, max_size=4)}),
)
ODD_ROW = st.one_of(
    st.fixed_dictionaries({"prompt": TEXT, "completion": st.none()}),
    st.fixed_dictionaries({"messages": st.one_of(st.none(), st.lists(st.integers(), max_size=2))}),
    st.fixed_dictionaries({"text": st.integers()}),
    st.none(),
    st.lists(st.integers(), max_size=2),
    st.dictionaries(st.text(max_size=3), st.integers(), max_size=2),
)
ROWS = st.one_of(
    *(st.lists(kind, min_size=1, max_size=8) for kind in KINDS),
    st.lists(st.one_of(*KINDS, ODD_ROW), max_size=6),
)


@pytest.fixture(scope="module", params=[None, TEMPLATE], ids=["plain", "chat"])
def model(request, tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    return save_model(path, chat_template=request.param, num_hidden_layers=1)


@settings(
    max_examples=40,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(
    rows=ROWS,
    end=st.sampled_from([b""] * 9 + [b"\xff\xfe\n", b"{\n", b"\n \n"]),
    batch_size=st.integers(1, 9),
    max_seq_length=st.sampled_from([2, 7, 33, 512, 512, 512]),
    accumulation=st.integers(1, 3),
    val_split=st.sampled_from([None, 0.01, 0.5, 0.99]),
)
def test_any_data(
    model, tmp_path_factory, capsys, rows, end, batch_size, max_seq_length, accumulation, val_split
):  # fmt: skip
    from tlora_mlx.train import main

    place = tmp_path_factory.mktemp("fuzz")
    (place / "data").mkdir()
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    (place / "data" / "train.jsonl").write_bytes(lines.encode() + end)
    flags = ["--model", model, "--data", place / "data", "--adapter-path", place / "run"]
    flags += ["--batch-size", batch_size, "--max-seq-length", max_seq_length, "--iters", 2]
    flags += ["--grad-accumulation-steps", accumulation, "--rank", 2, "--learning-rate", 1e-3]
    flags += ["--val-split", val_split] if val_split else []
    capsys.readouterr()
    code = main(list(map(str, flags)))
    errors = capsys.readouterr().err
    try:
        if code == 0:
            assert not errors.strip()
            run = read_run(place / "run")
            assert all(mx.isfinite(value).all().item() for value in run.tensors.values())
        else:
            assert code == 2, errors
            assert errors.startswith("error: ")
            assert len(errors.strip().splitlines()) == 1
            assert not (place / "run").exists()
    finally:
        shutil.rmtree(place)
