"""Models: load a checkpoint of any kind, split it at any block, know its read position.

`families.py` how families differ · `loading.py` loads · `tokens.py` tokenizes and pads · `steered.py` splits ·
`label_token.py` classifiers of one added token per label · `few_shot.py` prompted language models, with `prompts.py`
their templates, `prompt_rows.py` all labels in one row, `prefixes.py` the common prefix, `plain_prompts.py` the
reference.
"""
