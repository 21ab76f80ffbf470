"""How a panel looks as JSON of Grafana 11.6 and later: one function for each kind that the dashboards use."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

Json = dict[str, Any]
SOURCE: Json = {"type": "prometheus", "uid": "${datasource}"}
WIDTH = 24
GREEN, YELLOW, RED, BLUE = "green", "yellow", "red", "blue"


@dataclass(frozen=True)
class Query:
    """A PromQL expression; `legend` may hold `{{label}}`. `instant`: its newest value only, for tables and figures."""

    expr: str
    legend: str = ""
    instant: bool = False


def steps(first: str, *others: tuple[float, str]) -> Json:
    """Thresholds: a colour from the bottom, and others from a value on."""
    return {
        "mode": "absolute",
        "steps": [{"color": first, "value": None}, *({"color": color, "value": value} for value, color in others)],
    }


def values(*shown: tuple[float, str, str]) -> list[Json]:
    """Value mappings: (value, text, colour)."""
    options = {f"{value:g}": {"text": text, "color": color, "index": n} for n, (value, text, color) in enumerate(shown)}
    return [{"type": "value", "options": options}]


def row(title: str) -> Json:
    return {"type": "row", "title": title, "collapsed": False, "panels": [], "width": WIDTH, "height": 1}


def lines(
    title: str,
    description: str,
    queries: Sequence[Query],
    *,
    unit: str,
    axis: str = "",
    width: int = 8,
    stacked: bool = False,
    bars: bool = False,
    stepped: bool = False,
    limit: Json | None = None,
    most: float | None = None,
    decimals: int | None = None,
) -> Json:
    """Series over time. `limit`: thresholds that are drawn as lines. `most`: top of the axis. All axes begin at 0."""
    custom: Json = {
        "drawStyle": "bars" if bars else "line",
        "lineInterpolation": "stepAfter" if stepped else "linear",
        "lineWidth": 1,
        "fillOpacity": 60 if bars else 20 if stacked else 8,
        "showPoints": "never",
        "spanNulls": False,
        "axisLabel": axis,
        "stacking": {"mode": "normal" if stacked else "none", "group": "A"},
        "thresholdsStyle": {"mode": "line" if limit else "off"},
    }
    defaults: Json = {"unit": unit, "min": 0, "custom": custom, "thresholds": limit or steps(GREEN)}
    if most is not None:
        defaults["max"] = most
    if decimals is not None:
        defaults["decimals"] = decimals
    options = {
        "legend": {"displayMode": "list", "placement": "bottom", "showLegend": True, "calcs": []},
        "tooltip": {"mode": "multi", "sort": "desc"},
    }
    return _panel("timeseries", title, description, queries, defaults, options, width, 8)


def figure(
    title: str,
    description: str,
    query: Query,
    *,
    unit: str,
    thresholds: Json,
    mapped: list[Json] | None = None,
    empty: str = "no data",
) -> Json:
    """One large number, the newest; `empty`: what is shown where there is none."""
    defaults: Json = {"unit": unit, "thresholds": thresholds, "mappings": mapped or [], "noValue": empty}
    options = {
        "reduceOptions": {"calcs": ["lastNotNull"], "fields": "", "values": False},
        "colorMode": "background",
        "graphMode": "none",
        "textMode": "auto",
        "justifyMode": "auto",
        "orientation": "auto",
        "percentChangeColorMode": "standard",
        "showPercentChange": False,
        "wideLayout": True,
    }
    return _panel("stat", title, description, [query], defaults, options, 4, 4)


def timeline(title: str, description: str, query: Query, *, mapped: list[Json], width: int = 12) -> Json:
    """States over time, one bar for each series."""
    defaults: Json = {"mappings": mapped, "thresholds": steps(GREEN), "custom": {"fillOpacity": 80, "lineWidth": 0}}
    options = {
        "mergeValues": True,
        "showValue": "auto",
        "alignValue": "left",
        "rowHeight": 0.8,
        "legend": {"displayMode": "list", "placement": "bottom", "showLegend": False, "calcs": []},
        "tooltip": {"mode": "single", "sort": "none"},
    }
    return _panel("state-timeline", title, description, [query], defaults, options, width, 7)


def table(
    title: str, description: str, query: Query, *, columns: Sequence[tuple[str, str]], value: str = "", width: int = 12
) -> Json:
    """The series of now. `columns`: (label, heading), in order; `value`: heading of the sample, left out if empty."""
    order = [*columns, *([("Value", value)] if value else [])]
    organize: Json = {
        "includeByName": {name: True for name, _ in order},
        "indexByName": {name: n for n, (name, _) in enumerate(order)},
        "renameByName": dict(order),
    }
    options: Json = {"showHeader": True, "cellHeight": "sm", "frameIndex": 0}
    defaults: Json = {"custom": {"align": "auto", "cellOptions": {"type": "auto"}, "inspect": False}}
    panel = _panel("table", title, description, [query], defaults, options, width, 7)
    return panel | {"transformations": [{"id": "organize", "options": organize}]}


def _panel(
    kind: str,
    title: str,
    description: str,
    queries: Sequence[Query],
    defaults: Json,
    options: Json,
    width: int,
    height: int,
) -> Json:
    targets = [
        {
            "refId": chr(ord("A") + n),
            "datasource": SOURCE,
            "expr": query.expr,
            "legendFormat": query.legend or "__auto",
            "format": "table" if kind == "table" else "time_series",
            "instant": query.instant,
            "range": not query.instant,
        }
        for n, query in enumerate(queries)
    ]
    return {
        "type": kind,
        "title": title,
        "description": description,
        "datasource": SOURCE,
        "targets": targets,
        "fieldConfig": {"defaults": defaults, "overrides": []},
        "options": options,
        "width": width,
        "height": height,
    }


def laid_out(panels: Iterable[Json]) -> list[Json]:
    """Panels from left to right, in lines as high as their highest; ids by their order."""
    placed, x, y, line = [], 0, 0, 0
    for n, panel in enumerate(panels, 1):
        width, height = panel["width"], panel["height"]
        if x + width > WIDTH:
            x, y, line = 0, y + line, 0
        rest = {key: value for key, value in panel.items() if key not in ("width", "height")}
        placed.append(rest | {"id": n, "gridPos": {"x": x, "y": y, "w": width, "h": height}})
        x, line = x + width, max(line, height)
    return placed


def annotation(name: str, expr: str, color: str, title: str, *, value_is_time: bool = False) -> Json:
    """Marks across all panels where `expr` is above 0, or at the time, in milliseconds, that it has for its value."""
    return {
        "name": name,
        "datasource": SOURCE,
        "enable": True,
        "hide": False,
        "iconColor": color,
        "builtIn": 0,
        "expr": expr,
        "step": "15s",
        "titleFormat": title,
        "textFormat": "",
        "tagKeys": "",
        "useValueForTime": value_is_time,
    }


def variable(name: str, label: str, query: str, *, all_of_them: bool) -> Json:
    """A choice among label values; `all_of_them`: several may be chosen, and at first all are."""
    several: Json = {"allValue": ".+", "current": {"selected": True, "text": ["All"], "value": ["$__all"]}}
    return (several if all_of_them else {}) | {
        "type": "query",
        "name": name,
        "label": label,
        "datasource": SOURCE,
        "query": {"query": query, "refId": name},
        "refresh": 2,
        "sort": 1,
        "multi": all_of_them,
        "includeAll": all_of_them,
        "options": [],
        "regex": "",
        "hide": 0,
        "skipUrlSync": False,
    }


def dashboard(
    uid: str, title: str, description: str, panels: Iterable[Json], variables: list[Json], marks: list[Json], link: Json
) -> Json:
    source: Json = {
        "type": "datasource",
        "name": "datasource",
        "label": "Data source",
        "query": "prometheus",
        "refresh": 1,
        "options": [],
        "regex": "",
        "hide": 0,
        "multi": False,
        "includeAll": False,
        "skipUrlSync": False,
    }
    return {
        "uid": uid,
        "title": title,
        "description": description,
        "tags": ["neuronlens"],
        "timezone": "browser",
        "editable": True,
        "graphTooltip": 1,
        "time": {"from": "now-1h", "to": "now"},
        "timepicker": {"refresh_intervals": ["5s", "15s", "30s", "1m", "5m"]},
        "refresh": "15s",
        "schemaVersion": 41,
        "version": 1,
        "fiscalYearStartMonth": 0,
        "links": [link],
        "panels": laid_out(panels),
        "templating": {"list": [source, *variables]},
        "annotations": {"list": marks},
    }


def link_to(uid: str, title: str) -> Json:
    """A link to another dashboard that keeps the time and the variables."""
    return {
        "type": "link",
        "title": title,
        "url": f"/d/{uid}",
        "icon": "dashboard",
        "tooltip": "",
        "tags": [],
        "asDropdown": False,
        "targetBlank": False,
        "includeVars": True,
        "keepTime": True,
    }
