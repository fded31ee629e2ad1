"""The recommended learning rate, and the file that keeps how it was found."""

import json

import pytest

from tlora_mlx.errors import UserError
from tlora_mlx.runs.rates import RateSearch, Trial, read_rates


def search(**losses):
    trials = [Trial(float(rate.replace("_", "-")), loss) for rate, loss in losses.items()]
    return RateSearch(24, 5.0, trials)


def test_the_lowest_of_level_rates_is_recommended():
    assert search(**{"1e_3": 4.5, "2e_3": 4.0, "4e_3": 4.2}).recommended == 2e-3
    # 0.19 % of an improvement of 1.0 is level with it, 0.21 % is not
    assert search(**{"1e_3": 4.0019, "2e_3": 4.0, "4e_3": 4.2}).recommended == 1e-3
    assert search(**{"1e_3": 4.0021, "2e_3": 4.0, "4e_3": 4.2}).recommended == 2e-3
    assert search(**{"1e_3": 4.5, "2e_3": 4.4, "4e_3": None}).recommended == 2e-3


def test_the_file_is_read_back(tmp_path):
    path = tmp_path / "learning_rates.json"
    assert read_rates(path) is None
    found = search(**{"1e_3": 4.5, "2e_3": None})
    path.write_text(json.dumps(found.to_dict()))
    assert read_rates(path) == found
    assert json.loads(path.read_text())["recommended"] == 1e-3


@pytest.mark.parametrize(
    "text", ["[]", "{}", '{"updates": 3, "before": 1, "trials": [{"rate": 1e-3, "loss": null}]}']
)
def test_a_damaged_file(tmp_path, text):
    path = tmp_path / "learning_rates.json"
    path.write_text(text)
    with pytest.raises(UserError, match="does not contain the learning rates tried; delete it"):
        read_rates(path)


def test_the_picture():
    lines = search(**{"1e_3": 4.5, "2e_3": 4.0, "4e_3": None}).summary()
    assert lines[0] == "validation loss after 24 updates, 5.0000 before:"
    assert [line.count("█") for line in lines] == [0, 20, 40, 0]
    assert [i for i, line in enumerate(lines) if "<- recommended" in line] == [2]
    assert "not finite" in lines[3]
