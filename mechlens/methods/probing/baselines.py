"""What the surface alone gives away: the AUROC of a contrast without the model's help.

A detection means little until it beats these on the same splits: the token at the position, the words,
the mean of the token embeddings, the length.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import Tensor

from mechlens.methods.directions.nulls import refitted_scores
from mechlens.methods.probing.auroc import auroc_estimate, snap
from mechlens.methods.statistics.estimate import Estimate
from mechlens.prompts.split import Split


@dataclass(frozen=True)
class Contrast:
    """The question that every baseline answers: which prompts are positive, by which split."""

    positive: Bool[Tensor, " prompt"]
    families: Sequence[str]
    split: Split
    """Row numbers of the prompts; baselines have nothing to choose, so the validation part stays unused."""

    @property
    def trainable(self) -> bool:
        """Both classes are among the training prompts."""
        labels = self.positive[list(self.split.train)]
        return bool(labels.any()) and not bool(labels.all())

    def estimate(self, test_scores: Float[Tensor, " test"]) -> Estimate:
        """AUROC of scores for the test prompts, with its interval."""
        rows = list(self.split.test)
        families = [self.families[row] for row in rows]
        return auroc_estimate(test_scores, self.positive[rows], families)

    def missing(self) -> Estimate:
        """The answer where there is nothing to train on."""
        return Estimate.missing(len(self.split.test))


def token_identity_auroc(embeddings: Float[Tensor, "prompt d_model"], contrast: Contrast) -> Estimate:
    """AUROC of the mean difference at level 0 and one position: what the token standing there tells.

    0.5 by construction where the two sides of every pair share that token.
    """
    if not contrast.trainable:
        return contrast.missing()
    train, test = list(contrast.split.train), list(contrast.split.test)
    labels = contrast.positive[train][None]
    scores = refitted_scores(embeddings[train], embeddings[test], labels.double(), (~labels).double())
    return contrast.estimate(scores[0])


def tfidf_auroc(texts: Sequence[str], contrast: Contrast) -> Estimate:
    """AUROC of `tfidf_scores` on the test prompts."""
    train = [texts[row] for row in contrast.split.train]
    if not contrast.trainable or not any(text.strip() for text in train):
        return contrast.missing()
    labels, test = contrast.positive[list(contrast.split.train)], [texts[row] for row in contrast.split.test]
    return contrast.estimate(tfidf_scores(train, labels, test))


def tfidf() -> TfidfVectorizer:
    """TF-IDF of words, punctuation marks and pairs of them, in vectors of length 1.

    Punctuation counts as a word: how a prompt ends is the commonest give-away.
    """
    return TfidfVectorizer(ngram_range=(1, 2), token_pattern=r"(?u)\w+|[^\w\s]")


def tfidf_scores(train: Sequence[str], positive: Bool[Tensor, " train"], test: Sequence[str]) -> Float[Tensor, " test"]:
    """Test scores of logistic regression on `tfidf`."""
    model = make_pipeline(tfidf(), LogisticRegression(max_iter=1000))
    model.fit(list(train), positive.numpy())
    return snap(torch.from_numpy(model.decision_function(list(test))), 1e-9)


def mean_embedding_auroc(embeddings: Float[Tensor, "prompt d_model"], contrast: Contrast) -> Estimate:
    """AUROC of `mean_embedding_scores` on the test prompts."""
    if not contrast.trainable:
        return contrast.missing()
    train, test = list(contrast.split.train), list(contrast.split.test)
    return contrast.estimate(mean_embedding_scores(embeddings[train], contrast.positive[train], embeddings[test]))


def mean_embedding_scores(
    train: Float[Tensor, "train d_model"], positive: Bool[Tensor, " train"], test: Float[Tensor, "test d_model"]
) -> Float[Tensor, " test"]:
    """Test scores of logistic regression on the mean token embedding of each instruction, standardised.

    The embeddings are means over the instruction's tokens: the words without their order.
    """
    model = make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000))
    model.fit(train.double().numpy(), positive.numpy())
    return snap(torch.from_numpy(model.decision_function(test.double().numpy())), 1e-9)


def length_auroc(n_tokens: Int[Tensor, " prompt"], contrast: Contrast) -> Estimate:
    """AUROC of the number of tokens, longer or shorter counting as positive as it does in training."""
    if not contrast.trainable:
        return contrast.missing()
    train, labels = (
        n_tokens[list(contrast.split.train)].double(),
        contrast.positive[list(contrast.split.train)],
    )
    sign = 1.0 if float(train[labels].mean()) >= float(train[~labels].mean()) else -1.0
    return contrast.estimate(sign * n_tokens[list(contrast.split.test)].double())
