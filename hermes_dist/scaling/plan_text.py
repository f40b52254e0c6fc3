"""A plan as text for a terminal: tables, the assumptions, and the sections to paste into a configuration."""

from __future__ import annotations

import json
import math
from dataclasses import replace

from rich.console import Console
from rich.table import Table

from hermes_dist.config import Config
from hermes_dist.scaling.communication import Cluster
from hermes_dist.scaling.data_path import DataPath, simulate
from hermes_dist.scaling.devices import Device
from hermes_dist.scaling.planning import Assumptions, Option, Plan, recommended_sections

GIB = 2**30


def print_plan(console: Console, plan: Plan, config: Config, device: Device, cluster: Cluster, assume: Assumptions) -> None:
    """Everything that launch/plan.py says."""
    train, patch = config.train, "×".join(map(str, config.data.patch_vox_zyx))
    nodes = math.ceil(plan.world_size / cluster.devices_per_node)
    console.print(
        f"[bold]{config.run.name}[/]: {plan.parameters / 1e6:.1f} M parameters, {plan.flops_per_sample / 1e12:.3g} TFLOP per "
        "sample "
        f"(patch {patch}, forward and backward); {plan.world_size} × {device.name} on {nodes} node(s), {train.precision}",
        highlight=False,
    )
    all_learn = train.trainable == "all"
    console.print(_options_table(plan, utilised=all_learn))
    if not all_learn:
        console.print(
            "[yellow]train.trainable=new_tasks: FLOPs, step time, memory, communication and cost are upper bounds, those of a "
            "run in which all weights learn; MFU is left out.[/]"
        )
    if train.global_batch < plan.world_size:
        console.print(
            f"[yellow]train.global_batch={train.global_batch} is smaller than the number of ranks: "
            f"{plan.world_size - train.global_batch} of them compute filler.[/]"
        )
    elif fuller := train.global_batch % plan.world_size:
        share = train.global_batch // plan.world_size
        console.print(
            f"[yellow]train.global_batch={train.global_batch} does not divide by {plan.world_size} ranks: {fuller} of them have "
            f"{share + 1} samples a step, the other {plan.world_size - fuller} have {share} and wait. Take "
            f"{share * plan.world_size} or {(share + 1) * plan.world_size}.[/]",
            soft_wrap=True,
        )
    best = plan.best
    if best is None or plan.need is None:
        console.print(
            "[red]Nothing fits.[/] Take a smaller patch (data.patch_vox_zyx), a smaller model, train.offload_activations=true, "
            "or a device with more memory."
        )
        return
    epochs = "" if train.max_steps == 1 else f" for {train.max_steps} steps of {train.global_batch} samples"
    console.print(
        f"\n[bold]Expected[/] {plan.samples_per_s:.3g} samples/s, {best.step_s:.3g} s a step, {plan.hours:.3g} h, about "
        f"{plan.usd:,.0f} USD{epochs} (evaluation and checkpoints not counted)\n"
        f"[bold]Each node must[/] stream {plan.need.bytes_per_s_per_node / 1e6:,.0f} MB/s "
        f"({plan.need.read_bytes_per_sample / 1e6:.1f} MB a sample) and keep {plan.need.cpu_cores_per_node:.1f} CPU cores busy "
        "with it\n"
        f"[bold]Each rank sends[/] {best.communication_bytes / 1e6:,.0f} MB a step, {best.communication_s * 1e3:.1f} ms of it "
        "exposed\n"
        f"[bold]Assumed[/] {assume.utilisation:.0%} of the peak of {device.peak(train.precision) / 1e12:.0f} TFLOP/s on one "
        "device, "
        f"{assume.overlap:.0%} of communication hidden, {assume.cpu_s_per_sample:.2g} CPU s per 128³ sample, "
        f"{assume.compression}× "
        f"compression, {device.usd_per_hour:g} USD per device and hour, no waiting for data",
        highlight=False,
        soft_wrap=True,
    )
    console.print("\n[bold]Recommended[/] (put this into the configuration):")
    console.print_json(json.dumps(recommended_sections(plan)))


def _options_table(plan: Plan, *, utilised: bool) -> Table:
    table = Table(title="What fits, by ZeRO stage and activation checkpointing", title_justify="left")
    columns = ("ZeRO", "checkpointing", "micro-batch", "states GiB", "activations GiB", "step s", "MFU", "recomputed", "sent MB")
    for name in columns:
        table.add_column(name, justify="left" if name == "checkpointing" else "right")
    for option in plan.options:
        table.add_row(
            *_cells(option, utilised=utilised), style="bold green" if option == plan.best else None if option.fits else "dim"
        )
    return table


def _cells(option: Option, *, utilised: bool) -> tuple[str, ...]:
    states = f"{option.state_bytes / GIB:.2f}"
    if not option.fits:
        return (str(option.stage), option.mode, "–", states, "does not fit", "", "", "", "")
    return (
        str(option.stage),
        option.mode,
        str(option.micro_batch),
        states,
        f"{option.activation_bytes / GIB:.2f}",
        f"{option.step_s:.3g}",
        f"{option.mfu:.1%}" if utilised else "–",
        f"{option.recomputed_share:.0%}",
        f"{option.communication_bytes / 1e6:,.0f}",
    )


def print_simulation(
    console: Console, plan: Plan, config: Config, assume: Assumptions, workers: int, storage_bytes_per_s: float
) -> None:
    """Stall fraction of the data path for the planned speed, without and with failures."""
    assert plan.best is not None
    assert plan.need is not None
    ranks = min(plan.world_size, config.train.global_batch)  # the others compute filler and read nothing
    path = DataPath(
        ranks,
        math.ceil(config.train.global_batch / ranks),
        plan.best.step_s,
        workers,
        config.stream.prefetch,
        assume.cpu_s_per_sample * math.prod(config.data.patch_vox_zyx) / 128**3,
        plan.need.read_bytes_per_sample,
        storage_bytes_per_s,
    )
    table = Table(
        title=f"Data path: {ranks} ranks × {workers} workers, {storage_bytes_per_s / 1e9:g} GB/s storage (simulated, order kept)",
        title_justify="left",
    )
    for name in ("prefetch", "jitter", "failing reads", "time lost", "median wait s", "p99 wait s", "samples/s"):
        table.add_column(name, justify="right")
    for prefetch in (path.prefetch, 4 * path.prefetch):
        for jitter, failures in ((0.3, 0.0), (1.0, 0.0), (0.3, 1e-4), (1.0, 1e-3)):
            result = simulate(replace(path, prefetch=prefetch, jitter=jitter, failure_probability=failures), steps=200)
            wait = f"{result.wait_p50_s:.3g}", f"{result.wait_p99_s:.3g}"
            stalls = f"{result.stall_fraction:.1%}"
            table.add_row(str(prefetch), f"{jitter:.0%}", f"{failures:.2%}", stalls, *wait, f"{result.samples_per_s:,.0f}")
    console.print(table)
