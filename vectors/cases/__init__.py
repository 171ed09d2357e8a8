"""The tables of cases, a file for each room of the losses: SPECS maps a function's name to its spec."""

import importlib
import pkgutil

SPECS = {
    spec.name: spec
    for room in pkgutil.iter_modules(__path__)
    for spec in importlib.import_module(f"cases.{room.name}").SPECS
}
