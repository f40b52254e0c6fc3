"""Plans: what fits, what is recommended, and that the estimates move the right way."""

from __future__ import annotations

import dataclasses
import io

import pytest
from rich.console import Console

from hermes_dist.config import Config, ModelConfig, resolve, validate
from hermes_dist.parallel.ds_config import BUFFER_ELEMENTS
from hermes_dist.scaling.communication import Cluster
from hermes_dist.scaling.cost_layers import Request
from hermes_dist.scaling.devices import find_device
from hermes_dist.scaling.memory import BUCKET_BYTES, LIVE_BYTES, activation_bytes, state_bytes, transient_bytes
from hermes_dist.scaling.plan_text import print_plan, print_simulation
from hermes_dist.scaling.planning import Assumptions, Plan, make_plan, recommended_sections

CLUSTER = Cluster(8, 450e9, 50e9)
LARGE = resolve(validate({"model": {"base_channels": 48, "blocks": [4, 4, 4, 4]}, "train": {"precision": "bf16"}}))
REQUEST = Request((128, 128, 128), 15, 71, 5)


def plan_of(config: Config = LARGE, device: str = "H100", gpus: int = 16, request: Request = REQUEST) -> Plan:
    return make_plan(config, request, find_device(device), CLUSTER, gpus)


def test_states_by_stage() -> None:
    """float32: 4 (parameters) + 4 (gradients) + 8 (moments) + 4 (average) bytes a parameter, and DeepSpeed's flat copy of a "
    "part."""
    totals = [state_bytes(10**6, stage, 4).total / 1e6 for stage in range(4)]
    assert totals == [20, 4 + 4 + 2 + 1 + 1, 4 + 1 + 2 + 1 + 1, 1 + 1 + 2 + 1 + 1]


def test_what_a_step_adds_by_stage() -> None:
    """Against figures of docs/results/engine.md; the buffers are those that the engine asks DeepSpeed for."""
    assert BUFFER_ELEMENTS["reduce_bucket_size"] * 4 == BUCKET_BYTES
    assert BUFFER_ELEMENTS["stage3_max_live_parameters"] * 4 == LIVE_BYTES
    added = [transient_bytes(60_834_946, stage, 2, 79e6) / 1e6 for stage in range(4)]
    assert added == pytest.approx([323, 323, 281, 359], abs=1)
    assert transient_bytes(10**6, 0, 1, 5e6) == 4e6 + 5e6
    # Hermes-R large with small patches on four ranks: gloo's copy of all weights (stage 2), of a bucket (stage 3).
    added = [transient_bytes(203_470_000, stage, 4, 236 * 2**20, gloo=True) / 2**20 for stage in (2, 3)]
    assert added == pytest.approx([794, 592], rel=0.1)


def test_small_patches_need_the_workspace_of_the_weights() -> None:
    """Hermes-R base and large at 32³, fully recomputed: 108 and 236 MiB more than at rest, without gradients (one process)."""
    request = Request((32, 32, 32), 15, 71, 2)
    for channels, blocks, measured in ((32, (2, 2, 2, 2), 108), (48, (4, 4, 4, 4), 236)):
        model = ModelConfig(base_channels=channels, blocks=blocks)
        found = activation_bytes(model, request, "full", micro_batch=1, bytes_per_element=4) / 2**20
        assert found == pytest.approx(measured, rel=0.1)


def test_checkpointing_saves_what_it_promises() -> None:
    sizes = [
        activation_bytes(LARGE.model, REQUEST, m, micro_batch=1, bytes_per_element=2)
        for m in ("none", "selective", "blocks", "full")
    ]
    assert sizes[0] > 1.5 * sizes[1] >= 1.5 * sizes[2] > sizes[3]
    assert activation_bytes(LARGE.model, REQUEST, "none", micro_batch=3, bytes_per_element=2) == pytest.approx(3 * sizes[0])


def test_the_fastest_option_that_fits_is_recommended() -> None:
    plan = plan_of()
    assert plan.best is not None
    assert plan.best.mode == "none"
    assert plan.best.stage == 1
    assert plan.best.step_s == min(o.step_s for o in plan.options if o.fits)
    sections = recommended_sections(plan)
    assert resolve(validate({**sections, "model": {"base_channels": 48}})).train.micro_batch == plan.best.micro_batch


def test_a_small_card_needs_recomputation_and_a_tiny_one_nothing_fits() -> None:
    roomy = dataclasses.replace(find_device("H100"), memory_bytes=8.0 * 2**30)
    plan = make_plan(LARGE, REQUEST, roomy, CLUSTER, 8)
    assert plan.best is not None
    assert plan.best.mode != "none" or plan.best.stage > 1
    nothing = make_plan(LARGE, REQUEST, dataclasses.replace(roomy, memory_bytes=2 * 2**30), CLUSTER, 8)
    assert nothing.best is None
    assert recommended_sections(nothing) == {}


def test_more_devices_are_faster_and_never_more_efficient() -> None:
    plans = [plan_of(gpus=n) for n in (1, 2, 8, 16)]
    rates = [p.samples_per_s for p in plans]
    assert rates == sorted(rates)
    per_device = [rate / p.world_size for rate, p in zip(rates, plans, strict=True)]
    assert per_device == sorted(per_device, reverse=True)


def test_the_data_need_follows_the_rate() -> None:
    plan = plan_of()
    assert plan.need is not None
    per_node = plan.samples_per_s / 2
    assert plan.need.bytes_per_s_per_node == pytest.approx(per_node * plan.need.read_bytes_per_sample)
    assert plan.need.cpu_cores_per_node == pytest.approx(per_node * Assumptions().cpu_s_per_sample)


def test_a_measured_time_of_nvidia_lies_in_the_range_of_the_estimate() -> None:
    """NVIDIA's nnU-Net: 9.5 images/s of 128³ on an A100 with AMP, batch 4 (facts 10.3): a smaller network, hence the wide "
    "range."""
    config = resolve(
        validate({"model": {"method": "traditional", "base_channels": 32}, "train": {"precision": "bf16", "global_batch": 4}})
    )
    plan = plan_of(config, "A100-80G", 1)
    assert 4 < plan.samples_per_s < 40


def test_the_text_states_numbers_and_assumptions() -> None:
    out = io.StringIO()
    console = Console(file=out, width=140)
    config = resolve(validate({"train": {"global_batch": 8, "precision": "bf16"}}))
    plan = plan_of(config)
    print_plan(console, plan, config, find_device("H100"), CLUSTER, Assumptions())
    print_simulation(console, plan, config, Assumptions(), 4, 10e9)
    text = out.getvalue()
    for part in (
        "60.9 M parameters",
        "TFLOP per sample",
        "MB/s",
        "CPU cores",
        "Assumed",
        "compute filler",
        "zero_optimization",
        "time lost",
    ):
        assert part in text


@pytest.mark.parametrize(
    ("batch", "said"), [(20, "4 of them have 2 samples a step, the other 12 have 1 and wait. Take 16 or 32."), (32, "")]
)
def test_a_batch_that_does_not_divide_by_the_ranks_is_told(batch: int, said: str) -> None:
    out = io.StringIO()
    config = resolve(validate({"train": {"global_batch": batch}}))
    print_plan(Console(file=out, width=140), plan_of(config), config, find_device("H100"), CLUSTER, Assumptions())
    assert said in out.getvalue()
    assert ("does not divide by 16 ranks" in out.getvalue()) == bool(said)


def test_a_plan_of_incremental_learning_says_that_it_is_an_upper_bound() -> None:
    frozen = LARGE.model_copy(update={"train": LARGE.train.model_copy(update={"trainable": "new_tasks"})})
    pages: list[str] = []
    for config in (LARGE, frozen):
        out = io.StringIO()
        print_plan(Console(file=out, width=200), plan_of(config), config, find_device("H100"), CLUSTER, Assumptions())
        pages.append(out.getvalue())
    assert ["upper bounds" in page for page in pages] == [False, True]
    assert pages[1].count("–") > pages[0].count("–")
