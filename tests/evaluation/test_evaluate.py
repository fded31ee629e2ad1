import json

import mlx.core as mx
import pytest
import torch
from helpers.adapters import make_run
from helpers.commands import assert_one_sentence, quick_train, val_losses
from helpers.models import ROWS, save_model, write_jsonl
from transformers import AutoModelForCausalLM, AutoTokenizer

from tlora_mlx import UserError, load_adapter
from tlora_mlx.adapters.serving import server_arguments
from tlora_mlx.evaluation.subject import Subject
from tlora_mlx.method.layers import adapters_off

TEMPLATE = (
    "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
SUMS = [
    {"question": f"What is {i} plus {i}?", "answer": f"{i} + {i} = {2 * i}\n#### {2 * i}"}
    for i in range(5)
]
SENTENCES = [
    {"sentence": text, "label": label}
    for text, label in (("good", "yes"), ("bad", "no"), ("very good", "yes"), ("not good", "no"))
]
PROGRAMS = [
    {
        "task_id": "HumanEval/0",
        "prompt": "def one():\n",
        "entry_point": "one",
        "test": "def check(f):\n    assert f() == 1\n",
    },
    {"task_id": 2, "text": "Write add.", "test_list": ["assert add(1, 2) == 3"]},
]
CHATS = [
    {"question_id": 81, "category": "writing", "turns": ["Hello.", "And again?"]},
    {"question_id": 82, "category": "writing", "turns": ["How much is 2 + 2?"]},
]
CHOICES = [
    {"prompt": "Two and two are ", "choices": ["four", "five hundred"], "answer": 0},
    {"prompt": "Add 1 and 2.\n", "choices": ["def add", "nothing", "x"], "answer": "nothing"},
]


@pytest.fixture
def evaluate(tlora_here, run_path, tmp_path):
    def run(task, rows, *flags, path=None, name="data.jsonl"):
        data = write_jsonl(tmp_path / name, rows)
        output = tmp_path / "results"
        flags = [*flags, "--task", task, "--data", data, "--output", output, "--max-tokens", 8]
        result = tlora_here("evaluate", path or run_path, *flags)
        if result.returncode:
            assert not output.exists()
            return result, None, None
        lines = (output / "results.jsonl").read_text().splitlines()
        summary = json.loads((output / "summary.json").read_text())
        return result, [json.loads(line) for line in lines], summary

    return run


def subject(base, **options):
    return Subject(base, "model", **{"format": None, "batch_size": 3, "max_tokens": 12, **options})


def test_answers_and_likelihoods_equal_those_of_transformers(run_path, model_path):
    """The base model under evaluation, in batches; transformers, one prompt at a time."""
    base = load_adapter(run_path)
    tokenizer = AutoTokenizer.from_pretrained(model_path)
    reference = AutoModelForCausalLM.from_pretrained(model_path)
    prompts = ["Add 1 and 2.\n", "x", "def add():\n    return", "Add them, all of them, please. "]

    def greedy(prompt):
        tokens = tokenizer(prompt, return_tensors="pt").input_ids
        made = reference.generate(tokens, max_new_tokens=12, do_sample=False)
        return tokenizer.decode(made[0, tokens.shape[1] :], skip_special_tokens=True)

    def likelihood(prompt, answer):
        before = tokenizer(prompt).input_ids
        after = tokenizer(answer, add_special_tokens=False).input_ids
        with torch.no_grad():
            logits = reference(torch.tensor([before + after])).logits[0].log_softmax(-1)
        return sum(logits[len(before) + i - 1, token].item() for i, token in enumerate(after))

    pairs = [(prompt, answer) for prompt in prompts for answer in ("three", " four and a half")]
    with adapters_off(base.model):
        answers = subject(base).generate([[prompt] for prompt in prompts])
        likelihoods = subject(base).log_likelihoods([*pairs, ("x", "")])
    assert answers == [greedy(prompt) for prompt in prompts]
    assert likelihoods == pytest.approx([*(likelihood(*pair) for pair in pairs), 0.0], rel=1e-4)
    assert subject(base).log_likelihoods(pairs) != pytest.approx(likelihoods[:-1], rel=1e-3)


def test_math(evaluate):
    result, lines, summary = evaluate("math", SUMS)
    assert [line["answer"] for line in lines] == ["0", "2", "4", "6", "8"]
    for who in ("base", "adapter"):
        shares = [line[who]["exact_match_flexible"] for line in lines]
        assert summary["metrics"][who]["exact_match_flexible"] == sum(shares) / 5
        assert all(set(line[who]) >= {"response", "given"} for line in lines)
    assert lines[0]["base"]["response"] != lines[0]["adapter"]["response"]
    assert "exact_match_flexible" in result.stdout
    assert summary["rows"] == 5


def test_commonsense(evaluate):
    _, lines, summary = evaluate("commonsense", CHOICES)
    assert [line["answer"] for line in lines] == [0, 1]
    assert [len(line["base"]["log_likelihoods"]) for line in lines] == [2, 3]
    assert set(summary["metrics"]["adapter"]) == {"accuracy", "accuracy_normalized"}


def test_nlu_takes_the_choices_from_the_answers(evaluate):
    _, lines, summary = evaluate("nlu", SENTENCES, "--format", "glue")
    assert all(line["choices"] == ["no", "yes"] for line in lines)
    assert lines[0]["prompt"].endswith("sentence: good\nlabel:\n\n### Response:")
    assert {"accuracy", "f1_macro"} <= set(summary["metrics"]["base"])


def test_code(evaluate, tmp_path):
    _, lines, summary = evaluate("code", PROGRAMS, "--execute")
    assert [line["task_id"] for line in lines] == ["HumanEval/0", "Mbpp/2"]
    samples = (tmp_path / "results" / "adapter.jsonl").read_text().splitlines()
    assert [json.loads(s) for s in samples] == [
        {"task_id": line["task_id"], "solution": line["adapter"]["solution"]} for line in lines
    ]
    assert summary["metrics"]["base"]["pass@1"] == 0.0  # a random model
    assert all(line["base"]["outcome"] != "passed" for line in lines)


def test_code_runs_only_on_request(evaluate, monkeypatch):
    from tlora_mlx.evaluation import code_generation

    def fail(*_):
        raise AssertionError("it was run")

    monkeypatch.setattr(code_generation, "run_program", fail)
    _, lines, summary = evaluate("code", PROGRAMS)
    assert set(summary["metrics"]["base"]) == {"is_python"}
    assert "outcome" not in lines[0]["base"]


def test_a_right_solution_passes(run_path, monkeypatch):
    from tlora_mlx.evaluation import code_generation
    from tlora_mlx.evaluation.execution import Limits
    from tlora_mlx.evaluation.rows import Row

    answers = ["    return 1\n", "```python\ndef add(a, b):\n    return a + b\n```"]
    monkeypatch.setattr(Subject, "generate", lambda *_: answers)
    model = subject(load_adapter(run_path))
    items = code_generation.read([Row(i, f"{i}", row) for i, row in enumerate(PROGRAMS)], model)
    outputs = code_generation.respond(model, items, Limits(seconds=5))
    assert [output["outcome"] for output in outputs] == ["passed", "passed"]


def test_chat_in_fastchats_format(evaluate, tmp_path):
    _, lines, _ = evaluate("chat", CHATS)
    answers = (tmp_path / "results" / "base.jsonl").read_text().splitlines()
    for line, answer, row in zip(lines, map(json.loads, answers), CHATS, strict=True):
        assert answer["question_id"] == row["question_id"]
        assert answer["choices"] == [{"index": 0, "turns": line["base"]["answers"]}]
        assert len(line["base"]["answers"]) == len(row["turns"])
        assert {"answer_id", "model_id", "tstamp"} <= set(answer)


def test_perplexity_equals_that_of_validation(evaluate, run_path):
    losses = val_losses(run_path)
    _, lines, summary = evaluate("perplexity", ROWS[13:])
    assert summary["metrics"]["base"]["loss"] == pytest.approx(losses[0], rel=1e-4)
    assert summary["metrics"]["adapter"]["loss"] == pytest.approx(min(losses[1:]), rel=1e-4)
    assert summary["metrics"]["base"]["perplexity"] == pytest.approx(
        mx.exp(mx.array(losses[0])).item(), rel=1e-3
    )
    assert [line["row"] for line in lines] == [1, 2, 3, 4, 5]


def test_a_base_model_and_a_run_that_were_moved(data_path, tmp_path, tlora_here):
    """Every command that loads the model says how to name its new place, and takes it."""
    model = save_model(tmp_path / "model", num_hidden_layers=1)
    quick_train(model, data_path, tmp_path / "run", iters=1)
    run, moved = ((tmp_path / name).rename(tmp_path / f"my {name}") for name in ("run", "model"))
    commands = {
        "evaluate": ["--task", "perplexity", "--data", data_path],
        "report": ["--samples", 1, "--max-tokens", 2],
        "generate": ["--prompt", "x", "--max-tokens", 2],
    }
    for command, flags in commands.items():
        result = tlora_here(command, run, *flags)
        message = f"the base model of {run}: model directory {model} does not exist; see --base-m"
        assert_one_sentence(result, 2, message)
        assert tlora_here(command, run, *flags, "--base-model", moved).returncode == 0
    assert (run / "evaluations" / f"perplexity-{data_path.name}").is_dir()
    assert server_arguments(str(run), str(moved))[:2] == ["--model", str(moved)]
    with pytest.raises(UserError, match="see --base-model"):
        server_arguments(str(run))


def test_the_chat_template_is_used_if_there_is_one(data_path, tmp_path, evaluate):
    model = save_model(tmp_path / "model", chat_template=TEMPLATE, num_hidden_layers=1)
    run = quick_train(model, data_path, tmp_path / "run", iters=1)
    asked = subject(load_adapter(run), format="metamath")
    encode, decode = asked.encode, asked.base.tokenizer.decode
    assert decode(encode(["Hi"])) == "<user>Hi\n<assistant>"
    assert decode(encode(["Hi", "Ho", "Hm"])) == "<user>Hi\n<assistant>Ho\n<user>Hm\n<assistant>"
    assert not asked.is_framed
    _, lines, _ = evaluate("math", SUMS[:1], "--format", "metamath", path=run)
    assert lines[0]["prompt"] == SUMS[0]["question"]
    evaluated = run / "evaluations"
    assert not evaluated.exists()


def test_a_later_turn_follows_in_the_frame(run_path):
    asked = subject(load_adapter(run_path), format="wizardlm")
    text = asked.base.tokenizer.decode(asked.encode(["first", "A.", "second"]))
    assert text == "firstA.\n\n### Instruction:\nsecond\n\n### Response:"


@pytest.mark.parametrize(
    ("task", "text", "flags", "message"),
    [
        ("math", '{"question": "1?"}', (), r"line 1 has 'question'; it needs 'answer'"),
        ("math", '{"answer": "1"}', (), r"line 1 has 'answer'; it needs 'question'"),
        ("math", '{"question": "1?", "answer": " "}', (), "line 1: 'answer' is empty"),
        ("math", '{"question": "1?", "answer": null}', (), "line 1: 'answer' is null"),
        ("math", '{"question": "1?", "answer": "$"}', (), "line 1 has no final answer"),
        ("math", '{"prompt": "\\ud800", "answer": "1"}', (), "line 1 has half of a character"),
        ("math", '{"prompt": "", "answer": "1"}', (), "line 1: 'prompt' is empty"),
        ("math", '{"question": [1], "answer": "1"}', (), r"line 1: 'question' is not text: ["),
        ("math", "1", (), "line 1 is not a JSON object"),
        ("math", "[1]", (), "is a JSON array, or part of one; give one object a line"),
        ("math", '{"question"', (), "line 1 is not valid JSON"),
        ("math", "", (), "is empty"),
        ("commonsense", '{"prompt": "a", "choices": [], "answer": 0}', (), "not a list of one"),
        ("commonsense", '{"prompt": "a", "choices": ["b"], "answer": 1}', (), "not one of its 1"),
        ("commonsense", '{"prompt": "a", "choices": ["b"], "answer": "c"}', (), "not one of its"),
        ("nlu", '{"prompt": "a", "answer": "yes"}', (), "only one answer, 'yes'"),
        ("nlu", '{"a": "b"}', ("--format", "glue"), "line 1 does not fit --format glue"),
        ("code", '{"task_id": 1}', (), "neither 'entry_point' nor 'test_list'"),
        (
            "code",
            '{"task_id": "a", "prompt": "def f():", "entry_point": "f"}',
            ("--execute",),
            "--execute needs rows with a test; row 1 has none",
        ),
        ("chat", '{"turns": ["Hi", ""]}', (), "'turns' is empty, or part of it is not text"),
        ("chat", '{"turns": "Hi"}', (), "'turns' is not a list of one or more texts"),
        ("perplexity", '{"body": "x"}', (), "line 1 has 'body'; it needs 'text'"),
        ("perplexity", '{"text": ""}', (), "has a token to predict"),
        ("math", None, (), "does not exist"),
        ("math", "{}", ("--execute",), "--execute is for --task code"),
    ],
)  # fmt: skip
def test_bad_input(tlora_here, run_path, tmp_path, task, text, flags, message):
    data = tmp_path / "data.jsonl"
    if text is not None:
        data.write_text(text + "\n")
    result = tlora_here("evaluate", run_path, "--task", task, "--data", data, *flags)
    assert result.returncode == 2
    assert message in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1
    assert not list(run_path.glob("evaluations/*"))


def test_an_array_of_rows_and_the_default_directory(tlora_here, model_path, data_path, tmp_path):
    run = quick_train(model_path, data_path, tmp_path / "run", iters=1)
    data = tmp_path / "sums.json"
    data.write_text(json.dumps(SUMS))
    flags = ["--task", "math", "--data", data, "--max-samples", 2, "--max-tokens", 2]
    assert tlora_here("evaluate", run, *flags).returncode == 0
    place = run / "evaluations" / "math-sums"
    assert len((place / "results.jsonl").read_text().splitlines()) == 2
    again = tlora_here("evaluate", run, *flags)
    assert (again.returncode, "already exists" in again.stderr) == (2, True)
    data.write_text("{}")
    assert "does not contain an array of rows" in tlora_here("evaluate", run, *flags).stderr
    data.write_text('["1?"]')
    assert f"error: {data}, row 1 is not a JSON" in tlora_here("evaluate", run, *flags).stderr


def test_a_table_of_positions_is_not_left(tmp_path, tlora_here):
    """MLX would read what lies behind it: long prompts are refused, answers end with the table."""
    model = save_model(tmp_path / "model", "gpt2", max_position_embeddings=32)
    run = make_run(tmp_path / "run", model, lambda i, shape: 2)
    long = "return " * 40
    refused = "tokens, and model "
    assert_one_sentence(tlora_here("generate", run, "--prompt", long), 2, refused)
    write_jsonl(tmp_path / "rows.jsonl", [{"prompt": long, "choices": ["a", "b"], "answer": 0}])
    arguments = ("evaluate", run, "--data", tmp_path / "rows.jsonl", "--task")
    assert_one_sentence(tlora_here(*arguments, "commonsense"), 2, refused)
    base = load_adapter(run)
    prompt = base.tokenizer.encode("return " * 9)
    assert base.room(len(prompt), 100) == 32 - len(prompt)
    assert tlora_here("generate", run, "--prompt", "return " * 9).returncode == 0
    write_jsonl(tmp_path / "rows.jsonl", [{"text": long}])
    found = tlora_here(*arguments, "perplexity")
    assert (found.returncode, found.stderr) == (0, "")
