"""Layer normalisation of channel-last maps, with an output dtype of the caller's choice."""
