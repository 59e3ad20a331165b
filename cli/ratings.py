"""What a judge, or people, made of written answers: a table, the lines that belong to it, columns of the CSV."""

from __future__ import annotations

from collections.abc import Sequence

from cli import render
from cli.render import NONE, Column
from cli.tables import Cells
from jobqueue.ratings import CRITERIA, OVERALL, Mean, RatedModel, Ratings
from jobqueue.results import BatchReport

# Krippendorff (2004), Content Analysis, p. 241.
RELIABLE, TENTATIVE = 0.8, 0.667


def ratings_of(reports: Sequence[BatchReport]) -> list[tuple[BatchReport, Ratings]]:
    return [(report, found) for report in reports for found in (report.judge, report.people) if found and found.models]


def title(ratings: Ratings) -> str:
    """Who rated what."""
    who = "the judge" if ratings.by == "judge" else render.counted(len(ratings.raters), "reviewer")
    return (
        f"Answers rated by {who} {', '.join(ratings.raters)}, 1 to 5, {render.counted(ratings.questions, 'question')}"
    )


def cells(ratings: Ratings) -> Cells:
    """A row for each model, the base models last."""
    columns = [
        Column("model", wrap=True),
        Column("overall", right=True),
        Column("95%", right=True, rank=2, below="overall"),
        *(Column(name, right=True, rank=3) for name in CRITERIA),
        Column("vs base", right=True, rank=1),
        Column("vs base\n95%", right=True, rank=4),
        Column("finding", right=True, wrap=True, rank=1, below="vs base"),
        Column("p", right=True, rank=3),
        Column("answers", right=True, rank=5),
    ]
    return columns, [_row(model) for model in ratings.models]


def _row(model: RatedModel) -> list[str]:
    change = model.differences.get(OVERALL)
    return [
        model.label,
        render.number(model.means[OVERALL].value, 2),
        _interval(model.means[OVERALL]),
        *(render.number(model.means[name].value, 2) for name in CRITERIA),
        f"{change.value:+.2f}" if change else NONE,
        _interval(change, "+") if change else NONE,
        model.finding if change else NONE,
        render.p_value(model.p_value if model.p_holm is None else model.p_holm),
        str(model.answers),
    ]


def _interval(mean: Mean, sign: str = "") -> str:
    low, high = mean.interval
    return f"[{low:{sign}.2f}, {high:{sign}.2f}]"


def notes(ratings: Ratings) -> list[str]:
    """What must be known to read the scores: how far those who gave them agree, and what it cost."""
    said = _usage(ratings) if ratings.usage else []
    if ratings.agreement:
        alphas = ", ".join(f"{name} {_agreement(alpha)}" for name, alpha in ratings.agreement.items())
        said.append(f"Agreement (Krippendorff's alpha, ordinal; 1 is perfect, 0 is chance): {alphas}.")
    tested = sum(model.p_holm is not None for model in ratings.models)
    if tested:
        many = f", with Holm's correction for the {tested} trials" if tested > 1 else ""
        said.append(f"p: Wilcoxon signed-rank test of the overall scores against the base model{many}.")
    return said


def _agreement(alpha: float | None) -> str:
    if alpha is None:
        return "not defined, as all scores are alike"
    word = (
        "reliable" if alpha >= RELIABLE else "for tentative conclusions" if alpha >= TENTATIVE else "too low to rely on"
    )
    return f"{alpha:.2f} ({word})"


def _usage(ratings: Ratings) -> list[str]:
    usage = ratings.usage
    assert usage is not None
    cost = f", cost {usage.cost:,.4f}" if usage.cost is not None else ""
    asked = (
        f"The judge: {render.counted(usage.judgements, 'judgement')}, {usage.reused:,} of them at hand from before, "
        f"{usage.unusable:,} unreadable, {usage.retries:,} requests sent again; "
        f"{usage.input_tokens:,} tokens read, {usage.output_tokens:,} written{cost}."
    )
    apart = [
        f"{between} {spread:.2f}"
        for between, spread in (
            ("its samples of one answer", usage.between_samples),
            ("its models on one answer", usage.between_models),
        )
        if spread is not None
    ]
    return [asked, *([f"Disagreement (highest less lowest score, on average): {', '.join(apart)}."] if apart else [])]


def plain(report: BatchReport, job: str | None) -> dict[str, float]:
    """Columns of the CSV for the model that wrote its answers in the evaluation `job`."""
    found: dict[str, float] = {}
    for by, ratings in (("judge", report.judge), ("people", report.people)):
        model = ratings.of(job) if ratings else None
        if model is None:
            continue
        change = model.differences.get(OVERALL)
        means = [model.means[name] for name in CRITERIA]
        values = [mean.value for mean in means] + _three(model.means[OVERALL]) + (_three(change) if change else [])
        found |= dict(zip(plain_columns(by), values, strict=False))
    return found


def plain_columns(by: str) -> list[str]:
    """Their names, for a `judge` or `people`."""
    parts = (*CRITERIA, OVERALL, "overall_low", "overall_high", "vs_base", "vs_base_low", "vs_base_high")
    return [f"{by}_{part}" for part in parts]


def _three(mean: Mean) -> list[float]:
    return [mean.value, *mean.interval]
