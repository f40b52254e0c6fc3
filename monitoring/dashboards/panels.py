"""What a dashboard is made of: a plain description of each panel, and its translation to Grafana by grafana-foundation-sdk.

The boards describe panels as data (`PanelSpec`), so that tests can evaluate every expression against a real Prometheus.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from grafana_foundation_sdk.builders import bargauge, common, dashboard, prometheus, stat, table, timeseries
from grafana_foundation_sdk.cog import builder as cog
from grafana_foundation_sdk.models import common as common_models
from grafana_foundation_sdk.models import dashboard as models
from grafana_foundation_sdk.models import units
from grafana_foundation_sdk.models.prometheus import PromQueryFormat

RUN = 'run=~"$run"'
RANK = f'{RUN},rank=~"$rank"'
DATASET = f'{RANK},dataset=~"$dataset"'
WINDOW = "$__rate_interval"

SECONDS, BYTES, SHARE, COUNT, BYTES_PER_S = units.Seconds, units.BytesIEC, units.PercentUnit, units.Short, units.BytesPerSecondIEC
METERS = units.Meter  # Grafana shows 0.0021 m as 2.1 mm

Kind = Literal["lines", "stack", "stat", "bars", "table"]
SOURCE = models.DataSourceRef(type_val="prometheus", uid="${datasource}")


@dataclass(frozen=True)
class PanelSpec:
    """One panel. `quiet` panels hold no series while nothing goes wrong; the description says what to do when it looks bad."""

    title: str
    queries: tuple[tuple[str, str], ...]
    description: str
    unit: str = COUNT
    kind: Kind = "lines"
    width: int = 8
    quiet: bool = False


@dataclass(frozen=True)
class Board:
    """One dashboard: rows of panels, and which variables it offers besides the data source and the run."""

    uid: str
    title: str
    description: str
    rows: tuple[tuple[str, tuple[PanelSpec, ...]], ...]
    variables: tuple[str, ...] = field(default=("rank",))

    @property
    def panels(self) -> tuple[PanelSpec, ...]:
        """All panels in order."""
        return tuple(panel for _, panels in self.rows for panel in panels)


def quantiles(metric: str, selector: str, by: str = "run") -> tuple[tuple[str, str], ...]:
    """Median, 95 % and 99 % of a histogram."""
    return tuple(
        (
            f"histogram_quantile({q}, sum by (le, {by}) (rate({metric}_bucket{{{selector}}}[{WINDOW}])))",
            f"p{round(100 * q)} {{{{{by}}}}}",
        )
        for q in (0.5, 0.95, 0.99)
    )


def build(board: Board) -> models.Dashboard:
    """The Grafana dashboard."""
    result = (
        dashboard.Dashboard(board.title)
        .uid(board.uid)
        .description(board.description)
        .tags(["hermes"])
        .refresh("10s")
        .time("now-1h", "now")
        .tooltip(models.DashboardCursorSync.CROSSHAIR)
        .link(
            dashboard.DashboardLink("Hermes dashboards")
            .type(models.DashboardLinkType.DASHBOARDS)
            .tags(["hermes"])
            .as_dropdown(True)
        )
        .with_variable(dashboard.DatasourceVariable("datasource").label("Data source").type("prometheus"))
        .with_variable(_variable("run", "label_values(hermes_disk_size_bytes, run)"))  # which sweeps export too
    )
    queries = {
        "rank": 'label_values(hermes_world_size{run=~"$run"}, rank)',
        "dataset": 'label_values(hermes_dataset_samples_total{run=~"$run"}, dataset)',
    }
    for name in board.variables:
        result = result.with_variable(_variable(name, queries[name]))
    for title, panels in board.rows:
        result = result.with_row(dashboard.Row(title))
        for panel in panels:
            result = result.with_panel(_panel(panel))
    return result.build()


def _variable(name: str, query: str) -> dashboard.QueryVariable:
    return (
        dashboard.QueryVariable(name)
        .label(name.capitalize())
        .query(query)
        .datasource(SOURCE)
        .refresh(models.VariableRefresh.ON_TIME_RANGE_CHANGED)
        .sort(models.VariableSort.NUMERICAL_ASC)
        .multi(True)
        .include_all(True)
        .all_value(".*")
        .current(models.VariableOption(selected=True, text="All", value="$__all"))
    )


def _panel(spec: PanelSpec) -> cog.Builder[models.Panel]:
    panel: timeseries.Panel | stat.Panel | bargauge.Panel | table.Panel
    if spec.kind in ("lines", "stack"):
        panel = timeseries.Panel().fill_opacity(60 if spec.kind == "stack" else 5).show_points(common_models.VisibilityMode.AUTO)
        panel = panel.legend(common.VizLegendOptions().show_legend(True).placement(common_models.LegendPlacement.BOTTOM))
        panel = panel.tooltip(common.VizTooltipOptions().mode(common_models.TooltipDisplayMode.MULTI))
        if spec.kind == "stack":
            panel = panel.stacking(common.StackingConfig().mode(common_models.StackingMode.NORMAL))
    elif spec.kind == "stat":
        panel = stat.Panel().graph_mode(common_models.BigValueGraphMode.AREA)
    elif spec.kind == "bars":
        panel = bargauge.Panel().orientation(common_models.VizOrientation.HORIZONTAL)
    else:
        panel = table.Panel()
    panel = panel.title(spec.title).description(spec.description).unit(spec.unit).datasource(SOURCE)
    panel = panel.height(5 if spec.kind == "stat" else 8).span(spec.width)
    for index, (expression, legend) in enumerate(spec.queries):
        query = prometheus.Dataquery().expr(expression).legend_format(legend).ref_id(chr(ord("A") + index))
        if spec.kind == "table":
            query = query.instant().format(PromQueryFormat.TABLE)
        elif spec.kind in ("bars", "stat"):
            query = query.instant() if spec.kind == "bars" else query.range()
        panel = panel.with_target(query)
    return panel
