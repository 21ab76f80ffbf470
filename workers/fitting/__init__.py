"""Fitting: statistics of every layer, concept and neuron, from one pass over a labelled corpus.

`recording.py` forward passes · `moments.py` exact streaming moments · `histograms.py` densities · `probe.py` the probe
ranking · `fitter.py` all of these · `fit.py` the pass · `progress.py`, `checkpoint.py` also of other jobs.
"""
