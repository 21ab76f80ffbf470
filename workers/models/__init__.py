"""Models: load a checkpoint of any kind, split it at any block, know its read position.

`source.py` looks for a checkpoint, `checkpoint.py` reads its files, `loading.py` loads it · `families.py` how families
differ · `tokens.py` tokenizes and pads · `steerable.py` what all kinds of models can do · `steered.py` classifiers, on
texts packed by `packing.py` · `label_token.py` classifiers of one added token per label · `few_shot/` prompted language
models · `sites.py` reads and edits the outputs of blocks · `facts.py`, `texts.py`, `predictions.py` what others see,
without torch.
"""
