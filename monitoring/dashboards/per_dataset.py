"""*Per-dataset learning*: what does each dataset and class learn, and does one of them starve?"""

from __future__ import annotations

from monitoring.dashboards.panels import DATASET, METERS, RUN, SHARE, WINDOW, Board, PanelSpec

_SCORES = f'{RUN},dataset=~"$dataset"'
_DRAWN = f"rate(hermes_dataset_samples_total{{{DATASET}}}[{WINDOW}])"

_TRAINING = (
    PanelSpec(
        "Loss by dataset",
        ((f"avg by (run, dataset, term) (hermes_dataset_loss{{{DATASET}}})", "{{dataset}} {{term}} {{run}}"),),
        "Each dataset's last loss. One that stays up while the others fall: wrong labels or spacing (hermes-shard check), or a "
        "conflict of definitions.",
        width=12,
    ),
    PanelSpec(
        "Loss by class",
        ((f"avg by (run, dataset, task, term) (hermes_task_loss{{{DATASET}}})", "{{dataset}}/{{task}} {{term}} {{run}}"),),
        "A class whose dice loss stays at 1: never found; raise data.foreground.class_weights for it, and look at its labels.",
        width=12,
    ),
    PanelSpec(
        "Share of samples",
        ((f"sum by (dataset) ({_DRAWN}) / on () group_left () sum ({_DRAWN})", "{{dataset}}"),),
        "How often each dataset is drawn. It equals the mixture exactly over each block; if not as wanted, set data.mixture.",
        SHARE,
        "stack",
    ),
    PanelSpec(
        "Trained pairs per second",
        ((f"sum by (dataset, task) (rate(hermes_pairs_total{{{DATASET}}}[{WINDOW}]))", "{{dataset}}/{{task}}"),),
        "(sample, task) pairs that reach the loss, empty ones included. A line at 0: no sample of that dataset is drawn; is it "
        "in the mixture?",
    ),
    PanelSpec(
        "Least trained classes",
        ((f"bottomk(10, sum by (dataset, task) (hermes_foreground_pairs_total{{{DATASET}}}))", "{{dataset}}/{{task}}"),),
        "The ten classes that the fewest patches showed since the start. Zero: lost in conversion, or not in the split; see its "
        "voxels in `hermes-shard info`.",
        kind="bars",
    ),
)

_EVALUATION = (
    PanelSpec(
        "Dice by class",
        ((f"max by (split, dataset, task) (hermes_dice_ratio{{{_SCORES}}})", "{{split}} {{dataset}}/{{task}}"),),
        "Last evaluation. A class at 0 with a falling loss: threshold or geometry, look at the overlay pictures of the report.",
        SHARE,
        "bars",
        12,
    ),
    PanelSpec(
        "Dice over time",
        ((f"avg by (split, dataset) (hermes_dice_ratio{{{_SCORES}}})", "{{split}} {{dataset}}"),),
        "Mean over a dataset's classes. One that falls while the others rise: give it more weight in the mixture.",
        SHARE,
        width=12,
    ),
    PanelSpec(
        "Surface Dice",
        ((f"max by (split, dataset, task) (hermes_nsd_ratio{{{_SCORES}}})", "{{split}} {{dataset}}/{{task}}"),),
        "Normalised surface Dice at evaluate.nsd_tolerance_mm. Low with a high Dice: borders are off by more than the tolerance.",
        SHARE,
        "bars",
        12,
    ),
    PanelSpec(
        "HD95",
        ((f"max by (split, dataset, task) (hermes_hd95_meters{{{_SCORES}}})", "{{split}} {{dataset}}/{{task}}"),),
        "95 % Hausdorff distance in mm. Large with a good Dice: far false positives; train longer, or check what looks alike "
        "elsewhere in the scan.",
        METERS,
        "bars",
        12,
    ),
)

BOARD = Board(
    "hermes-datasets",
    "Hermes · Per-dataset learning",
    "What does each dataset and class learn, and does one of them starve?",
    (("Training", _TRAINING), ("Evaluation", _EVALUATION)),
    ("rank", "dataset"),
)
