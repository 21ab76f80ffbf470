"""Readiness, traffic, latency, saturation, errors and store: what operators look at."""

from panels import GREEN, RED, YELLOW, Query, figure, lines, row, steps, table, timeline, values
from queries import CLASSIFY, ME, MODEL, OF, READY, REPLICA, UP, quantile, quantiles, rate

OPERATORS = [
    row("Is it well?"),
    figure(
        "Replicas ready",
        "Servers that take requests for every model chosen; their /readyz answers 200 while all of theirs do. Of a "
        "fleet these are its ingresses.",
        Query(f"sum(min by (instance) (neuronlens_ready{{{OF}}})) or vector(0)", instant=True),
        unit="none",
        thresholds=steps(RED, (1, GREEN)),
    ),
    figure(
        "Replicas not scraped",
        "Targets whose /metrics does not answer: ended, still loading, or out of reach.",
        Query(f"count(up{{{ME}}}) - sum(up{{{ME}}})", instant=True),
        unit="none",
        thresholds=steps(GREEN, (1, RED)),
    ),
    figure(
        "Store",
        "Down as soon as one replica cannot reach Redis. Answers go on; toggles do not.",
        Query(f"min(neuronlens_store_up{{{OF}}})", instant=True),
        unit="none",
        thresholds=steps(RED, (1, GREEN)),
        mapped=UP,
    ),
    figure(
        "Oldest snapshot",
        "How long ago the most outdated replica knew its live state to be the newest. A few seconds is normal.",
        Query(f"max(neuronlens_snapshot_age_seconds{{{OF}}})", instant=True),
        unit="s",
        thresholds=steps(GREEN, (10, YELLOW), (60, RED)),
    ),
    figure(
        "Answers within 1 s",
        "Share of the answered classify requests of the last five minutes that took at most 1 s. Objective: 99 %.",
        Query('1 - neuronlens:classify_slow:ratio_rate5m{job="$job"}', instant=True),
        unit="percentunit",
        thresholds=steps(RED, (0.95, YELLOW), (0.99, GREEN)),
        empty="no traffic",
    ),
    figure(
        "Failed requests",
        "Share of the classify requests of the last five minutes that failed (5xx, 424). Objective: below 1 %.",
        Query('neuronlens:classify_errors:ratio_rate5m{job="$job"}', instant=True),
        unit="percentunit",
        thresholds=steps(GREEN, (0.001, YELLOW), (0.01, RED)),
        empty="no traffic",
    ),
    table(
        "Alerts that fire",
        "What to do about each: docs/operations.md, under its name. Empty is good.",
        Query('ALERTS{alertstate="firing",alertname=~"NeuronLens.+"}', instant=True),
        columns=[("alertname", "Alert"), ("severity", "Severity"), ("instance", "Replica")],
        width=8,
    ),
    timeline(
        "Readiness by replica",
        "Ready as /readyz says. A gap: the replica was not scraped.",
        Query(f"neuronlens_ready{{{OF}}}", MODEL),
        mapped=READY,
        width=8,
    ),
    timeline(
        "Conditions of readiness",
        "The worst replica for each condition that /readyz names.",
        Query(f"min by (condition) (neuronlens_ready_condition{{{OF}}})", "{{condition}}"),
        mapped=values((1, "holds", GREEN), (0, "fails", RED)),
        width=8,
    ),
    row("Traffic"),
    lines(
        "Requests by route",
        "Requests per second that were answered, refused ones among them.",
        [Query(f"sum by (route) ({rate('neuronlens_http_requests_total', ME)})", "{{route}}")],
        unit="reqps",
        stacked=True,
    ),
    lines(
        "Texts answered",
        "Texts per second by replica and model; a request may hold many.",
        [Query(f"sum by (instance, model) ({rate('neuronlens_texts_total')})", MODEL)],
        unit="cps",
        axis="texts per second",
        stacked=True,
    ),
    lines(
        "Requests in flight",
        "Requests that are not answered yet, waiting ones among them.",
        [Query(f"neuronlens_http_requests_in_flight{{{ME}}}", REPLICA)],
        unit="none",
        axis="requests",
    ),
    row("Latency"),
    lines(
        "Time to answer classify requests",
        "Of answered requests (2xx) on all routes that classify, over the replicas chosen. The line is the objective.",
        quantiles("neuronlens_http_request_seconds", f'{CLASSIFY},status_class="2xx"'),
        unit="s",
        limit=steps(GREEN, (1, RED)),
    ),
    lines(
        "Share of slow answers",
        "Answered classify requests that took longer than 1 s, over a short and a long window. The lines: 1 % is the "
        "budget, and 14.4 % for an hour wakes somebody.",
        [
            Query(f'neuronlens:classify_slow:ratio_rate{window}{{job="$job"}}', window)
            for window in ("5m", "30m", "1h", "6h")
        ],
        unit="percentunit",
        limit=steps(GREEN, (0.01, YELLOW), (0.144, RED)),
    ),
    lines(
        "Stages of a batch (p95)",
        "tokenize: of a request. trunk, tail: of a batch in the model, up to the masked block and above it. reply: "
        "until the event loop has sent the answers on.",
        [Query(quantile(0.95, "neuronlens_stage_seconds", ", stage"), "{{stage}}")],
        unit="s",
    ),
    row("Saturation"),
    lines(
        "Queue, of its limit",
        "Tokens and texts that wait, as a share of what may wait. At 100 % requests are refused with 429; they may be "
        "before, when what waits would take longer than NEURONLENS_MAX_QUEUE_SECONDS.",
        [
            Query(f"neuronlens_queue_tokens{{{OF}}} / neuronlens_queue_tokens_limit{{{OF}}}", f"{MODEL} tokens"),
            Query(f"neuronlens_queue_texts{{{OF}}} / neuronlens_queue_texts_limit{{{OF}}}", f"{MODEL} texts"),
        ],
        unit="percentunit",
        limit=steps(GREEN, (0.8, RED)),
    ),
    lines(
        "Wait for a batch",
        "Time of a text from its admission until a batch took it.",
        quantiles("neuronlens_queue_wait_seconds"),
        unit="s",
        limit=steps(GREEN, (1, RED)),
    ),
    lines(
        "Time in the model",
        "Share of the time that a replica's model is busy: near 100 % it can do no more.",
        [Query(rate("neuronlens_forward_seconds_sum"), MODEL)],
        unit="percentunit",
        limit=steps(GREEN, (0.9, RED)),
    ),
    lines(
        "Batch fill",
        "Mean tokens of a batch, as a share of the most that a batch takes. Low under light load: nothing waits for "
        "others.",
        [
            Query(
                f"{rate('neuronlens_batch_tokens_sum')} / {rate('neuronlens_batch_tokens_count')}"
                f" / neuronlens_batch_tokens_limit{{{OF}}}",
                MODEL,
            )
        ],
        unit="percentunit",
    ),
    lines(
        "Texts per batch",
        "Mean number of texts that went through the model together.",
        [Query(f"{rate('neuronlens_batch_texts_sum')} / {rate('neuronlens_batch_texts_count')}", MODEL)],
        unit="none",
        axis="texts",
        decimals=1,
    ),
    lines(
        "Padding",
        "Tokens that the model ran on, over real ones: 1 is no waste.",
        [Query(f"{rate('neuronlens_padded_tokens_total')} / {rate('neuronlens_tokens_total')}", MODEL)],
        unit="none",
        axis="ratio",
        decimals=2,
    ),
    lines(
        "CPU",
        "Cores that a replica's process keeps busy.",
        [Query(rate("process_cpu_seconds_total", ME), REPLICA)],
        unit="none",
        axis="cores",
        decimals=1,
        width=6,
    ),
    lines(
        "Memory",
        "Resident memory of a replica's process. A GPU's own memory is not in it.",
        [Query(f"process_resident_memory_bytes{{{ME}}}", REPLICA)],
        unit="bytes",
        width=6,
    ),
    lines(
        "Open files, of their limit",
        "File descriptors, connections among them. At 100 % no connection is accepted.",
        [Query(f"process_open_fds{{{ME}}} / process_max_fds{{{ME}}}", REPLICA)],
        unit="percentunit",
        width=6,
    ),
    lines(
        "Trunk cache",
        "Share of texts whose trunk was kept from before. Without data unless NEURONLENS_TRUNK_CACHE_MB is set.",
        [
            Query(
                f"{rate('neuronlens_trunk_cache_hits_total')} / ({rate('neuronlens_trunk_cache_hits_total')}"
                f" + {rate('neuronlens_trunk_cache_misses_total')})",
                MODEL,
            )
        ],
        unit="percentunit",
        most=1,
        width=6,
    ),
    row("Fleets on Ray"),
    lines(
        "Replicas of a fleet",
        "Replicas that take requests, as each ingress knows, and how many there are to be. Empty without a fleet.",
        [
            Query(f"neuronlens_fleet_replicas{{{OF}}}", f"{MODEL} take requests"),
            Query(f"neuronlens_fleet_replicas_wanted{{{OF}}}", f"{MODEL} wanted"),
        ],
        unit="none",
        axis="replicas",
        stepped=True,
        decimals=0,
        width=6,
    ),
    lines(
        "Sent again, and lost",
        "Requests per second whose replica was lost: those that were sent to another one, and those that were given up "
        "then, with 503 replica_lost. Replicas that leave send back what they have not begun, which is sent again too.",
        [
            Query(f"sum by (model) ({rate('neuronlens_fleet_retried_total')})", "{{model}} sent again"),
            Query(f"sum by (model) ({rate('neuronlens_fleet_lost_total')})", "{{model}} lost"),
        ],
        unit="reqps",
        width=6,
    ),
    lines(
        "Requests per call",
        "Mean number of requests that travelled to a replica together. It grows with the load.",
        [
            Query(
                f"{rate('neuronlens_fleet_call_requests_sum')} / {rate('neuronlens_fleet_call_requests_count')}", MODEL
            )
        ],
        unit="none",
        axis="requests",
        decimals=1,
        width=6,
    ),
    lines(
        "Generations behind",
        "How many changes of the live state each replica does not obey yet, of those that any of them obeys. All are "
        "at 0 within moments of a change; ingresses, and servers with an engine of their own, are lines too.",
        [
            Query(
                f"max by (job, model) (neuronlens_generation{{{OF}}})"
                f" - on (job, model) group_right () neuronlens_generation{{{OF}}}",
                MODEL,
            )
        ],
        unit="none",
        axis="changes",
        stepped=True,
        decimals=0,
        width=6,
    ),
    row("Errors"),
    lines(
        "Errors by status",
        "Requests per second that were answered with 4xx or 5xx, on all routes but the probes.",
        [
            Query(
                "sum by (status) ("
                + rate(
                    "neuronlens_http_requests_total",
                    f'{ME},route!~"/livez|/readyz|/health|/v2/health/.+",status=~"[45]..",status!="499"',
                )
                + ")",
                "{{status}}",
            )
        ],
        unit="reqps",
        stacked=True,
        width=6,
    ),
    lines(
        "Not answered, by reason",
        "Classify requests per second: queue_full 429, too_large 413, draining 503, deadline 504, failed 500; "
        "cancelled: the client hung up.",
        [Query(f"sum by (reason) ({rate('neuronlens_rejections_total')})", "{{reason}}")],
        unit="reqps",
        stacked=True,
        width=6,
    ),
    lines(
        "Given up, by stage",
        "Requests per second that the client or its deadline gave up, by how far they had come. Those running cost the "
        "model time for nothing.",
        [Query(f"sum by (stage) ({rate('neuronlens_cancellations_total')})", "{{stage}}")],
        unit="reqps",
        stacked=True,
        width=6,
    ),
    lines(
        "Callers refused, by reason",
        "Calls per second that were refused before they were read: no_key and bad_key 401, wrong_scope 403, "
        "rate_limited 429, keys_unavailable 503. Many bad keys: somebody tries, or a key was revoked that is in use.",
        [Query(f"sum by (reason) ({rate('neuronlens_auth_rejections_total', ME)})", "{{reason}}")],
        unit="reqps",
        stacked=True,
        width=6,
    ),
    row("Store"),
    lines(
        "Age of the snapshot",
        "How long ago a replica knew its live state to be the newest. It grows while Redis is away.",
        [Query(f"neuronlens_snapshot_age_seconds{{{OF}}}", MODEL)],
        unit="s",
        width=8,
        limit=steps(GREEN, (60, RED)),
    ),
    timeline(
        "Store by replica",
        "Whether Redis answered a replica last time.",
        Query(f"neuronlens_store_up{{{OF}}}", MODEL),
        mapped=UP,
        width=8,
    ),
    timeline(
        "Trouble with the live state",
        "store_down: Redis does not answer. lost: it came back empty, range sets and all. range_set: what is active "
        "cannot be used.",
        Query(f"max by (problem) (neuronlens_live_state_problem{{{OF}}})", "{{problem}}"),
        mapped=values((0, "no", GREEN), (1, "yes", RED)),
        width=8,
    ),
]
