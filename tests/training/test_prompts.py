"""``--sample-prompts``: answers at each validation, in the metrics and in the report."""

import json
import shutil

import pytest
from helpers.commands import arguments, assert_one_sentence, quick_train
from helpers.models import save_model, write_jsonl
from mlx_lm import generate, load

from tlora_mlx import UserError, load_base_model
from tlora_mlx.training.prompts import MAX_TOKENS, answers, tokenize_prompts

PROMPTS = ["Add 1 and 2.", "Add <3> and 4."]


def test_answers_at_each_validation(model_path, data_path, tmp_path, tlora_here):
    (tmp_path / "prompts.txt").write_text(f"{PROMPTS[0]}\n\n{PROMPTS[1]}\n")
    options = {"iters": 4, "steps_per_eval": 2, "learning_rate": 0.1}
    watched = {"sample_prompts": str(tmp_path / "prompts.txt")}
    run = quick_train(model_path, data_path, tmp_path / "watched", **options, **watched)
    lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    found = [line for line in lines if "samples" in line]
    assert [line["iteration"] for line in found] == [0, 2, 4]
    for line in found:
        assert [sample["prompt"] for sample in line["samples"]] == PROMPTS
    model, tokenizer = load(str(model_path))
    base = [generate(model, tokenizer, prompt, max_tokens=100) for prompt in PROMPTS]
    assert [sample["answer"] for sample in found[0]["samples"]] == base
    assert [sample["answer"] for sample in found[-1]["samples"]] != base
    # Watching a run does not change it.
    alone = quick_train(model_path, data_path, tmp_path / "alone", **options)
    name = "adapters.safetensors"
    assert (run / name).read_bytes() == (alone / name).read_bytes()
    assert tlora_here("report", run).returncode == 0
    page = (run / "report.html").read_text()
    assert "Answers during training" in page
    assert "Add &lt;3&gt; and 4." in page
    assert "iteration 4" in page


@pytest.mark.parametrize(
    ("content", "message"), [(None, "cannot be read"), ("\n \n", "has no prompt")]
)
def test_faults_are_found_before_the_model_is_loaded(content, message, tmp_path, tlora_here):
    if content:
        (tmp_path / "prompts.txt").write_text(content)
    options = arguments("no-such-model", "no-such-data", tmp_path / "run")
    done = tlora_here(*options, "--sample-prompts", tmp_path / "prompts.txt")
    assert_one_sentence(done, 2, message)
    assert not (tmp_path / "run").exists()


def test_a_prompt_that_cannot_be_asked_stops_before_training(model_path, tmp_path, tlora_here):
    model = shutil.copytree(model_path, tmp_path / "model")
    config = json.loads((model / "tokenizer_config.json").read_text())
    refuses = "{% if 'weather' in messages[0]['content'] %}{{ raise_exception('no small talk') }}"
    config["chat_template"] = refuses + "{% endif %}{{ messages[0]['content'] }}"
    (model / "tokenizer_config.json").write_text(json.dumps(config))
    (tmp_path / "prompts.txt").write_text("Add 1 and 2.\nHow is the weather?\n")
    write_jsonl(tmp_path / "train.jsonl", [{"text": "1 and 2 are 3"}] * 5)
    options = arguments(model, tmp_path / "train.jsonl", tmp_path / "run")
    done = tlora_here(*options, "--sample-prompts", tmp_path / "prompts.txt")
    assert_one_sentence(done, 2, "--sample-prompts, prompt 2: the model's chat template refuses")
    assert not (tmp_path / "run").exists()


def test_answers_end_at_the_last_position(tmp_path):
    """GPT-2 has a table of positions, and MLX reads other memory behind it."""
    base = load_base_model(str(save_model(tmp_path / "model", "gpt2")))
    positions = base.config["n_positions"]
    short, *_ = tokenize_prompts(["1"], base)
    assert short.room == min(MAX_TOKENS, positions - len(short.tokens))
    almost = "1 " * (positions - 20)
    (prompt,) = tokenize_prompts([almost], base)
    assert prompt.room == positions - len(prompt.tokens) < MAX_TOKENS
    (answer,) = answers(base.model, base.tokenizer, [prompt])
    assert len(base.tokenizer.encode(answer["answer"])) <= prompt.room
    with pytest.raises(UserError, match=f"--sample-prompts, prompt 1: .* for {positions:,}"):
        tokenize_prompts(["1 " * (positions + 1)], base)
