"""A verdict, in words, on whether a run learned."""

import math
from dataclasses import dataclass, replace
from typing import Any

from isofast.evaluation.intervals import newcombe
from isofast.evaluation.pictures import RAW_PIXELS, Pictures
from isofast.run.collapse import CollapseWatch, Finding
from isofast.run.stored import Run


@dataclass(frozen=True)
class Verdict:
    """The verdict on a run."""

    word: str
    """For example "learned" or "collapsed"."""
    good: bool | None
    """None if it cannot be decided."""
    headline: str
    reasons: list[str]


def _watch(run: Run) -> CollapseWatch:
    steps_per_epoch = max(1, round(run.records[-1]["step"] / run.records[-1]["epoch"]))
    return CollapseWatch(run.config, steps_per_epoch)


def findings(run: Run) -> tuple[list[Finding], Finding | None]:
    """Return the first finding of each kind in a run's records, and the last record's finding."""
    watch = _watch(run)
    judged = [watch.judge(record) for record in run.records if "embedding_std" in record]
    first = {found.kind: found for found in reversed(judged) if found is not None}
    return [*first.values()][::-1], judged[-1] if judged else None


def judge(
    run: Run, summary: dict[str, Any], val_images: int | None, pictures: Pictures | None
) -> Verdict:
    """Judge a run by collapse, then by accuracy over the untrained network, or without labels.

    Args:
        summary: contents of summary.json; empty for a run that has not ended.
        val_images: number of images in its evaluations, if known.
        pictures: results for anything that the run itself did not evaluate.
    """
    failure = summary.get("failure")
    earlier, last = findings(run)
    collapse = summary.get("collapse") or (last.message if last else None)
    found = _by_accuracy(run, val_images, pictures) or _without_labels(run, pictures)
    reasons = [*found.reasons]
    if not summary:
        epochs = run.records[-1]["epoch"]
        reasons.insert(0, f"The run has not ended: epoch {epochs:g} of {run.config.train.epochs}.")
    if not (collapse or failure):
        steps, least = run.records[-1]["step"], _watch(run).grace
        if earlier:
            judged = "Earlier records show a collapse (see the warnings); the last one does not."
        elif steps < least:
            judged = (
                f"Too short to be judged for a collapse to few dimensions: {steps} of {least:.0f} "
                "steps."
            )
        else:
            judged = "No record shows a collapse."
        return replace(found, reasons=[*reasons, judged])
    if failure and failure != collapse:
        reasons.insert(0, f"The run failed: {failure}.")
    word = "collapsed" if collapse else "failed"
    if (last and last.kind == "blow-up") or "NaN" in (collapse or ""):
        word = "diverged"
    headline = f"{word.capitalize()}: {collapse or failure}."
    return Verdict(word, False, headline, [found.headline, *reasons])


def _by_accuracy(run: Run, val_images: int | None, pictures: Pictures | None) -> Verdict | None:
    """Judge by k-NN before and after training; return None if nothing was evaluated."""
    start = "the weights it began with" if run.config.encoder.init else "the untrained network"
    ends = [run.evaluations[k]["knn_top1"] for k in (0, -1)] if run.evaluations else []
    if ends and run.evaluations[0]["step"] == 0 and len(run.evaluations) > 1:
        (before, after), n = ends, val_images
        where = "as evaluated during training"
    elif pictures is not None and pictures.measured[0].knn_top1 is not None:
        after, before = (one.knn_top1 or 0.0 for one in pictures.measured[:2])
        n, where = pictures.queries, f"on a sample of {pictures.sample}"
        start = f"the {pictures.measured[1].name}"
    elif ends:
        headline = f"k-NN top-1 {ends[-1]:.3f}, with nothing to compare it with: " + (
            "the trained network was not evaluated."
            if run.evaluations[0]["step"] == 0
            else f"no evaluation of {start} (set evaluation.at_start to true, or give the images "
            "with --root)."
        )
        return Verdict("not comparable", None, headline, [])
    else:
        return None
    gain = f"k-NN top-1 {after:.3f}, before {before:.3f}: {after - before:+.3f}"
    vote = f"a vote of up to {run.config.evaluation.knn_k} neighbours"
    reasons = [f"k-NN on frozen features, {where}; {vote}."]
    if pictures is not None and pictures.measured[-1].name == RAW_PIXELS:
        mine, pixels = (pictures.measured[k].knn_top1 or 0.0 for k in (0, -1))
        if pixels >= mine > 0:
            reasons.append(
                f"Raw pixels do at least as well: {pixels:.3f}, this run {mine:.3f}, on a sample."
            )
    if n is None:
        reasons.append("No interval: the number of validation images is not known.")
        headline = f"It is unknown whether the gain over {start} exceeds chance. {gain}."
        return Verdict("uncertain", None, headline, reasons)
    low, high = newcombe(after, before, n, n)
    gain += f", 95 % interval [{low:+.3f}, {high:+.3f}] from {n:,} images"
    reasons.append(
        "The interval assumes independent draws of images (Newcombe), so it is too wide for one "
        "shared set; other seeds add variation of their own."
    )
    if low > 0:
        return Verdict("learned", True, f"Learned: better than {start}. {gain}.", reasons)
    if high < 0:
        return Verdict("worse", False, f"Worse than {start}. {gain}.", reasons)
    return Verdict("no gain", False, f"No gain over {start} can be shown. {gain}.", reasons)


def _without_labels(run: Run, pictures: Pictures | None) -> Verdict:
    last, dim = run.records[-1], run.config.projector.output
    reasons = ["Without labels no number says whether the features separate what you care about."]
    if last.get("embedding_std") is not None:
        spread = last["embedding_std"] * math.sqrt(dim)
        reasons.append(f"Spread of the embeddings: {spread:.0%} of the healthy value 1/sqrt(D).")
    if last.get("effective_rank") is not None:
        reasons.append(f"Effective rank of C: {last['effective_rank']:.1f} of {dim}.")
    if last.get("alignment") is not None:
        reasons.append(f"Cosine of prediction and target: {last['alignment']:.3f}; at most 1.")
    if pictures is not None:
        mine, other = pictures.measured[:2]
        reasons.append(
            f"RankMe of the features: {mine.rankme:.1f}, {other.name} {other.rankme:.1f}; "
            f"uniformity {mine.uniformity:.2f}, {other.name} {other.uniformity:.2f} (lower is more "
            "spread out)."
        )
    headline = "Judged without labels: see the nearest neighbours below."
    return Verdict("no labels", None, headline, reasons)
