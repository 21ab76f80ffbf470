"""Fitting: one pass over a labelled corpus, statistics of every layer, concept and neuron.

`corpus.py` reads rows in chunks · `moments.py` exact streaming moments · `histograms.py` densities · `fit.py` the pass.
"""
