"""How the vocabulary and the rows go by: the chunked and the streaming drivers over the row primitives."""
