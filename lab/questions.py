"""Problems about a toy world's pictures with their right answer, in the layout of R1-V's data.

They are for grpo.py. The answers come from the world's truth. Each preference image has a question
of how many objects of a class there are, two where the picture has two of one, and a choice.
"""

import random

from lab.oracle import Oracle
from lab.reading import write_rows
from lab.scenes import plural, some_choice


def rows_of(folder, seed):
    """Rows {image, problem, solution} of the world in this folder."""
    rng = random.Random(f"{seed}/problems")
    rows = []
    for image, scene in Oracle(folder).scenes.items():
        if not image.startswith("preference_"):
            continue
        pairs = [thing for thing in scene.things if thing.count == 2]
        thing = rng.choice(pairs or scene.things)
        asked = [(f"How many {plural(thing.name)} are there?", str(thing.count))]
        asked.append(some_choice(scene, rng))
        for problem, answer in asked:
            solution = f"<answer> {answer} </answer>"
            rows.append({"image": image, "problem": problem, "solution": solution})
    return rows


def write(folder, seed, path):
    """Write the problems of the world in this folder to a file of JSON lines."""
    write_rows(path, rows_of(folder, seed), lines=True)
