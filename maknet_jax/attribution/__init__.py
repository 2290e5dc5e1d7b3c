"""Why a network gives its labels: attribution maps, perturbations and tests of the maps.

The names below are here because the command line needs them without importing JAX.
"""

METHODS = ("trapezoid", "right", "midpoint", "gauss")  # rules of `integrated_gradients`
OUTPUTS = ("probability", "logit")
