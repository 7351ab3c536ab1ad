"""How transformers remember: the code that the notebooks teach, one compact file for each paper."""
