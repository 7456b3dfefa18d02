"""Problems about a toy world's pictures with their right answer, in the layout of R1-V's data.

They are for grpo.py. The answers come from the world's truth. Each preference image has a yes/no
question about an object that is there; two in five have one about a class that is usual in such a
scene and absent, as POPE's adversarial ones are. With one for each image the model learned to say
"No" too often. Every third image has a question of how many objects of a class there are, two where
the picture has two of one; every tenth a choice, which the toy base answers by chance.
"""

import random

from lab.oracle import Oracle
from lab.reading import write_rows
from lab.scenes import USUAL, plural, some_choice, yes_no


def rows_of(folder, seed):
    """Rows {image, problem, solution} of the world in this folder."""
    rng = random.Random(f"{seed}/problems")
    scenes = Oracle(folder).scenes.items()
    rows = []
    for i, (image, scene) in enumerate(one for one in scenes if one[0].startswith("preference_")):
        names = [rng.choice(scene.things).name]
        if i % 5 < 2:
            absent = [name for name in USUAL[scene.kind] if name not in scene.present]
            names.append(rng.choice(absent or scene.strange))
        asked = [yes_no(name, name in scene.present, rng.random() < 0.5) for name in names]
        if i % 3 == 0:
            pairs = [thing for thing in scene.things if thing.count == 2]
            thing = rng.choice(pairs or scene.things)
            asked.append((f"How many {plural(thing.name)} are there?", str(thing.count)))
        if i % 10 == 0:
            asked.append(some_choice(scene, rng))
        for problem, answer in asked:
            solution = f"<answer> {answer} </answer>"
            rows.append({"image": image, "problem": problem, "solution": solution})
    return rows


def write(folder, seed, path):
    """Write the problems of the world in this folder to a file of JSON lines."""
    write_rows(path, rows_of(folder, seed), lines=True)
