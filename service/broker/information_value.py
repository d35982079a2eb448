"""The value of knowing a prompt's category, before a slower classifier is asked for it. Pure.

With probabilities p over categories and quality T[k, r] of recipe r on category k, the doubtful
choice has the utility max_r Σ_k p[k] · T[k, r] − c[r]: c stands for cost, waits and swaps, which do
not depend on the category. Who knew the category would get Σ_k p[k] · max_r (T[k, r] − c[r]). The
difference is the expected value of perfect information (Howard, "Information value theory", IEEE
Transactions on Systems Science and Cybernetics, 1966). No classifier can add more on average.

It is greatest where all recipes are equally good in doubt: for c[r] = Σ_k p[k] · T[k, r]. So

    Σ_k p[k] · max_r (T[k, r] − Σ_j p[j] · T[j, r])

bounds it for every c. It is 0 where all categories in doubt have the same recipes at the same
quality, up to a constant of each category, which changes no choice.
"""

from __future__ import annotations

from service.broker.pool_state import Floats

# Less than this is an error of rounding.
_ROUNDING = 1e-9


def value_of_category(posterior: Floats, quality: Floats) -> float:
    """How much quality the knowledge of the category can add at most, in [0, 1].

    It holds whatever the recipes cost and however long they wait.

    Args:
        posterior: (categories,), what each category's probability is in proportion to.
        quality: (categories, recipes), the expected quality in [0, 1].
    """
    total = float(posterior.sum())
    if total <= 0 or quality.shape[1] < 2:
        return 0.0
    share = posterior / total
    value = float(share @ (quality - share @ quality).max(axis=1))
    return value if value > _ROUNDING else 0.0
