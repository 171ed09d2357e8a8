"""The kernels room: what losses and model compute, without the memory that their formulas would take."""
