"""``tightrope bench``: the loss beside its peers in time, memory and error, over a floor of bare GEMMs."""
