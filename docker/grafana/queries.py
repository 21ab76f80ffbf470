"""The PromQL that both dashboards share: which replicas are meant, rates, quantiles."""

from panels import GREEN, RED, Query, values

ME = 'job="$job",instance=~"$instance"'
CLASSIFYING = 'method="POST",route=~"/|/predict|/classify|/v1/classify|/v2/models/.+/infer"'
"""What selects the requests that classify; docker/prometheus/rules.yml has the same."""
CLASSIFY = f"{ME},{CLASSIFYING}"
ERASED = f'{ME},source!="none"'
EVERY = "[$__rate_interval]"
REPLICA = "{{instance}}"
UP = values((1, "up", GREEN), (0, "down", RED))
READY = values((1, "ready", GREEN), (0, "not ready", RED))


def quantile(q: float, metric: str, by: str = "", where: str = ME) -> str:
    """A quantile of a histogram, over all replicas that are chosen."""
    return f"histogram_quantile({q}, sum by (le{by}) (rate({metric}_bucket{{{where}}}{EVERY})))"


def rate(metric: str, where: str = ME) -> str:
    return f"rate({metric}{{{where}}}{EVERY})"


def quantiles(metric: str, where: str = ME) -> list[Query]:
    return [Query(quantile(q, metric, where=where), f"p{100 * q:.0f}") for q in (0.5, 0.95, 0.99)]
