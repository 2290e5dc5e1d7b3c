"""Why a network said so: attributions, perturbations and how far they can be trusted."""
