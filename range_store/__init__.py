"""The domain of NeuronLens in numpy, and Redis around it. Nothing here knows of torch or of HTTP.

| module | holds |
|---|---|
| `erasure` | an erasure: concept, method, rule, τ, top fraction, ranking, layers, replacement |
| `rankings`, `ranges` | saliency of neurons and their top k; range rules, bounds and overlap: the only such code |
| `range_set` | the immutable result of one fit, its provenance and its content id |
| `plan` | erasures resolved to bounds against one range set, frozen |
| `codec`, `archive` | a range set as bytes: part by part as Redis holds it, and whole as one safetensors file |
| `embedded` | `connect`: a Redis by URL, or the private one that this package starts and shares |
| `keys`, `scripts`, `failures` | names of the keys; the atomic steps, in Lua; what Redis's errors mean |
| `published`, `store` | range sets in Redis; `RangeStore`, which adds the live erasures and their audit |
| `live` | the live state: which erasures apply to requests that name none |
| `api_keys` | who may call a server: keys with scopes, of which only a hash is stored |
| `mirror` | what a worker holds of all this, kept current, and answering when Redis is away |
| `replicas`, `reporter` | which generation each process answers under, as they tell each other |
| `errors` | everything that can go wrong, as a tree |
| `phrases` | numbers and times as messages write them |
"""
