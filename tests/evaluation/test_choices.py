import pytest

from tlora_mlx.evaluation.choices import by_length, f1_scores, labelled_metrics, likeliest


def test_the_likeliest_choice_and_by_length():
    assert likeliest([-3.0, -1.0, -1.0]) == 1
    # The longer choice is likelier per character: 12 / 6 against 5 / 2.
    choices, values = ["ab", "abcdef"], [-5.0, -12.0]
    assert likeliest(values) == 0
    assert by_length(values, choices) == [-2.5, -2.0]
    assert by_length([-1.0], [""]) == [-1.0]


def test_f1_of_a_known_confusion():
    # scikit-learn 1.9's f1_score, run by hand, gives the same three.
    right = ["a", "a", "a", "b", "b", "c"]
    given = ["a", "a", "b", "b", "a", "a"]
    scores = f1_scores(right, given)
    assert scores == pytest.approx({"a": 4 / 7, "b": 0.5, "c": 0.0})


def test_labelled_metrics():
    items = [{"choices": ["no", "yes"], "answer": answer} for answer in (0, 1, 1, 1)]
    outputs = [{"given": g, "given_normalized": n} for g, n in ((0, 0), (1, 0), (1, 1), (0, 1))]
    assert labelled_metrics(items, outputs) == pytest.approx(
        {
            "accuracy": 0.75,
            "accuracy_normalized": 0.75,
            "f1_macro": (2 / 3 + 0.8) / 2,
            "f1 of 'no'": 2 / 3,
            "f1 of 'yes'": 0.8,
        }
    )
