"""mechlens: what a chat model represents, where, and how sure we can be.

Everything a notebook needs is here by name; `import mechlens` itself is instant, and torch is imported with the
first name that needs it. Figures are drawn by `mechlens.records.figures`, results saved and loaded by
`mechlens.records.artifacts`, notebook views made by `mechlens.views`.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mechlens.config import Causal as Causal
    from mechlens.config import Compare as Compare
    from mechlens.config import FindDirection as FindDirection
    from mechlens.config import Finetune as Finetune
    from mechlens.config import FinetuneConfig as FinetuneConfig
    from mechlens.config import GuardEval as GuardEval
    from mechlens.config import GuardFit as GuardFit
    from mechlens.config import GuardPredict as GuardPredict
    from mechlens.config import Patch as Patch
    from mechlens.config import Select as Select
    from mechlens.config import Separate as Separate
    from mechlens.config import Steer as Steer
    from mechlens.config import Track as Track
    from mechlens.config import WandbSettings as WandbSettings
    from mechlens.errors import UserError as UserError
    from mechlens.methods.activations import Activations as Activations
    from mechlens.methods.agreement import agreement as agreement
    from mechlens.methods.answers import Answers as Answers
    from mechlens.methods.answers import answer as answer
    from mechlens.methods.auroc import auroc_estimate as auroc_estimate
    from mechlens.methods.beliefs import Centroids as Centroids
    from mechlens.methods.beliefs import beliefs as beliefs
    from mechlens.methods.beliefs import centroids as centroids
    from mechlens.methods.candidate_filters import SelectionRule as SelectionRule
    from mechlens.methods.candidate_scores import score_candidates as score_candidates
    from mechlens.methods.collect import collect as collect
    from mechlens.methods.collect import from_cache as from_cache
    from mechlens.methods.collect import template_of as template_of
    from mechlens.methods.detect import Detection as Detection
    from mechlens.methods.detect import DetectionPlan as DetectionPlan
    from mechlens.methods.detect import detect as detect
    from mechlens.methods.directions import Direction as Direction
    from mechlens.methods.directions import DirectionGrid as DirectionGrid
    from mechlens.methods.directions import direction_cosine as direction_cosine
    from mechlens.methods.directions import direction_grid as direction_grid
    from mechlens.methods.directions import mean_difference as mean_difference
    from mechlens.methods.directions import project as project
    from mechlens.methods.directions import random_like as random_like
    from mechlens.methods.estimate import Estimate as Estimate
    from mechlens.methods.fitted_guard import FittedGuard as FittedGuard
    from mechlens.methods.fitted_guard import GuardVerdict as GuardVerdict
    from mechlens.methods.guard import GuardEstimator as GuardEstimator
    from mechlens.methods.interventions import ALL as ALL
    from mechlens.methods.interventions import EVERYWHERE as EVERYWHERE
    from mechlens.methods.interventions import Ablate as Ablate
    from mechlens.methods.interventions import Add as Add
    from mechlens.methods.interventions import Replace as Replace
    from mechlens.methods.interventions import ReplaceComponent as ReplaceComponent
    from mechlens.methods.interventions import replacement as replacement
    from mechlens.methods.interventions import residual_norms as residual_norms
    from mechlens.methods.inversion import QUESTIONS as QUESTIONS
    from mechlens.methods.inversion import ask as ask
    from mechlens.methods.inversion import asked_words as asked_words
    from mechlens.methods.inversion import parse_reply as parse_reply
    from mechlens.methods.inversion import preferred_words as preferred_words
    from mechlens.methods.judges import ARDITI as ARDITI
    from mechlens.methods.judges import PHRASES as PHRASES
    from mechlens.methods.judges import ZHAO as ZHAO
    from mechlens.methods.judges import HumanLabels as HumanLabels
    from mechlens.methods.judges import Judge as Judge
    from mechlens.methods.metrics import KLDivergence as KLDivergence
    from mechlens.methods.metrics import LogitDifference as LogitDifference
    from mechlens.methods.metrics import LogProbability as LogProbability
    from mechlens.methods.metrics import OwnMetric as OwnMetric
    from mechlens.methods.metrics import RefusalLogOdds as RefusalLogOdds
    from mechlens.methods.once_refused import OnceRefused as OnceRefused
    from mechlens.methods.patch_plan import PatchPlan as PatchPlan
    from mechlens.methods.patch_result import PatchResult as PatchResult
    from mechlens.methods.patching import patch_sweep as patch_sweep
    from mechlens.methods.path_patching import path_sweep as path_sweep
    from mechlens.methods.reliability import corrected_cosine as corrected_cosine
    from mechlens.methods.reliability import split_half as split_half
    from mechlens.methods.shuffled import shuffled_like as shuffled_like
    from mechlens.methods.steering import answer_under as answer_under
    from mechlens.methods.steering import applied as applied
    from mechlens.methods.steering import logits_under as logits_under
    from mechlens.methods.steering import without_direction as without_direction
    from mechlens.methods.token_view import logit_lens as logit_lens
    from mechlens.methods.token_view import project_tokens as project_tokens
    from mechlens.models.checkpoint import Checkpoint as Checkpoint
    from mechlens.models.load import load as load
    from mechlens.models.load import load_tokenizer as load_tokenizer
    from mechlens.models.series import CheckpointSeries as CheckpointSeries
    from mechlens.models.series import checkpoint_series as checkpoint_series
    from mechlens.models.swap import turns as turns
    from mechlens.prompts.batch import TokenBatch as TokenBatch
    from mechlens.prompts.batch import tokenize as tokenize
    from mechlens.prompts.builtin import builtin_pairs as builtin_pairs
    from mechlens.prompts.builtin import builtin_prompts as builtin_prompts
    from mechlens.prompts.load import load_prompts as load_prompts
    from mechlens.prompts.prompt import Prompt as Prompt
    from mechlens.prompts.prompt import PromptPair as PromptPair
    from mechlens.prompts.split import Split as Split
    from mechlens.prompts.split import split_by_family as split_by_family
    from mechlens.prompts.template import ChatTemplate as ChatTemplate
    from mechlens.prompts.template import chat_template as chat_template
    from mechlens.prompts.text import match_punctuation as match_punctuation
    from mechlens.records.guard_file import LatentGuard as LatentGuard
    from mechlens.records.run import Run as Run
    from mechlens.records.run import list_runs as list_runs
    from mechlens.records.run import read_run as read_run
    from mechlens.records.trainer_callback import MechlensCallback as MechlensCallback
    from mechlens.studies.causal import Battery as Battery
    from mechlens.studies.causal import CausalPlan as CausalPlan
    from mechlens.studies.causal import run_battery as run_battery
    from mechlens.studies.causal_verdict import causal_verdict as causal_verdict
    from mechlens.studies.concept import Concept as Concept
    from mechlens.studies.concept import find_concept as find_concept
    from mechlens.studies.finetune import finetune as finetune
    from mechlens.studies.guard_evaluation import EvaluationPlan as EvaluationPlan
    from mechlens.studies.guard_evaluation import GuardEvaluation as GuardEvaluation
    from mechlens.studies.guard_evaluation import evaluate_guard as evaluate_guard
    from mechlens.studies.guard_evaluation import examine as examine
    from mechlens.studies.guard_fit import fit_guard as fit_guard
    from mechlens.studies.guard_mistakes import read_direction as read_direction
    from mechlens.studies.guard_verdict import guard_report as guard_report
    from mechlens.studies.quadrants import Judged as Judged
    from mechlens.studies.quadrants import judge_answers as judge_answers
    from mechlens.studies.selection import Selection as Selection
    from mechlens.studies.selection import SelectionPlan as SelectionPlan
    from mechlens.studies.selection import select_direction as select_direction
    from mechlens.studies.selection_verdict import SelectionVerdict as SelectionVerdict
    from mechlens.studies.selection_verdict import selection_verdict as selection_verdict
    from mechlens.studies.separation import Separation as Separation
    from mechlens.studies.separation import SeparationPlan as SeparationPlan
    from mechlens.studies.separation import separate as separate
    from mechlens.studies.separation_verdict import Verdict as Verdict
    from mechlens.studies.separation_verdict import separation_verdict as separation_verdict
    from mechlens.studies.sources import Source as Source
    from mechlens.studies.sources import SourcePrompts as SourcePrompts
    from mechlens.studies.sources import load_source as load_source
    from mechlens.studies.sources import read_sources as read_sources
    from mechlens.studies.tracking import track as track
    from mechlens.studies.tracking_result import Questions as Questions
    from mechlens.studies.tracking_result import Tracking as Tracking
    from mechlens.studies.tracking_result import TrackPlan as TrackPlan

_HOME = {
    "FindDirection": "config",
    "Finetune": "config",
    "GuardEval": "config",
    "GuardFit": "config",
    "GuardPredict": "config",
    "Patch": "config",
    "Select": "config",
    "Separate": "config",
    "WandbSettings": "config",
    "Compare": "config",
    "FinetuneConfig": "config",
    "Track": "config",
    "Causal": "config",
    "Steer": "config",
    "UserError": "errors",
    "Activations": "methods.activations",
    "agreement": "methods.agreement",
    "Answers": "methods.answers",
    "answer": "methods.answers",
    "auroc_estimate": "methods.auroc",
    "Centroids": "methods.beliefs",
    "beliefs": "methods.beliefs",
    "centroids": "methods.beliefs",
    "SelectionRule": "methods.candidate_filters",
    "score_candidates": "methods.candidate_scores",
    "collect": "methods.collect",
    "from_cache": "methods.collect",
    "template_of": "methods.collect",
    "Detection": "methods.detect",
    "DetectionPlan": "methods.detect",
    "detect": "methods.detect",
    "Direction": "methods.directions",
    "DirectionGrid": "methods.directions",
    "direction_cosine": "methods.directions",
    "direction_grid": "methods.directions",
    "mean_difference": "methods.directions",
    "project": "methods.directions",
    "random_like": "methods.directions",
    "Estimate": "methods.estimate",
    "FittedGuard": "methods.fitted_guard",
    "GuardVerdict": "methods.fitted_guard",
    "GuardEstimator": "methods.guard",
    "ALL": "methods.interventions",
    "EVERYWHERE": "methods.interventions",
    "Ablate": "methods.interventions",
    "Add": "methods.interventions",
    "Replace": "methods.interventions",
    "ReplaceComponent": "methods.interventions",
    "replacement": "methods.interventions",
    "residual_norms": "methods.interventions",
    "QUESTIONS": "methods.inversion",
    "ask": "methods.inversion",
    "asked_words": "methods.inversion",
    "parse_reply": "methods.inversion",
    "preferred_words": "methods.inversion",
    "ARDITI": "methods.judges",
    "PHRASES": "methods.judges",
    "HumanLabels": "methods.judges",
    "Judge": "methods.judges",
    "ZHAO": "methods.judges",
    "KLDivergence": "methods.metrics",
    "LogProbability": "methods.metrics",
    "LogitDifference": "methods.metrics",
    "OwnMetric": "methods.metrics",
    "RefusalLogOdds": "methods.metrics",
    "OnceRefused": "methods.once_refused",
    "PatchPlan": "methods.patch_plan",
    "PatchResult": "methods.patch_result",
    "patch_sweep": "methods.patching",
    "path_sweep": "methods.path_patching",
    "corrected_cosine": "methods.reliability",
    "split_half": "methods.reliability",
    "shuffled_like": "methods.shuffled",
    "answer_under": "methods.steering",
    "applied": "methods.steering",
    "logits_under": "methods.steering",
    "without_direction": "methods.steering",
    "logit_lens": "methods.token_view",
    "project_tokens": "methods.token_view",
    "Checkpoint": "models.checkpoint",
    "load": "models.load",
    "load_tokenizer": "models.load",
    "CheckpointSeries": "models.series",
    "checkpoint_series": "models.series",
    "turns": "models.swap",
    "TokenBatch": "prompts.batch",
    "tokenize": "prompts.batch",
    "builtin_pairs": "prompts.builtin",
    "builtin_prompts": "prompts.builtin",
    "load_prompts": "prompts.load",
    "Prompt": "prompts.prompt",
    "PromptPair": "prompts.prompt",
    "Split": "prompts.split",
    "split_by_family": "prompts.split",
    "ChatTemplate": "prompts.template",
    "chat_template": "prompts.template",
    "match_punctuation": "prompts.text",
    "LatentGuard": "records.guard_file",
    "Run": "records.run",
    "list_runs": "records.run",
    "read_run": "records.run",
    "MechlensCallback": "records.trainer_callback",
    "Battery": "studies.causal",
    "CausalPlan": "studies.causal",
    "run_battery": "studies.causal",
    "causal_verdict": "studies.causal_verdict",
    "Concept": "studies.concept",
    "find_concept": "studies.concept",
    "finetune": "studies.finetune",
    "EvaluationPlan": "studies.guard_evaluation",
    "GuardEvaluation": "studies.guard_evaluation",
    "evaluate_guard": "studies.guard_evaluation",
    "examine": "studies.guard_evaluation",
    "fit_guard": "studies.guard_fit",
    "read_direction": "studies.guard_mistakes",
    "guard_report": "studies.guard_verdict",
    "Judged": "studies.quadrants",
    "judge_answers": "studies.quadrants",
    "Selection": "studies.selection",
    "SelectionPlan": "studies.selection",
    "select_direction": "studies.selection",
    "SelectionVerdict": "studies.selection_verdict",
    "selection_verdict": "studies.selection_verdict",
    "Separation": "studies.separation",
    "SeparationPlan": "studies.separation",
    "separate": "studies.separation",
    "Verdict": "studies.separation_verdict",
    "separation_verdict": "studies.separation_verdict",
    "Source": "studies.sources",
    "SourcePrompts": "studies.sources",
    "load_source": "studies.sources",
    "read_sources": "studies.sources",
    "track": "studies.tracking",
    "Questions": "studies.tracking_result",
    "Tracking": "studies.tracking_result",
    "TrackPlan": "studies.tracking_result",
}
"""Every public name and the module below `mechlens` that it comes from."""

__all__ = list(_HOME)

if not TYPE_CHECKING:  # a type checker sees the imports above, and so finds misspelt names

    def __getattr__(name: str) -> object:
        """Imports a public name on its first use (PEP 562)."""
        if name not in _HOME:
            raise AttributeError(f"module 'mechlens' has no attribute {name!r}")
        value = getattr(import_module(f"mechlens.{_HOME[name]}"), name)
        globals()[name] = value
        return value


def __dir__() -> list[str]:
    """All public names, imported or not."""
    return sorted({*globals(), *__all__})
