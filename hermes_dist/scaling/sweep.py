"""A sweep: a grid of runs, described in JSON, and the commands that make them. Pure: nothing is started here.

    {"name": "scaling", "study": "scaling", "base": "demo.json", "output_dir": "runs",
     "overrides": {"evaluate.every_steps": 0},
     "grid": {"model.base_channels": [8, 16], "train.max_steps": [100, 200], "run.seed": [0]},
     "points": [{"ranks": 1, "train.global_batch": 2}, {"ranks": 2, "train.global_batch": 4}]}

Members = grid × points (each optional). Keys are dotted configuration keys, and `ranks` (processes of one run, default 1).
"""

from __future__ import annotations

import hashlib
import itertools
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, ValidationError

from hermes_dist.config import Config, Section, find_config, load_config
from hermes_dist.errors import ConfigError


class StopConfig(Section):
    """When a run is stopped early."""

    factor: float = Field(default=2.0, gt=1)
    """Diverged: the mean loss of the last `window` steps exceeds the best window's before by this factor, or is NaN or Inf."""
    window: int = Field(default=20, ge=1)
    """Steps of both means; a run of fewer than two windows is not compared."""
    limit_s: float | None = Field(default=None, gt=0)
    """Longest time of one run; then it has failed (default: none)."""


class HeldOutConfig(Section):
    """The loss that a scaling law is fitted to: that of scans which no run was trained on."""

    split: str = "val"
    """Split of the stores."""
    samples: int = Field(default=128, ge=1)
    """Random patches, drawn as in training, without augmentation; the same ones for every run."""


class SweepConfig(Section):
    """A sweep file."""

    name: str
    """Name of the sweep; its runs lie in `output_dir/name/`."""
    study: Literal["scaling", "throughput"] = "scaling"
    """Which report is made: a law of loss, or throughput against ranks."""
    base: str
    """Configuration that the members change: a path, or a name in configs/."""
    output_dir: str = "runs"
    """Folder of the sweep's directory."""
    overrides: dict[str, Any] = Field(default_factory=dict)
    """Dotted keys set in every member."""
    grid: dict[str, list[Any]] = Field(default_factory=dict)
    """Dotted keys and their values; all combinations are run."""
    points: list[dict[str, Any]] = Field(default_factory=lambda: [dict[str, Any]()])
    """Explicit combinations, crossed with the grid."""
    backend: Literal["local", "ray", "slurm"] = "local"
    """Where members run."""
    at_once: int = Field(default=1, ge=1)
    """Members that run at a time, as far as the GPUs of the host suffice: each member has its own."""
    retries: int = Field(default=1, ge=0)
    """How often a run that died is started again; it resumes from its last checkpoint."""
    stop: StopConfig = StopConfig()
    """Early stopping."""
    evaluate: str | None = None
    """Split evaluated after each run (`val`), for curves of Dice."""
    held_out: HeldOutConfig | None = None
    """Loss of each finished run on held-out patches; without it the training loss is fitted."""
    loss_fraction: float = Field(default=0.1, gt=0, le=1)
    """The training loss is the mean over this last share of the steps."""


@dataclass(frozen=True)
class Member:
    """One run of a sweep. `overrides` is complete: the base configuration and these make the run."""

    index: int
    name: str
    ranks: int
    overrides: dict[str, Any]
    base: Path
    run_dir: Path

    @property
    def arguments(self) -> list[str]:
        """Of launch/train.py."""
        pairs = [f"{key}={value if isinstance(value, str) else json.dumps(value)}" for key, value in self.overrides.items()]
        return ["--config", str(self.base), *pairs]

    @property
    def metrics(self) -> Path:
        """Its metrics.jsonl."""
        return self.run_dir / "metrics.jsonl"

    def evaluation(self, name: str) -> Path:
        """`evaluation/NAME.json` of its run directory."""
        return self.run_dir / "evaluation" / f"{name}.json"

    def held_out(self, wanted: HeldOutConfig) -> Path:
        """Where its held-out loss is written."""
        return self.evaluation(f"{wanted.split}_loss")

    def results(self, sweep: SweepConfig) -> list[Path]:
        """Files that the sweep wants of a finished member."""
        wanted = [self.held_out(sweep.held_out)] if sweep.held_out else []
        return wanted + ([self.evaluation(sweep.evaluate)] if sweep.evaluate else [])

    def evaluations(self, sweep: SweepConfig, script: Path) -> list[list[str]]:
        """Commands that follow the training."""
        start = [sys.executable, str(script), "--run", str(self.run_dir), "--threads", "1", "--split"]
        held_out = sweep.held_out
        commands = [[*start, held_out.split, "--loss", str(held_out.samples)]] if held_out else []
        return commands + ([[*start, sweep.evaluate]] if sweep.evaluate else [])

    def command(self, train: Path) -> list[str]:
        """The command that a person would type; `python` for one rank, torch's launcher for more."""
        if self.ranks == 1:
            return [sys.executable, str(train), *self.arguments]
        launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={self.ranks}"]
        return [sys.executable, *launcher, str(train), *self.arguments]

    def config(self) -> Config:
        """The configuration of this member. Raises ConfigError for unknown keys or wrong values."""
        return load_config(self.base, self.arguments[2:])


def read_sweep(path: Path) -> SweepConfig:
    """Raises ConfigError naming the wrong key."""
    try:
        return SweepConfig.model_validate_json(path.read_text())
    except (OSError, ValidationError) as error:
        raise ConfigError(f"{path}: {error}") from None


PLACES = {
    "run.name": "the members are named by their values, and the sweep by `name`",
    "run.output_dir": "set `output_dir`",
    "run.resume": "members always resume; delete a member's directory to start it anew",
}
"""Keys that a sweep sets itself, and what to do in its file instead."""


def split_override(sweep: SweepConfig, pair: str) -> tuple[str, str]:
    """Key and value of a `section.key=value` of the command line.

    Raises:
        ConfigError: it is no such pair, or would have no effect, as each member has a value of its own.
    """
    key, sign, text = pair.partition("=")
    if not sign:
        raise ConfigError(f"override {pair!r}: expected section.key=value")
    chosen = {name: f"change `grid[{name!r}]`" for name in sweep.grid}
    chosen |= {name: f"change {name!r} in `points`" for point in sweep.points for name in point}
    for name, instead in {**chosen, **PLACES}.items():
        if f"{key}.".startswith(f"{name}.") or f"{name}.".startswith(f"{key}."):
            raise ConfigError(f"override {key!r}: sweep {sweep.name!r} sets {name!r} for each member. In its file: {instead}")
    return key, text


def members(sweep: SweepConfig, config_dir: Path) -> list[Member]:
    """All members in order of the grid. Raises ConfigError if one of them has an invalid configuration or two are the same."""
    base = find_config(sweep.base, config_dir)
    folder = Path(sweep.output_dir) / sweep.name
    result: list[Member] = []
    for values in itertools.product(*sweep.grid.values()):
        for point in sweep.points:
            changed = {**dict(zip(sweep.grid, values, strict=True)), **point}
            ranks = int(changed.pop("ranks", 1))
            name = _name(changed, ranks)
            fixed = {"run.name": name, "run.output_dir": str(folder), "run.resume": "auto"}
            result.append(Member(len(result), name, ranks, {**sweep.overrides, **changed, **fixed}, base, folder / name))
    names = [member.name for member in result]
    for name in names:
        if names.count(name) > 1:
            raise ConfigError(f"sweep {sweep.name!r}: the combination {name!r} occurs twice in grid × points")
    for member in result:
        member.config()
    return result


def _name(changed: dict[str, Any], ranks: int) -> str:
    """`base_channels8-max_steps100-r2`: what differs, readable; with a short hash where it would be long."""
    parts = [f"{key.split('.')[-1]}{_plain(value)}" for key, value in changed.items()] + ([f"r{ranks}"] if ranks > 1 else [])
    name = "-".join(parts) or "run"
    return name if len(name) <= 80 else f"{name[:70]}-{hashlib.blake2b(name.encode(), digest_size=4).hexdigest()}"


def _plain(value: Any) -> str:
    if isinstance(value, list):
        return ".".join(map(_plain, value))
    text = value if isinstance(value, str) else json.dumps(value)
    return "".join(c if c.isalnum() or c in ".+" else "_" for c in text).strip("_")
