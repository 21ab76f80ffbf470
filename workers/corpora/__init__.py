"""Corpora: labelled texts from files, saved data sets and the hub, read in chunks of 1,024 rows.

`sources.py` early checks · `data_names.py` what a name says · `files.py` parsers · `rows.py` tables and rows ·
`concepts.py` from labels to concepts · `paper_datasets.py` the paper's data sets · `row_sample.py` a sample of the rows
· `corpus.py` chunks, counts and hash · `loading.py` all of these together.
"""
