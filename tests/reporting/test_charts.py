import re

import pytest

from tlora_mlx.reporting.charts import HEIGHT, heat_map, line_chart, short, ticks


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (0, 10, [0, 2, 4, 6, 8, 10]),
        (3.1, 4.6, [3.5, 4.0, 4.5]),
        (0, 1e-4, [0, 2e-5, 4e-5, 6e-5, 8e-5, 1e-4]),
        (5, 5, [5]),
        (-1, 1, [-1, -0.5, 0, 0.5, 1]),
    ],
)
def test_ticks_are_round(low, high, expected):
    assert ticks(low, high) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0"), (3.14159, "3.142"), (2e-05, "2e-05"), (12345, "12.35k"), (171_710_000, "172M")],
)
def test_short_numbers(value, text):
    assert short(value) == text


def test_a_line_goes_where_its_points_are():
    chart = line_chart({"a": [(0, 1.0), (10, 3.0)], "none": [], "b": [(5, 2.0)]}, "x", "y <&>")
    lines = re.findall(r'points="([^"]*)"', chart)
    assert len(lines) == 2
    (x0, y0), (x1, y1) = (map(float, point.split(",")) for point in lines[0].split())
    middle_x, middle_y = map(float, lines[1].split(","))
    assert x0 < x1
    assert HEIGHT > y0 > y1 > 0
    assert (middle_x, middle_y) == pytest.approx(((x0 + x1) / 2, (y0 + y1) / 2), abs=0.1)
    assert "y &lt;&amp;&gt;" in chart
    assert "nan" not in line_chart({"one": [(1, 0.0)]}, "x", "y")


def test_the_largest_value_has_the_deepest_colour():
    cells = {("0", "q"): (1.0, "1", "a"), ("0", "k"): (9.0, "9", '"'), ("1", "q"): (5.0, "5", "c")}
    table = heat_map("title", ["0", "1"], ["q", "k"], cells)
    shown = re.findall(r'--depth:([\d.]+)" title="[^"]*">(\d)</td>', table)
    assert shown == [("0.060", "1"), ("1.000", "9"), ("0.530", "5")]
    assert re.findall(r'class="deep" style="--depth:1.000"', table)
    assert "<td></td>" in table
    assert 'title="&quot;"' in table
    assert heat_map("none", [], [], {}).endswith("</table>")
