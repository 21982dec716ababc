"""The Fréchet distance under the name that the experiments' beds import it by: a hash of their sources names what they have run."""

from reflow.evaluation.measures.frechet import distance_of_moments, equal_sized, frechet_distance, moments

__all__ = ["distance_of_moments", "equal_sized", "frechet_distance", "moments"]
