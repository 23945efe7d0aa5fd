"""Stage: the limits of language models, examined on this one."""

import jax

from jaxquant.durable.store import Finished
from jaxquant.theory.limits.effort import EFFORTS
from jaxquant.theory.limits.suite import run_suite
from jaxquant_models.runs.analysis.subjects import Subjects
from jaxquant_models.runs.limits import subject_of
from jaxquant_models.runs.reporting import Reporter
from jaxquant_models.schemas.report import LimitRow


def limits(subjects: Subjects, finished: Finished, reporter: Reporter) -> list[LimitRow] | str:
    """Return the rows of the suite, or why there are none.

    Args:
      subjects: the models and the text.
      finished: store of the suite's passes.
      reporter: receives reports of the work.
    Raises:
      ValueError: weights or activations are not finite.
    """
    request = subjects.request
    try:
        needed = needed_tokens(request.effort, subjects.model.config.max_position)
    except ValueError as error:
        return f"limits: left out, since {error}"
    model = subject_of(subjects.model, subjects.text, name=request.model)
    if len(model.tokens) < needed:
        return (
            f"limits: left out, since they need {needed} tokens of text, and {request.text} has "
            f"{len(model.tokens)}"
        )
    against = None
    if subjects.against is not None:
        against = subject_of(subjects.against, subjects.text, name=request.against)
    tell = lambda name, seconds: reporter.tell(f"limits: {name} ({seconds:.1f} s)")
    suite = run_suite(
        model, against, effort=request.effort, key=jax.random.key(request.seed),
        finished=finished, progress=tell,
    )  # fmt: skip
    return [LimitRow(**row) for row in suite.to_json()]


def needed_tokens(effort: str, positions: int) -> int:
    """Return the number of tokens of text that the suite needs.

    Args:
      effort: name of the effort.
      positions: largest number of positions of the model.
    Raises:
      ValueError: the model has too few positions.
    """
    return EFFORTS[effort].within(positions).tokens
