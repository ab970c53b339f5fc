"""What the server of processes.py imports once for all its children. Importing is all it may do: threads do not survive a fork."""

from importlib import import_module

for library in (
    "loralab.cli",
    "loralab.experiments.compare",
    "loralab.training.train",
    "loralab.on_torch.engine",
    "loralab.training.trackers",
    "matplotlib.figure",
    "rouge_score.rouge_scorer",
    "torch._dynamo",  # PyTorch's optimizers import it
    "torch.utils.tensorboard",
    "transformers.models.auto.tokenization_auto",
):
    import_module(library)
