"""The toy world's test pictures in the layouts of benchmarks: evaluations without a download.

    python -m lab.benchmarks --seed 0 --out runs/toy-benchmarks
    python eval_amber.py --rule plain --questions runs/toy-benchmarks/amber/query/query_all.json \\
        --model lab/base --adapter none runs/dpo-0/adapter --out runs/toy-amber
    python eval_vqa.py --questions runs/toy-benchmarks/problems.jsonl \\
        --model lab/base --adapter none runs/dpo-0/adapter --out runs/toy-vqa
    python eval_judge.py --questions runs/toy-benchmarks/mmhal.json --annotator oracle \\
        --model lab/base --adapter none runs/dpo-0/adapter --out runs/toy-mmhal

amber/      `truth` is what a picture shows, `hallu` its ghosts, which the base likes to invent.
            relation.json has synonyms. Its questions are those of existence: ghosts and one other
            absent class, so that all answers are no
problems.jsonl      what alignment may cost: a count, a choice, what is there, with right answers
mmhal.json, mm_vet.json, mt_bench.jsonl, alpaca_eval.json, llava_bench{,_context,_gpt4}.jsonl
            a description and a question a picture, for eval_judge.py; the truth is the reference
"""

import random
from pathlib import Path

from common import Parser, new_folder, run, whole_folder, write_json
from formats.files import remember_images
from lab.drawing import CLASSES
from lab.oracle import Oracle
from lab.reading import write_rows
from lab.scenes import (
    CAPTION_PROMPTS,
    PLURALS,
    SYNONYMS,
    caption,
    open_questions,
    plural,
    some_choice,
    yes_no,
)


def test_scenes(folder, limit):
    """{image: Scene} of the first test pictures of the world in a folder."""
    scenes = Oracle(folder).scenes
    return dict([pair for pair in scenes.items() if pair[0].startswith("test_")][:limit])


def amber(scenes, rng):
    """Scenes -> (annotations, questions) in AMBER's layout; the ids of annotations count from 1."""
    annotations, questions = [], []
    for image, scene in scenes.items():
        words = {"truth": list(scene.present), "hallu": scene.ghosts}
        annotations.append({"type": "generative"} | words)
        questions.append({"image": image, "query": CAPTION_PROMPTS[0]})
    for image, scene in scenes.items():
        for name in (*scene.ghosts, rng.choice(scene.strange)):
            annotations.append({"type": "discriminative-hallucination", "truth": "no"})
            questions.append({"image": image, "query": yes_no(name, False, short=True)[0]})
    numbered = lambda rows: [{"id": i} | row for i, row in enumerate(rows, 1)]
    return numbered(annotations), numbered(questions)


def associations():
    """{class: its other forms}: synonym, irregular plural, "light" for "traffic light".

    AMBER looks up single words.
    """
    last = lambda name: name.split()[-1] if " " in name else None
    forms = {name: (SYNONYMS.get(name), PLURALS.get(name), last(name)) for name in CLASSES}
    return {name: [form for form in of if form] for name, of in forms.items()}


def problems(scenes, rng):
    """Scenes -> rows {image, problem, solution}: a count, a choice, a thing that is there."""
    found = []
    for image, scene in scenes.items():
        twice = [thing for thing in scene.things if thing.count == 2]
        thing = rng.choice(twice or scene.things)
        asked = [
            (f"How many {plural(thing.name)} are there?", str(thing.count)),
            some_choice(scene, rng),
            yes_no(rng.choice(scene.things).name, True, short=True),
        ]
        found += [{"image": image, "problem": p, "solution": s} for p, s in asked]
    return found


def judged(scenes, rng):
    """Scenes -> {file: rows, or an object} in the layouts that formats/{mmhal, ...}.py read."""
    files = {"mmhal.json": [], "mm_vet.json": {}, "mt_bench.jsonl": [], "alpaca_eval.json": []}
    wild = {f"llava_bench{name}.jsonl": [] for name in ("", "_context", "_gpt4")}
    for n, (image, scene) in enumerate(scenes.items()):
        told = caption(scene, rng)
        describe, ask = (CAPTION_PROMPTS[0], told), rng.choice(open_questions(scene))
        wild["llava_bench_context.jsonl"].append({"image": image, "caption": told})
        for k, (question, answer) in enumerate((describe, ask)):
            number, kind = 2 * n + k, ("detail", "conv")[k]
            row = {"question_type": ("holistic", "attribute")[k], "image_src": image}
            row |= {"image_content": list(scene.present), "question": question}
            files["mmhal.json"].append(row | {"gt_answer": answer, "model_answer": ""})
            row = {"imagename": image, "question": question, "answer": answer}
            files["mm_vet.json"][f"v1_{number}"] = row | {"capability": [("gen", "rec")[k]]}
            row = {"instruction": question, "image": image, "output": answer}
            files["alpaca_eval.json"].append(row | {"generator": "truth"})
            row = {"question_id": number, "image": image, "text": question, "category": kind}
            wild["llava_bench.jsonl"].append(row)
            wild["llava_bench_gpt4.jsonl"].append({"question_id": number, "text": answer})
        row = {"question_id": n, "category": "extraction", "image": image}
        files["mt_bench.jsonl"].append(row | {"turns": [describe[0], ask[0]]})
    return files | wild


def write(world, out, seed, limit=300):
    """Write the files of all benchmarks about the world in a folder. BadInput if `out` exists."""
    scenes = test_scenes(world, limit)
    with whole_folder(new_folder(out)) as aside:
        (aside / "amber" / "query").mkdir(parents=True)
        annotations, questions = amber(scenes, random.Random(f"{seed}/amber"))
        write_json(aside / "amber" / "annotations.json", annotations)
        write_json(aside / "amber" / "relation.json", associations())
        write_json(aside / "amber" / "query" / "query_all.json", questions)
        (aside / "amber" / "safe_words.txt").write_text("")
        write_rows(
            aside / "problems.jsonl", problems(scenes, random.Random(f"{seed}/vqa")), lines=True
        )
        for name, rows in judged(scenes, random.Random(f"{seed}/judged")).items():
            if isinstance(rows, dict):
                write_json(aside / name, rows)
            else:
                write_rows(aside / name, rows, lines=name.endswith("l"))
        for folder in (aside, aside / "amber" / "query"):
            remember_images(folder, Path(world) / "images")


def main(world_of):
    """The command line. world_of: seed -> the folder of that world."""
    parser = Parser(__doc__)
    flag = parser.add_argument
    flag("--seed", type=int, default=0, help="of the world")
    flag("--out", type=Path, required=True, help="folder to write; it must be new")
    args = parser.parse_args()
    write(world_of(args.seed), args.out, args.seed)


if __name__ == "__main__":
    from lab.toy import world  # a command, not a part of this module: it may import from above

    run(lambda: main(world))
