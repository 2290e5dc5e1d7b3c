"""Attribution maps, perturbations and tests of the maps.

The constants are defined here so that the command line can use them without importing JAX.
"""

METHODS = ("trapezoid", "right", "midpoint", "gauss")  # rules of `integrated_gradients`
OUTPUTS = ("probability", "logit")
