"""The core as it is, and what fuzzing needs of it besides, in one unit: only there are the core's C functions to be seen."""

include "_core.pyx"
include "engine.pxi"
