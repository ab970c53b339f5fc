"""Loss and metrics of a model on rows."""
