"""Reports of sweeps: the law or the throughput on one page, what is fitted together, and commands that can be pasted."""

from __future__ import annotations

import html
import math
import shlex
from pathlib import Path
from typing import Any

import pytest

from hermes_dist.scaling.laws import Law, LawFit, NotEnoughPoints
from hermes_dist.scaling.sweep import members
from hermes_dist.scaling.sweep_report import report
from hermes_dist.scaling.sweep_results import State, law_of, law_values, like_groups, result_row, throughput_of
from tests.scaling.test_sweep import CONFIGS, sweep_of


def synthetic_rows(law: Law) -> list[dict[str, Any]]:
    rows = []
    for base, n in ((8, 1e6), (16, 4e6), (24, 9e6), (32, 16e6)):
        for steps in (100, 400, 1600):
            d = 4 * steps
            rows.append(
                {
                    "member": f"b{base}-{steps}",
                    "state": "done",
                    "ranks": 1,
                    "method": "hermes",
                    "parameters": n,
                    "samples": d,
                    "flops_per_sample": 2e3 * n,
                    "loss": float(law.loss(n, d)),
                    "dice": 0.5,
                    "dice_by_dataset": {"a": 0.5},
                    "backbone_parameters": n / 4,
                    "seed": 0,
                    "zero_stage": 1,
                    "global_batch": 4,
                    "step_s": 0.2,
                    "data_wait_s": 0.0,
                    "samples_per_s": 20.0,
                    "reason": "",
                }
            )
    return rows


def test_the_report_of_a_scaling_study_is_one_page_with_its_law(tmp_path: Path) -> None:
    sweep = sweep_of(tmp_path)
    rows = synthetic_rows(Law(0.2, 400.0, 4.0, 0.5, 0.5))
    fit = law_of(rows, bootstrap=5)
    assert isinstance(fit, LawFit)
    assert fit.law.alpha == pytest.approx(0.5, abs=0.02)
    page = report(sweep, members(sweep, CONFIGS), rows, "python launch/sweep.py --config scaling.json")
    assert page.count("<svg") == 3
    assert "gains +0.000" in page
    assert "95 % low" in page
    assert "http://" not in page.replace("http://www.w3.org", "").replace("http://creativecommons", "").replace(
        "http://purl.org", ""
    )
    assert isinstance(law_of(rows[:4]), NotEnoughPoints)
    assert "not enough points" in report(sweep, members(sweep, CONFIGS), rows[:4], "x")


@pytest.mark.parametrize("disturbed", [False, True])
def test_the_report_of_a_throughput_study(disturbed: bool, tmp_path: Path) -> None:
    """A sweep beside another program: the report says that its fit is not to be extrapolated."""
    sweep = sweep_of(tmp_path, study="throughput")
    rows = [
        {
            **synthetic_rows(Law(0.2, 1, 1, 0.5, 0.5))[0],
            "ranks": w,
            "zero_stage": z,
            "global_batch": b * w,
            "step_s": (0.1 + 0.05 * b + 0.02 * math.log2(w)) * (2 if disturbed and (w + b) % 3 == 0 else 1),
        }
        for w in (1, 2, 4)
        for z in (1, 3)
        for b in (1, 2)
    ]
    runs, _ = throughput_of(rows)
    assert len(runs) == 12
    page = report(sweep, members(sweep, CONFIGS), rows, "x")
    assert "Efficiency per device" in page
    assert "Assumes a device for every rank" in page
    assert "data_wait_per_sample_s" in page
    assert ("do not extrapolate" in page) == disturbed


def test_runs_of_another_setting_are_no_peers_and_have_a_fit_of_their_own(tmp_path: Path) -> None:
    """One rank in float32 takes twice the time of one in bfloat16: each is 100 % of itself, not 67 % and 133 %."""
    sweep = sweep_of(
        tmp_path,
        study="throughput",
        grid={"train.precision": ["fp32", "bf16"], "deepspeed.zero_optimization.stage": [0, 1]},
        points=[{"ranks": w, "train.global_batch": b * w} for w in (1, 2, 4) for b in (1, 2)],
    )
    row = synthetic_rows(Law(0.2, 1, 1, 0.5, 0.5))[0]
    rows = []
    for member in members(sweep, CONFIGS):
        own = {key: value for key, value in result_row(member, State("done"), sweep).items() if value is not None}
        time_s = (0.1 + 0.05 * own["global_batch"] / own["ranks"] + 0.02 * math.log2(own["ranks"])) * (
            1 + ("fp32" in member.name)
        )
        rows.append({**row, **own, "step_s": time_s, "parameters": 10**6})
    assert {name: len(group) for name, group in like_groups(rows).items()} == {
        "hermes, train.precision=fp32": 12,
        "hermes, train.precision=bf16": 12,
    }
    page = report(sweep, members(sweep, CONFIGS), rows, "x")
    assert "a fit each" in page
    assert page.count("<h4>Extrapolated") == 2
    assert "133%" not in page
    assert "do not extrapolate" not in page
    assert {key[0] for key in law_values(rows, "throughput")} == {
        f"throughput: hermes, train.precision={value}" for value in ("fp32", "bf16")
    }


@pytest.mark.parametrize(("batch", "samples", "fillers"), [(2, 1, "6 of them"), (4, 1, "4 of them"), (12, 2, None)])
def test_a_batch_that_the_ranks_do_not_share_evenly(batch: int, samples: int, fillers: str | None, tmp_path: Path) -> None:
    """Half a sample per rank is one sample on half of the ranks, and 1.5 are two on those that the others wait for."""
    sweep = sweep_of(tmp_path, study="throughput")
    row = synthetic_rows(Law(0.2, 1, 1, 0.5, 0.5))[0]
    rows = [
        {**row, "ranks": w, "zero_stage": z, "global_batch": batch, "step_s": 0.1 + 0.05 * math.ceil(batch / w)}
        for w in (1, 2, 4, 8)
        for z in (0, 1)
    ]
    page = html.unescape(report(sweep, members(sweep, CONFIGS), rows, "x"))
    assert f"{samples} samples per rank, the links" in page
    assert (fillers or "computed filler") in page if fillers else "computed filler" not in page
    assert "do not extrapolate" not in page, "the fit knows whole samples"


def test_a_throughput_study_knows_passes_and_leaves_out_models_without_formula(tmp_path: Path) -> None:
    row = synthetic_rows(Law(0.2, 1, 1, 0.5, 0.5))[0]
    runs, _ = throughput_of([{**row, "micro_steps": 4}, {**row, "parameters": None}])
    assert [run.micro_steps for run in runs] == [4]
    sweep = sweep_of(tmp_path, points=[{"ranks": 2, "train.global_batch": 16, "train.micro_batch": 2}])
    member = members(sweep, CONFIGS)[0]
    assert result_row(member, State(), sweep)["micro_steps"] == 4
    page = report(sweep_of(tmp_path, study="throughput"), [member], [{**row, "parameters": None}], "x")
    assert "known parameters" in page


def test_a_law_is_over_runs_that_differ_in_size_and_data_only(tmp_path: Path) -> None:
    """Two learning rates in the grid are two laws; a rate that points tie to a size is part of its recipe."""
    law = Law(0.2, 400.0, 4.0, 0.5, 0.5)
    rows = [{**row, "setting": f"optimizer.lr={lr}"} for lr in (0.1, 0.2) for row in synthetic_rows(law)]
    assert {name: len(group) for name, group in like_groups(rows).items()} == {
        f"hermes, optimizer.lr={lr}": 12 for lr in (0.1, 0.2)
    }
    assert {key[0] for key in law_values(rows, "scaling", bootstrap=2)} == {
        f"scaling: hermes, optimizer.lr={lr}" for lr in (0.1, 0.2)
    }
    assert {key[0] for key in law_values(rows[:12], "scaling", bootstrap=2)} == {"scaling"}
    sweep = sweep_of(tmp_path)
    assert "a law each" in report(sweep, members(sweep, CONFIGS), rows, "x")
    tied = sweep_of(tmp_path, grid={"augment.enabled": [True]}, points=[{"model.base_channels": 8, "optimizer.lr": 0.5}])
    free = sweep_of(tmp_path, grid={"optimizer.lr": [0.5], "model.base_channels": [8], "run.seed": [0]})
    settings = [result_row(members(s, CONFIGS)[0], State(), s)["setting"] for s in (tied, free)]
    assert settings == ["augment.enabled=true", "optimizer.lr=0.5"]


def test_the_commands_of_the_report_can_be_pasted(tmp_path: Path) -> None:
    sweep = sweep_of(tmp_path, overrides={"data.stores": ["a store"]}, points=[{"ranks": 2}])
    chosen = members(sweep, CONFIGS)
    page = html.unescape(report(sweep, chosen, [], "x"))
    lines = [line for line in page.replace("<pre>", "\n").replace("</pre>", "\n").splitlines() if line.startswith("python -m")]
    assert len(lines) == len(chosen)
    words = shlex.split(lines[0])
    assert words[1:5] == ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    assert words[5:] == ["launch/train.py", *chosen[0].arguments]
