"""What is erased, how it changes, and what it does to answers."""

from panels import BLUE, Query, figure, lines, row, steps, table, timeline, values
from queries import ERASED, EVERY, ME, MODEL, OF, rate

STEERING = [
    row("What is erased"),
    table(
        "Erased now",
        "Live erasures, which apply to every request that names none; enforced ones apply to those too. Replicas: how "
        "many erase it; fewer than there are means that some stay behind.",
        Query(f"count by (model, concept, method, enforced) (neuronlens_live_erasure{{{OF}}})", instant=True),
        columns=[("model", "Model"), ("concept", "Concept"), ("method", "Method"), ("enforced", "Enforced")],
        value="Replicas",
        width=10,
    ),
    table(
        "Replicas",
        "What each replica serves and obeys. Epoch and range set must be the same in all rows of a model.",
        Query(
            f"neuronlens_live_info{{{OF}}} * on (job, instance, model) group_left (dtype, device, fingerprint)"
            f" neuronlens_model_info{{{OF}}} * on (job, instance) group_left (version) neuronlens_build_info{{{ME}}}",
            instant=True,
        ),
        columns=[
            ("instance", "Replica"),
            ("model", "Model"),
            ("range_set", "Active range set"),
            ("epoch", "Epoch"),
            ("dtype", "Type"),
            ("device", "Device"),
            ("fingerprint", "Fingerprint"),
            ("version", "Version"),
        ],
        width=14,
    ),
    timeline(
        "Erased, by concept",
        "When each concept was erased live, by at least one replica.",
        Query(f"max by (model, concept) (neuronlens_live_erasure{{{OF}}})", "{{model}} {{concept}}"),
        mapped=values((1, "erased", BLUE)),
        width=16,
    ),
    figure(
        "Concepts erased",
        "Live erasures, in the replica and model that has most.",
        Query(f"max(neuronlens_live_erasures{{{OF}}})", instant=True),
        unit="none",
        thresholds=steps(BLUE),
    ),
    figure(
        "Age of the range set",
        "Time since the active range set was fitted.",
        Query(f"time() - min(neuronlens_range_set_created_timestamp_seconds{{{OF}}})", instant=True),
        unit="s",
        thresholds=steps(BLUE),
    ),
    row("Changes"),
    lines(
        "Generation by replica",
        "Each change of the live state adds 1. Lines of one model that stay apart: replicas disagree.",
        [Query(f"neuronlens_generation{{{OF}}}", MODEL)],
        unit="none",
        axis="generation",
        stepped=True,
        decimals=0,
    ),
    lines(
        "Changes applied",
        "Erasures switched on, off or set differently, range sets activated, and a live state that began anew after "
        "Redis had lost it, in the replica that saw most.",
        [Query(f"max by (change) (increase(neuronlens_live_changes_total{{{OF}}}{EVERY}))", "{{change}}")],
        unit="none",
        axis="changes",
        bars=True,
    ),
    lines(
        "Where erasures come from",
        "Texts per second by source of their erasures: live, named by the request, or none.",
        [Query(f"sum by (source) ({rate('neuronlens_texts_total')})", "{{source}}")],
        unit="cps",
        axis="texts per second",
        stacked=True,
    ),
    row("What it does"),
    lines(
        "Masked activations by concept",
        "Share of the neurons at the read position that fell into the concept's ranges and were masked, over texts "
        "from which it was erased.",
        [
            Query(
                f"sum by (model, concept) ({rate('neuronlens_concept_masked_neurons_total')})"
                f" / sum by (model, concept) ({rate('neuronlens_concept_neurons_total')})",
                "{{model}} {{concept}}",
            )
        ],
        unit="percentunit",
        most=1,
    ),
    lines(
        "Changed labels by concept",
        "Share of the watched texts whose label differs from the bare model's. A text from which several concepts are "
        "erased counts for each. Watched: requests that compare, and NEURONLENS_WATCHED_BATCHES of all batches.",
        [
            Query(
                f"sum by (model, concept) ({rate('neuronlens_concept_changed_labels_total')})"
                f" / sum by (model, concept) ({rate('neuronlens_concept_watched_texts_total')})",
                "{{model}} {{concept}}",
            )
        ],
        unit="percentunit",
        most=1,
    ),
    lines(
        "Watched texts by concept",
        "Texts per second behind the shares of changed labels: few texts, uncertain shares.",
        [Query(f"sum by (model, concept) ({rate('neuronlens_concept_watched_texts_total')})", "{{model}} {{concept}}")],
        unit="cps",
        axis="texts per second",
    ),
    lines(
        "Masked neurons per erased text",
        "Mean, union over the erased concepts, summed over layers.",
        [
            Query(
                f"sum({rate('neuronlens_masked_neurons_total')}) / sum({rate('neuronlens_texts_total', ERASED)})",
                "all replicas",
            )
        ],
        unit="none",
        axis="neurons",
        width=12,
    ),
    lines(
        "Plans per batch",
        "Mean number of different erasures that one batch applied side by side.",
        [Query(f"{rate('neuronlens_batch_plans_sum')} / {rate('neuronlens_batch_plans_count')}", MODEL)],
        unit="none",
        axis="plans",
        decimals=1,
        width=12,
    ),
]
