import pytest

from tlora_mlx.evaluation import mathematics
from tlora_mlx.evaluation.mathematics import is_equal, last_number, marked_answer, metrics

# The same answers in two writings, whatever judges them. Those marked "hendrycks" are the same to
# hendrycks/math too (its math_equivalence.py, run by hand on this table), which takes texts alone.
EQUAL = [
    ("18", "18"),  # hendrycks
    (r"\frac12", r"\frac{1}{2}"),  # hendrycks
    (r"\dfrac{1}{2}", "0.5"),  # hendrycks
    ("1/2", r"\frac{1}{2}"),  # hendrycks
    (r"\sqrt3", r"\sqrt{3}"),  # hendrycks
    (r"\frac{\sqrt3}{2}", r"\frac{\sqrt{3}}{2}"),  # hendrycks
    (r"5 \text{ cm}^2", "5"),  # hendrycks
    ("x=5", "5"),  # hendrycks
    (r"50\%", "50"),  # hendrycks
    (r"\$18", "18"),  # hendrycks
    (r"\left(3,4\right)", "(3, 4)"),  # hendrycks
    (r"90^\circ", "90"),  # hendrycks
    ("x^2+1", "x^2 + 1"),  # hendrycks
    (".5", "0.5"),  # hendrycks
    ("(1,200)", "(1,200)"),  # hendrycks
    ("18.0", "18"),
    ("1,000", "1000"),
    (r"10{,}000", "10000"),
    ("$18", "18"),
    (r"-\frac{3}{4}", "-0.75"),
    (r"\frac{2}{4}", r"\frac12"),
    (r"\text{(A)}", "(A)"),
    (r"\text{Evelyn}", "Evelyn"),
]
DIFFERENT = [
    ("19", "18"),
    ("-18", "18"),
    ("2x+1", "2"),
    (r"\frac{1}{3}", "0.33"),
    ("18 apples and 3 pears", "18"),
    ("(1,200)", "1200"),
    ("", "5"),
    (r"\frac{1}{0}", "1"),
    ("x", "y"),
]


@pytest.mark.parametrize(("given", "right"), EQUAL)
def test_equal_answers(given, right):
    assert is_equal(given, right)
    assert is_equal(right, given)


@pytest.mark.parametrize(("given", "right"), DIFFERENT)
def test_different_answers(given, right):
    assert not is_equal(given, right)


def test_a_sentence_around_the_number():
    assert is_equal("18 dollars", "18")
    assert is_equal("a total of $1,018.50", "1018.5")
    assert not is_equal("between 5 and 6", "5")


def test_without_the_judge(monkeypatch, tlora_here, run_path):
    monkeypatch.setattr(mathematics, "find_spec", lambda name: None)
    refused = tlora_here("evaluate", run_path, "--task", "math", "--data", "any.jsonl")
    assert refused.returncode == 2
    assert "pip install 'tlora-mlx[math]'" in refused.stderr


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("She makes 9 * 2 = $<<9*2=18>>18 a day.\n#### 18", "18"),
        ("So 9 * 2 = 18.\n#### 18\nThe answer is: 18", "18"),
        ("The answer is: 1,018.5.", "1,018.5"),
        ("The answer is 3.5 dollars. She is glad.", "3.5 dollars"),
        (r"The answer is: $\boxed{\frac{1}{2}}$.", r"\frac{1}{2}"),
        (
            r"Thus $x = \boxed{\left\{ 1, \frac{2}{3} \right\}}$.",
            r"\left\{ 1, \frac{2}{3} \right\}",
        ),
        (r"First \boxed{1}, but then \boxed{2}.", "2"),
        ("The answer is: 4\nNo, the answer is: 5", "5"),
        (r"\fbox{7}", "7"),
        (r"It never closes: \boxed{7", None),
        ("It is 18.", None),
        ("", None),
    ],
)
def test_marked_answers(text, answer):
    assert marked_answer(text) == answer


def test_the_last_number():
    assert last_number("He has 3 apples, 1,234.5 pears.") == "1,234.5"
    assert last_number("-2/3 of it.") == "-2/3"
    assert last_number("none") is None


def test_metrics():
    outputs = [
        {"exact_match": True, "exact_match_flexible": True},
        {"exact_match": False, "exact_match_flexible": True},
        {"exact_match": False, "exact_match_flexible": False},
        {"exact_match": False, "exact_match_flexible": False},
    ]
    assert metrics([], outputs) == {"exact_match": 0.25, "exact_match_flexible": 0.5}
