"""Using a trained model: loss on any text, and continuing texts."""

from phase2_jax.inference.evaluation import EvaluationConfig, evaluate
from phase2_jax.inference.generator import End, Generation, Generator, Piece
from phase2_jax.inference.loading import LoadedModel, load_model
from phase2_jax.inference.sampling import GenerationConfig
from phase2_jax.inference.saved_state import TextState

__all__ = [
    "End",
    "EvaluationConfig",
    "Generation",
    "GenerationConfig",
    "Generator",
    "LoadedModel",
    "Piece",
    "TextState",
    "evaluate",
    "load_model",
]
