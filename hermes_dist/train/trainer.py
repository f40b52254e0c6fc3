"""The training loop: every call named, in order. What a step computes is in `step.py`; who computes it is the plan's business."""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from hermes_dist.config import Config
from hermes_dist.errors import CheckpointError, HermesError, NumericalError, WaitTimeoutError
from hermes_dist.models import build_model
from hermes_dist.models.checkpointing import apply_activation_checkpointing
from hermes_dist.models.compilation import compile_blocks
from hermes_dist.parallel.agreement import check_shared
from hermes_dist.parallel.checkpoint import Checkpointer
from hermes_dist.parallel.ds_config import build_ds_config
from hermes_dist.parallel.engine import Engine, StepStats
from hermes_dist.parallel.runtime import Runtime
from hermes_dist.scaling.utilisation import Utilisation
from hermes_dist.stream.batch import StepBatch
from hermes_dist.stream.loader import Stream, open_stream
from hermes_dist.stream.prepare import build_reader
from hermes_dist.tasks import TaskTable
from hermes_dist.telemetry.telemetry import Telemetry
from hermes_dist.train import run_directory, transfer
from hermes_dist.train.environment import git_commit
from hermes_dist.train.evaluate import EvaluationStopped, Job, evaluate_during_training, find_cases
from hermes_dist.train.record import LossSums, StepRecord
from hermes_dist.train.schedule import learning_rate
from hermes_dist.train.step import StepLoss, chain_hash

UNREADABLE, WAITED = -1, -2
"""In the place of a sample's position: what else ranks tell each other after a step."""


@dataclass
class TrainState:
    """All that a run needs to go on, apart from weights and optimizer: a handful of values, JSON-able, versioned."""

    step: int = 0
    order_hash: str = ""
    skipped: int = 0
    seed: int = 0
    tasks_digest: str = ""
    collection_digest: str = ""
    best_dice: float | None = None
    evaluated_step: int = 0
    position: int | None = None
    """Of the next sample in the plan. None in checkpoints from before it was kept: step · train.global_batch."""
    plan_digest: str = ""
    quarantined: list[int] = field(default_factory=list[int])
    """Cases found to be unreadable; at most `stream.faults.max_quarantined`."""
    version: int = 1


@dataclass(frozen=True)
class TrainResult:
    """How a run ended. `stopped_early` = a termination signal asked for it and a checkpoint was written."""

    step: int
    loss: float
    stopped_early: bool


def train(config: Config, runtime: Runtime) -> TrainResult:
    """Train to `train.max_steps`, or until a termination signal; resumes as `run.resume` says.

    Raises:
        HermesError: any of the errors of `hermes_dist.errors`, always before or between steps.
    """
    stores, tasks, preprocessing = run_directory.open_stores(config)
    tasks = transfer.extend(config.train, tasks)
    fresh = TrainState(seed=config.run.seed, tasks_digest=tasks.digest, collection_digest=run_directory.collection_digest(stores))
    # Whatever can be found wrong in the configuration is found before anything is written.
    transfer.check_source(config.train, preprocessing.model_dump(mode="json"))
    plan = build_reader(config, stores, tasks)[0].plan
    if config.evaluate.every_steps:
        find_cases(Job(config.run_dir, config, stores, tasks, config.evaluate.split, ""))
    build_ds_config(config, runtime.world_size)
    torch.manual_seed(config.run.seed)
    model = build_model(config.model, tasks)
    initial = transfer.initialise(model, config, tasks)
    if runtime.rank == 0:
        run_directory.prepare(config, tasks, preprocessing, runtime.world_size, fresh.collection_digest)
    check_shared(config.run_dir / "checkpoints", runtime)
    apply_activation_checkpointing(model, config.train.activation_checkpointing, config.train.offload_activations)
    if config.train.compile:
        compile_blocks(model)
    engine = Engine(model, config, runtime)
    checkpointer = Checkpointer(config.run_dir, config.checkpoint, runtime)
    saved = checkpointer.load(engine, config.run.resume)
    state = _restore(saved, fresh, config)
    if saved is None and initial is not None:
        runtime.say(initial)
    telemetry = Telemetry(config.run_dir, config.monitor, runtime.rank, runtime.world_size, config.run.name)
    telemetry.resume(state.step)
    telemetry.declare([tasks.datasets[group.dataset] for group in plan.groups])
    if saved is not None and saved["collection_digest"] != state.collection_digest:
        _note_changed_collection(saved["collection_digest"], state, runtime, telemetry)
    elif state.plan_digest not in ("", plan.digest):
        _note_changed_order(plan.digest, state, runtime, telemetry)
    state.plan_digest = plan.digest
    used = Utilisation(config, tasks, torch.cuda.get_device_name() if runtime.device.type == "cuda" else None)
    telemetry.extend(used)
    if used.peak:
        telemetry.set("hermes_device_peak_flops", used.peak)
    checkpointer.telemetry = telemetry
    telemetry.set("hermes_run_info", 1, world_size=str(runtime.world_size), device=str(runtime.device), commit=git_commit() or "")
    telemetry.set("hermes_max_steps", config.train.max_steps)
    telemetry.set("hermes_parameters", sum(engine.partition.shapes[name].numel() for name in engine.partition.trainable_names))
    telemetry.set("hermes_world_size", runtime.world_size)
    telemetry.set("hermes_evaluating", 0)
    if config.checkpoint.every_steps:
        telemetry.set("hermes_checkpoint_timestamp_seconds", time.time())
    runtime.say(
        f"{config.run_dir}: step {state.step} of {config.train.max_steps}, {len(tasks.datasets)} datasets, {tasks.n_tasks} tasks"
    )
    loss = float("nan")

    def evaluate() -> None:
        telemetry.set("hermes_evaluating", 1)
        try:
            dice = evaluate_during_training(engine, config, stores, tasks, runtime, telemetry, state.step)
        except EvaluationStopped:  # `state` says that it is still to be done
            return
        finally:
            telemetry.set("hermes_evaluating", 0)
        best = _is_best(dice, state, runtime)
        state.evaluated_step = state.step
        checkpointer.amend(engine, asdict(state), state.step, best=best)

    try:
        if _evaluation_due(state, config):
            evaluate()  # the run was stopped after the checkpoint of this step, and before it was evaluated
        if runtime.stop_requested:  # meanwhile: a step would leave the evaluation behind
            checkpointer.finish()
            return TrainResult(state.step, loss, stopped_early=_unfinished(state, config))
        with open_stream(
            config,
            stores,
            tasks,
            rank=runtime.rank,
            world_size=runtime.world_size,
            start_step=state.step,
            telemetry=telemetry,
            start_position=state.position,
            quarantined=state.quarantined,
        ) as stream:
            for batch in stream:
                loss = _one_step(engine, batch, stream, state, config, tasks, runtime, telemetry)
                stop = runtime.stop_requested
                due = config.checkpoint.every_steps and state.step % config.checkpoint.every_steps == 0
                last = state.step == config.train.max_steps
                if stop or due or last:
                    checkpointer.save(engine, asdict(state), state.step, urgent=stop or last)
                # Long: whatever happens meanwhile, the checkpoint is safe. A run that is stopped has no time for it, and does
                # it when it goes on.
                if not stop and _evaluation_due(state, config):
                    evaluate()
                    stop = runtime.stop_requested
                    if stop and checkpointer.saved_step != state.step:
                        checkpointer.save(engine, asdict(state), state.step, urgent=True)
                if stop or last:
                    break
            checkpointer.finish()  # before the stream is tidied up: whatever goes wrong there, the checkpoint is complete
    except HermesError as error:
        for event in error.events:
            telemetry.event({"step": state.step, **event})
        telemetry.event({"kind": "failure", "step": state.step, "error": f"{type(error).__name__}: {error}"})
        if isinstance(error, WaitTimeoutError):
            runtime.alarm.ring(str(error), error)
        raise
    finally:
        telemetry.close()
    return TrainResult(state.step, loss, stopped_early=_unfinished(state, config))


def _one_step(
    engine: Engine,
    batch: StepBatch,
    stream: Stream,
    state: TrainState,
    config: Config,
    tasks: TaskTable,
    runtime: Runtime,
    telemetry: Telemetry,
) -> float:
    started = time.perf_counter()
    lr = learning_rate(batch.step, config.train.max_steps, config.optimizer)
    sums = LossSums.zeros(tasks, runtime.device)
    loss_fn = StepLoss(config.loss, batch, sums, null_column=config.model.priors.padding == "attended")
    stats = engine.step([b.to(runtime.device) for b in batch.micro_batches], loss_fn, lr)
    total = sums.unpack(runtime.sum(sums.packed()))
    samples = _share(batch, stream, runtime)
    state.order_hash = chain_hash(state.order_hash, samples[:, 0], samples[:, 1])
    before = state.position if state.position is not None else batch.step * config.train.global_batch
    state.step, state.position = batch.step + 1, before + config.train.global_batch
    state.quarantined = stream.quarantine.cases
    state.skipped += int(stats.skipped)
    for event in batch.events:
        telemetry.event({"step": batch.step, **event})
    if stats.skipped:
        _name_suspects(batch, stats, runtime, telemetry)
    step_s = time.perf_counter() - started + batch.data_wait_s
    record = StepRecord(batch, stats, total, lr, state.order_hash, len(samples), state.position, step_s)
    row = record.row(config, tasks)
    telemetry.step(row)
    stream.quarantine.check()
    _report(row, state, config, runtime)
    return float(row["loss"])


def _share(batch: StepBatch, stream: Stream, runtime: Runtime) -> npt.NDArray[np.int64]:
    """(position, identity) of the step's samples of all ranks.

    What they found unreadable travels along, as position -1, and how long each waited for its samples (µs), as position -2.
    """
    news = [[UNREADABLE, case] for case in batch.unreadable] + [[WAITED, int(batch.data_wait_s * 1e6)]]
    mine = np.concatenate([np.stack([batch.positions, batch.identities], axis=1), news])
    parts = [part.reshape(-1, 2) for part in runtime.gather_int64(mine.astype(np.int64).ravel())]
    batch.data_stall_s = max(int(part[part[:, 0] == WAITED, 1].max()) for part in parts) / 1e6
    if runtime.world_size > 1:
        found = [part[part[:, 0] == UNREADABLE, 1].tolist() for part in parts]
        batch.events = stream.quarantine.settle(batch.events, found, runtime.rank)
    samples = np.concatenate(parts)
    return samples[samples[:, 0] >= 0]


def _name_suspects(batch: StepBatch, stats: StepStats, runtime: Runtime, telemetry: Telemetry) -> None:
    """Say which samples a skipped step held, on the terminal and in stream.jsonl: first those whose own loss was not finite."""
    suspects = [case for index in stats.bad_micro_batches for case in batch.cases_of(index)]
    telemetry.event({"kind": "skipped_step", "step": batch.step, "samples": batch.cases, "loss_not_finite": suspects})
    everywhere = runtime.gather_lines(suspects)
    cause = f"the loss of {', '.join(everywhere)} is" if everywhere else "all losses are finite, and a gradient is"
    runtime.say(
        f"step {batch.step} skipped on all ranks: {cause} NaN or Inf; its samples: {', '.join(runtime.gather_lines(batch.cases))}"
    )


def _note_changed_collection(before: str, state: TrainState, runtime: Runtime, telemetry: Telemetry) -> None:
    """Say that the run goes on with other data, which was allowed, on the terminal and in stream.jsonl of rank 0."""
    runtime.say(f"goes on with a changed collection ({before[:8]} → {state.collection_digest[:8]}) from step {state.step}")
    if runtime.rank == 0:
        change = {"from": before, "to": state.collection_digest}
        telemetry.event({"kind": "changed_collection", "step": state.step, **change})


def _note_changed_order(digest: str, state: TrainState, runtime: Runtime, telemetry: Telemetry) -> None:
    """Say that mixture, split, block or foreground sampling are others than at the checkpoint, as above."""
    runtime.say(f"goes on with another order of samples ({state.plan_digest[:8]} → {digest[:8]}) from step {state.step}")
    if runtime.rank == 0:
        telemetry.event({"kind": "changed_order", "step": state.step, "from": state.plan_digest, "to": digest})


def _evaluation_due(state: TrainState, config: Config) -> bool:
    every = config.evaluate.every_steps
    return state.step > 0 and every > 0 and state.step % every == 0 and state.evaluated_step != state.step


def _unfinished(state: TrainState, config: Config) -> bool:
    """Whether the same command has more to do."""
    return state.step < config.train.max_steps or _evaluation_due(state, config)


def _is_best(dice: float | None, state: TrainState, runtime: Runtime) -> bool:
    """Whether rank 0's `dice` is the best so far: the same answer on every rank."""
    seen = float(runtime.sum(torch.tensor([dice if dice is not None else 0.0], dtype=torch.float64))[0])
    if seen <= (state.best_dice or 0.0):
        return False
    state.best_dice = seen
    return True


def _report(row: dict[str, Any], state: TrainState, config: Config, runtime: Runtime) -> None:
    """Lines on the terminal, and the limit on skipped steps. Raises NumericalError above `train.max_skipped`."""
    if state.step % config.monitor.log_every == 0 or state.step == config.train.max_steps:
        waited = row["data_stall_s"] / max(row["step_s"], 1e-9)
        runtime.say(
            f"step {state.step:>6}  loss {row['loss']:.4f}  dice loss {row['loss_dice']:.4f}  lr {row['lr']:.2e}  "
            f"{row['step_s']:.2f} s  data {waited:.0%}"
        )
    if state.skipped > config.train.max_skipped:
        raise NumericalError(
            f"{state.skipped} steps had NaN or Inf in loss or gradient, more than train.max_skipped={config.train.max_skipped}; "
            f"the last good checkpoint is in {config.run_dir / 'checkpoints'}; lower optimizer.lr, or look at the "
            "samples named above and in stream.jsonl"
        )


def _restore(saved: dict[str, Any] | None, fresh: TrainState, config: Config) -> TrainState:
    """The state to go on from. Raises CheckpointError if the checkpoint is of another task table, collection or seed."""
    if saved is None:
        return fresh
    state = TrainState(**saved)
    if state.tasks_digest != fresh.tasks_digest:
        raise CheckpointError(
            f"{config.run_dir}: the checkpoint was trained on another task table ({state.tasks_digest[:8]}) than data.stores "
            f"declare now ({fresh.tasks_digest[:8]}); use launch/finetune.py to carry weights over to new tasks"
        )
    if state.collection_digest != fresh.collection_digest and not config.data.allow_changed_collection:
        raise CheckpointError(
            f"{config.run_dir}: the stores' content changed since the checkpoint ({state.collection_digest[:8]} → "
            f"{fresh.collection_digest[:8]}), so the order of samples would change; "
            "restore the stores, or accept it with data.allow_changed_collection=true (recorded in stream.jsonl)"
        )
    if state.seed != fresh.seed:
        raise CheckpointError(
            f"{config.run_dir}: the checkpoint was trained with run.seed={state.seed}, now {fresh.seed}; choose another run.name"
        )
    if state.collection_digest != fresh.collection_digest:
        state.collection_digest, state.quarantined = fresh.collection_digest, []  # the numbers of cases are others now
    return state
