"""The two pipelines of a run: it trains with the one, and evaluates and answers with the other."""
from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Callable, Dict, Tuple

from ipu_options.config import Pipeline, inference_pipeline, training_pipeline


@dataclass(frozen=True)
class Phase:
    """What differs between training and inference, but for the formulas of memory and time."""

    name: str                           # "training" or "inference"
    prefix: str                         # of the flags of its own pipeline
    micro_batch_flag: str
    data: str                           # whose windows it works through: "train" or "eval"
    iterations: str                     # what its micro-batches are counted by
    round: str                          # what the pipeline does from running full to running empty
    kinds: Tuple[str, ...]              # of a stage's work on a micro-batch
    ramps: int                          # steps of ramp-up and ramp-down for each further stage
    pipeline: Callable[..., Pipeline]   # returns it for (configuration, layers, pod), checked

    def steps(self, micro_batches: int, stages: int) -> int:
        """Return the number of pipeline steps of a round, with ramp-up and ramp-down."""
        return micro_batches + self.ramps * (stages - 1)

    def flags(self, settings: Dict[str, Any]) -> Dict[str, Any]:
        """Return {flag: value} of a pipeline's settings {name in training: value}."""
        names = {"micro_batch_size": self.micro_batch_flag, "pack": "pack"}
        # Inference's own layout begins with the embedding and ends with the head.
        return {names.get(name, self.prefix + name): value for name, value in settings.items()
                if not (self.prefix and name in ("embedding_ipu", "head_ipu"))}


TRAINING = Phase("training", "", "micro_batch_size", "train", "accumulation",
                 "weight update", ("forward", "recompute", "backward"), 2, training_pipeline)
INFERENCE = Phase("inference", "inference_", "eval_micro_batch_size", "eval", "iterations",
                  "call", ("forward",), 1, inference_pipeline)
PHASES = {phase.name: phase for phase in (TRAINING, INFERENCE)}
