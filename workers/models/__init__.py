"""Models: load a checkpoint of any kind, split it at any block, know its read position.

`families.py` how families differ · `loading.py` loads · `facts.py`, `shown.py` what others see of a model and of a
text's tokens · `tokens.py` tokenizes and pads · `steered.py` splits · `label_token.py` classifiers of one added token
per label · `few_shot.py` prompted language models, with `prompts.py` their templates, `prompt_rows.py` all labels in
one row, `prefixes.py` the common prefix, `plain_prompts.py` the reference.
"""
