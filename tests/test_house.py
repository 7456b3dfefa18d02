"""The floors of the house: a file imports only from floors below its own. And what every loop has."""

import ast
import difflib
import resource
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FLOORS = [  # from the ground up; within a floor nobody imports anybody
    "common",
    "processes attention lora noise prefetch token_weights formats.files formats.anyres formats.weights "
    "lab.drawing",
    "nf4 formats.pictures formats.benchmarks lab.scenes",
    "model memory formats.mmhal formats.llava_bench formats.mm_vet formats.mt_bench "
    "formats.alpaca_eval lab.reading",
    "sharding data formats.adapters lab.toyworld",
    "sampling facts formats.layouts formats.llava_original formats.chat",
    "formats.dataset formats.ratings formats.instruct formats.checkpoints formats.vqa "
    "lab.text_score",
    "formats.inspector training corruption lab.oracle",
    "judge comparison lab.parts lab.questions lab.benchmarks",
    "evaluation rewards grouping",
    "eval_pope eval_chair eval_amber eval_vqa eval_judge lab.toy",
    "lab.report",
    "sft dpo mpo mdpo online_dpo bdhs povid reward_model ppo grpo annotate rejection_sampling "
    "steerlm sample",
    "lab.rows lab.similarity",
    "lab.claims lab.chart lab.fits",
    "lab.pages lab.recipes lab.sight",
    "lab.reproduce lab.bench_attention lab.bench_trl",
    "lab.bench_gpu",
    "lab.bench",
]
FLOOR = {name: i for i, floor in enumerate(FLOORS) for name in floor.split()}
SCRIPTS = "sft dpo mpo mdpo online_dpo bdhs povid reward_model ppo grpo rejection_sampling steerlm".split()  # those that train


def module_name(path):
    """formats/files.py -> "formats.files"."""
    return ".".join(path.relative_to(ROOT).with_suffix("").parts)


def imports(path):
    """The modules of this project that a file imports, lazily or not.

    Not counted: a command's door, `if __name__ == "__main__"`, which is no part of the module.
    """
    tree = ast.parse(path.read_text(encoding="utf-8"))
    doors = [n for n in tree.body if isinstance(n, ast.If) and "__main__" in ast.unparse(n.test)]
    inside = {id(n) for door in doors for n in ast.walk(door)}
    found = set()
    for node in ast.walk(tree):
        if id(node) in inside:
            continue
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= names & FLOOR.keys() or {node.module}
    return found & (FLOOR.keys() | {"formats", "lab"})


FILES = [p for p in ROOT.rglob("*.py") if p.parent in (ROOT, ROOT / "lab", ROOT / "formats")]
FILES = [p for p in FILES if p.name != "__init__.py"]


def test_every_file_has_a_floor():
    assert {module_name(p) for p in FILES} == FLOOR.keys()


@pytest.mark.parametrize("path", FILES, ids=module_name)
def test_imports_go_down(path):
    here = FLOOR[module_name(path)]
    wrong = {name for name in imports(path) if name not in FLOOR or FLOOR[name] >= here}
    assert not wrong, f"{path.name} imports {wrong} from its own floor or above"


@pytest.mark.parametrize("name", SCRIPTS)
def test_every_loop_clips_and_checks_before_its_step(name):
    """In the order clip, check, step; clipping at 1 is part of every script's recipe."""
    tree = ast.parse((ROOT / f"{name}.py").read_text(encoding="utf-8"))
    calls = [n for n in ast.walk(tree) if isinstance(n, ast.Call)]
    order = [n for n in calls if isinstance(n.func, ast.Attribute)]
    wanted = ["clip_gradients", "check_finite", "take_step"]
    order = sorted((n for n in order if n.func.attr in wanted), key=lambda n: n.lineno)
    assert [n.func.attr for n in order] == wanted
    assert ast.unparse(order[0]) == "training.clip_gradients(optimizer, max_norm=1.0)"


@pytest.mark.parametrize("name", SCRIPTS)
def test_nothing_in_a_micro_batch_is_copied_while_the_host_waits(name):
    """A copy from pageable memory waits until the device is idle: Batch.to pins, the rest says how."""
    tree = ast.parse((ROOT / f"{name}.py").read_text(encoding="utf-8"))
    loops = [n for n in ast.walk(tree) if isinstance(n, ast.For)]
    collating = [n for n in loops if ".collate(" in ast.unparse(n)]
    assert collating
    waits = []
    for call in (n for loop in collating for n in ast.walk(loop) if isinstance(n, ast.Call)):
        method = call.func.attr if isinstance(call.func, ast.Attribute) else ""
        keywords = {k.arg for k in call.keywords}
        if method == "tensor" and "device" in keywords:
            waits.append(ast.unparse(call))
        if method == "to" and "non_blocking" not in keywords:
            moved = call.func.value  # a Batch, by its name or by what makes it
            made = ast.unparse(moved.func) if isinstance(moved, ast.Call) else ast.unparse(moved)
            if made not in ("batch", "replace", "processor.collate", "self.processor.collate"):
                waits.append(ast.unparse(call))
        if method == "policy_loss" or getattr(call.func, "id", "") == "policy_loss":
            waits += [ast.unparse(a) for a in call.args if "last_of" in ast.unparse(a)]
    assert not waits


@pytest.mark.parametrize("name", [*SCRIPTS, "annotate"])
def test_every_script_draws_its_subset(name):
    """--subset is a flag of all of them."""
    code = (ROOT / f"{name}.py").read_text(encoding="utf-8")
    assert "subset=(args.subset, args.seed)" in code or "draw(args.subset, args.seed)" in code


@pytest.mark.parametrize("name", ["mpo", "mdpo"])
def test_a_relative_of_dpo_shows_its_idea_and_little_else(name):
    """Lines of code that differ from dpo.py's: a replaced line counts once."""
    code = []
    for script in ("dpo", name):
        text = (ROOT / f"{script}.py").read_text(encoding="utf-8")
        docstring = ast.parse(text).body[0]
        code.append(text.splitlines()[docstring.end_lineno :])
    changes = difflib.SequenceMatcher(None, *code, autojunk=False).get_opcodes()
    lines = sum(max(c[2] - c[1], c[4] - c[3]) for c in changes if c[0] != "equal")
    assert 30 < lines < 70


@pytest.mark.parametrize("name", ["common", "formats.files"])
def test_reading_a_file_loads_no_torch(name):
    code = f"import {name}, sys; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


@pytest.mark.parametrize(
    "name",
    [*SCRIPTS, "sample", "eval_pope", "eval_chair", "eval_amber", "eval_vqa", "eval_judge", "data"],
)
def test_help_comes_soon(name):
    """Ten seconds of CPU time, however loaded the machine; it takes two, torch most of them."""
    spent = lambda: sum(resource.getrusage(resource.RUSAGE_CHILDREN)[:2])
    before = spent()
    done = subprocess.run(
        [sys.executable, str(ROOT / f"{name}.py"), "--help"], capture_output=True, text=True
    )
    assert done.returncode == 0 and "usage" in done.stdout, done.stderr
    assert spent() - before < 10
