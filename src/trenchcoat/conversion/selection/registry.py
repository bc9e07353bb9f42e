"""The methods of selection by name; a new one is a function in a file of this folder and one line here.

A method is ``method(probe) -> parts``: it measures the model of a :class:`trenchcoat.conversion.selection.probe.Probe`
and returns one number or more per key/value group (higher: more worth keeping), by the name of what was measured. This
file imports nothing heavy, as the help of every command lists the names.
"""

from __future__ import annotations

METHODS: dict[str, str] = {
    "gates": "trenchcoat.conversion.selection.gates:gate_gradients",
    "retrieval": "trenchcoat.conversion.selection.retrieval:retrieval",
    "uniform": "trenchcoat.conversion.selection.controls:uniform",
    "random": "trenchcoat.conversion.selection.controls:random_order",
}
"""Valid values of ``select.method``: module and function of each."""
