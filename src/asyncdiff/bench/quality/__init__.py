"""How far pictures made on several devices are from those made in order: `asyncdiff quality`, and the figures
of docs/fidelity.md."""
