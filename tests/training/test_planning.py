import json
import os

from helpers.commands import tlora

from tlora_mlx import RankPlan


def test_train_with_the_same_options_makes_the_same_plan(model_path, data_path, run_path, tmp_path):
    out = tmp_path / "plan.json"
    arguments = ["--model", model_path, "--data", data_path, "--rank", 4, "--output", out]
    result = tlora("plan", *arguments)
    assert result.returncode == 0, result.stderr
    assert "rank × scale of each module" in result.stdout
    assert out.read_text() == (run_path / "rank_plan.json").read_text()
    assert RankPlan.from_dict(json.loads(out.read_text())).rank == 4
    picture = out.with_suffix(".png").read_bytes()
    assert picture.startswith(b"\x89PNG")
    assert len(picture) > 5000
    assert sorted(p.name for p in tmp_path.iterdir()) == ["plan.json", "plan.png"]


def test_the_options_reach_the_plan(model_path, data_path, tmp_path, tlora_here):
    out = tmp_path / "plan.json"
    arguments = ["--model", model_path, "--data", data_path, "--output", out]
    options = ["--rank", 6, "--alpha", 12, "--max-rank", 7, "--num-layers", 1]
    options += ["--target-modules", "q_proj", "v_proj", "--calibration-samples", 5]
    assert tlora_here("plan", *arguments, *options).returncode == 0
    plan = RankPlan.from_dict(json.loads(out.read_text()))
    assert list(plan.modules) == [f"model.layers.1.self_attn.{k}_proj" for k in "qv"]
    assert sorted(m.rank for m in plan.modules.values()) == [5, 7]
    assert min(m.scale for m in plan.modules.values()) == 2.0


def test_every_module_of_a_kind_in_a_block_has_a_cell():
    from tlora_mlx.method.allocation import ModulePlan
    from tlora_mlx.reporting.plan_grid import plan_grid

    names = [f"model.layers.{i}.{m}.up" for i in (0, 1) for m in ("mlp", "shared")]
    plan = RankPlan(4, 4, {name: ModulePlan(4, 1.0, 1.0, 8, 8) for name in names})
    blocks, kinds, cells = plan_grid(plan)
    assert (blocks, kinds) == (["0", "1"], ["up", "shared.up"])
    assert sorted(cells.values()) == sorted(names)


def test_experts_are_shown_as_one():
    from tlora_mlx.method.allocation import ModulePlan
    from tlora_mlx.reporting.plan_grid import experts_summed

    names = ["model.layers.0.mlp.switch_mlp.up_proj.0", "model.layers.0.mlp.switch_mlp.up_proj.10"]
    ranks = [ModulePlan(4, 1.0, 1.0, 8, 8), ModulePlan(2, 2.0, 3.0, 8, 8)]
    other = {"model.layers.0.self_attn.q_proj": ModulePlan(4, 1.0, 1.0, 8, 8)}
    shown = experts_summed(RankPlan(4, 4, dict(zip(names, ranks, strict=True)) | other)).modules
    assert list(shown) == ["model.layers.0.mlp.switch_mlp.up_proj", *other]
    assert next(iter(shown.values())) == ModulePlan(6, 1.5, 4.0, 8, 8)


def test_bad_output(model_path, data_path, tmp_path, tlora_here):
    arguments = ["--model", model_path, "--data", data_path, "--output"]
    for output in (tmp_path, tmp_path / "no" / "plan.json"):
        result = tlora_here("plan", *arguments, output)
        assert result.returncode == 2
        assert "must be a file in a directory that exists" in result.stderr
    os.mkfifo(tmp_path / "pipe")  # stands in for a device: it must not be replaced by a file
    assert "must be a file" in tlora_here("plan", *arguments, tmp_path / "pipe").stderr
    result = tlora_here("plan", *arguments, tmp_path / "plan.png")
    assert result.returncode == 2
    assert "the .png is written beside it" in result.stderr
    assert [p.name for p in tmp_path.iterdir()] == ["pipe"]


def test_another_rank_from_saved_sensitivities(model_path, data_path, tmp_path, tlora_here):
    arguments = ["--model", model_path, "--data", data_path]
    first, direct, again = (tmp_path / f"{name}.json" for name in ("first", "direct", "again"))
    assert tlora_here("plan", *arguments, "--rank", 4, "--output", first).returncode == 0
    options = ["--rank", 7, "--alpha", 14, "--max-rank", 9, "--output"]
    assert tlora_here("plan", *arguments, *options, direct).returncode == 0
    result = tlora_here("plan", "--sensitivities", first, *options, again)
    assert result.returncode == 0, result.stderr
    assert again.read_text() == direct.read_text()
    bad = tmp_path / "bad.json"
    bad.write_text('{"rank": 4}')
    result = tlora_here("plan", "--sensitivities", bad)
    assert result.returncode == 2
    assert "has no table 'modules'" in result.stderr
    expected = "missing: --model and --data, or --sensitivities"
    assert expected in tlora_here("plan", "--model", "m").stderr
