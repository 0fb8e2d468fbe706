"""A patch schedule of your own: a side drawn at random at every step, instead of level by level.

bash scripts/autoregressive/train_c2i.sh … --patch-schedule 'examples/random_sides.py:random_sides(sides=(1, 2))'
"""

import random


def random_sides(
    step: int, total_steps: int, sides: tuple[int, ...] = (1, 2, 4), last_part_fine: float = 0.1, seed: int = 0
) -> int:
    """The patch side of `step`, counted from 0; the last tenth of the training is at side 1, as sampling is.

    A function of the step alone: a run that was killed goes on with the same sides, and so does every process.
    """
    if step >= (1 - last_part_fine) * total_steps:
        return 1
    return random.Random(f"{seed}/{step}").choice(sides)
