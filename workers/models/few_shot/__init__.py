"""Few-shot classifiers: pretrained language models that are prompted with examples.

`prompt_templates.py` the prompts · `model.py` scores labels, with trunk and tail · `build.py` puts both together ·
`prompt_rows.py` all labels in one row · `prefixes.py` the common prefix · `full_passes.py` the reference.
"""
