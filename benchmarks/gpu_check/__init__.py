"""One call that proves a GPU: builds, tests, sanitises, measures, and says which predictions held.

``make gpu-check`` runs it; ``python benchmarks/gpu_check --help`` has its options. The machine is taken as
it is, without network: the Python and torch that are there, and of the tools those that are installed. What
is checked is a table of stages (`plan`). Each stage is one or more processes under a time limit of its own
(`process`), so that no failure, crash or hang keeps the others from their report; what they print is read
by `readings`, and `report` writes one JSON and one page. This side needs nothing but Python: torch is
loaded by the children alone (`smoke`, `speed`, `kernels`, `rates`, `judge`).
"""
