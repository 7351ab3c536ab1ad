"""How transformers remember: the code that the notebooks teach, one compact file for each paper."""

__version__ = "0.1.0"


def load(path):
    """A trained model and its vocabulary, by its name, as "transformer_xl", or from a
    checkpoint by its path: see `checkpoints.load`."""
    from memtx_minimal import checkpoints  # imports torch: not before it is wanted

    return checkpoints.load(path)
