"""The PromQL that both dashboards share: which replicas are meant, rates, quantiles."""

from panels import GREEN, RED, Query, values

ME = 'job="$job",instance=~"$instance"'
"""What selects the series of a process."""
OF = f'{ME},model=~"$model"'
"""What selects the series of a model: one process may serve several."""
CLASSIFYING = 'method="POST",route=~"/|/predict|/classify|/v1/classify|/v2/models/.+/infer"'
"""What selects the requests that classify; docker/prometheus/rules.yml has the same."""
CLASSIFY = f"{ME},{CLASSIFYING}"
ERASED = f'{OF},source!="none"'
EVERY = "[$__rate_interval]"
REPLICA = "{{instance}}"
MODEL = "{{instance}} {{model}}"
UP = values((1, "up", GREEN), (0, "down", RED))
READY = values((1, "ready", GREEN), (0, "not ready", RED))


def quantile(q: float, metric: str, by: str = "", where: str = OF) -> str:
    """A quantile of a histogram, over all replicas and models that are chosen."""
    return f"histogram_quantile({q}, sum by (le{by}) (rate({metric}_bucket{{{where}}}{EVERY})))"


def rate(metric: str, where: str = OF) -> str:
    return f"rate({metric}{{{where}}}{EVERY})"


def quantiles(metric: str, where: str = OF) -> list[Query]:
    return [Query(quantile(q, metric, where=where), f"p{100 * q:.0f}") for q in (0.5, 0.95, 0.99)]
