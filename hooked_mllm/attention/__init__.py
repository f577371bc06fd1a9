"""How attention is read and run: the switch in front of transformers' own, the masks it used, and what metrics see."""
