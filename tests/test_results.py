"""The pages say what results/results.json and results/bench.json hold, and their tables, verdicts and charts are right."""

import copy
import itertools
import json
import os
import re
from pathlib import Path
from types import SimpleNamespace

import pytest

import annotate
import dpo
import grpo
import online_dpo
import ppo
from common import BadInput
from lab import chart, claims, pages, report, reproduce
from lab.rows import DEFAULT, EQUAL, ROWS, comparable

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def cells():
    """Figures of three seeds, measured once; those of later rows are the default's, text scores .7."""
    cells = json.loads((ROOT / "tests" / "data" / "results.json").read_text())
    for row in ROWS:
        cells.setdefault(row, copy.deepcopy(cells["dpo"]))
        for cell in cells[row].values() if ROWS[row].family != "reward" else ():
            for side in ("before", "after"):
                cell[side]["text"] = {"mean": 0.7}
            cell["llm"] = {"mean": 0.8}
    logs = {  # of each seed: first and last fifth of the steps
        "dpo": {"logps/chosen": ((-20, -25), (-20, -21), (-22, -30))},
        "mpo": {"logps/chosen": ((-20, -9), (-20, -20), (-22, -8))},
        "grpo": {
            "frac_reward_zero_std": ((0.3, 0.5), (0.3, 0.4), (0.2, 0.6)),
            "completions/mean_length": ((15, 12), (15, 12), (15, 12)),
            "completions/wrong_length": ((4, 4), (4, 5), (4, 6)),
            "rewards/exact/mean": ((0.6, 0.8), (0.6, 0.7), (0.6, 0.7)),
        },
        "grpo-dr": {
            "frac_reward_zero_std": ((0.3, 0.5), (0.3, 0.25), (0.2, 0.6)),
            "completions/wrong_length": ((4, 3), (4, 4), (4, 5)),
            "rewards/exact/mean": ((0.6, 0.8), (0.6, 0.9), (0.6, 0.6)),
        },
    }
    for row, names in logs.items():
        for name, values in names.items():
            for cell, ends in zip(cells[row].values(), values, strict=True):
                cell.setdefault("log", {})[name] = list(ends)
    return {row: cells[row] for row in ROWS}


@pytest.fixture(scope="module")
def real():
    """What most tables of the pages show: results/results.json."""
    return comparable(json.loads((ROOT / "results" / "results.json").read_text()))


def summary(accuracy, chair_s, recall=0.9, words=30.0):
    split = {"accuracy": accuracy, "yes_ratio": 0.5}
    chair = {"chair_s": chair_s, "chair_i": 0.1, "recall": recall, "length": words}
    splits = dict.fromkeys(("random", "popular", "adversarial"), split)
    return {"pope": splits, "chair": chair, "text": {"mean": 0.7}}


def by_seed(before, *after):
    """Cells of one row: a base, and what became of it on seeds 0, 1, ..."""
    return {str(s): {"before": before, "after": one, "minutes": 2.0} for s, one in enumerate(after)}


# ---- tables


def test_table_by_hand():
    """Two seeds: means, sample standard deviations, mean paired differences; families stand together."""
    row = {
        str(s): {
            "before": summary(0.8 + 0.1 * s, 0.6),
            "after": summary(0.9, 0.2 + 0.2 * s),
            "minutes": 2.0,
        }
        for s in (0, 1)
    }
    lines = pages.table({"rloo": row, "dpo": row}).splitlines()
    assert lines[2].startswith("| base | 2 | 0.850 ± 0.071 |") and "| 0.600 ± 0.000 |" in lines[2]
    assert lines[3].startswith("| DPO, corrupted truth | 2 | 0.900 ± 0.000 (+0.050) |")
    assert "| 0.300 ± 0.141 (-0.300) |" in lines[3]
    assert lines[3].endswith("| 30.0 ± 0.0 (+0.0) | 0.700 ± 0.000 (+0.000) | 2.0 |")
    assert lines[4].startswith("| RLOO, factual reward model | 2 |") and len(lines) == 5


def test_tables_of_what_samples_by_hand(tmp_path):
    """Reward models have a table of their own; logs are means over seeds of the first and the last fifth of the steps."""
    held = lambda accuracy: {
        "accuracy": accuracy,
        "length_correlation": -0.5,
        "longer_preferred": 0.25,
        "longer_favoured": 0.0,
    }
    rewards = {
        str(s): {"after": {"reward": {"a/povid.json": held(0.8 + 0.1 * s)}}, "minutes": 3.0}
        for s in (0, 1)
    }
    (tmp_path / "metrics.jsonl").write_text(
        "".join(json.dumps({"objective/kl": k, "response_length": 20.0}) + "\n" for k in range(10))
    )
    log = reproduce.log_of(tmp_path)
    assert log == {"objective/kl": [0.5, 8.5], "response_length": [20, 20]}
    run = {"before": summary(0.8, 0.6), "after": summary(0.9, 0.2), "minutes": 2.0, "log": log}
    other = run | {"log": {"objective/kl": [1.5, 9.5], "response_length": [20, 10]}}
    found = {"reward": rewards, "ppo": {"0": run, "1": other}}
    assert "reads facts" not in pages.table(found) and "| PPO, factual" in pages.table(found)
    line = "| reads facts | 2 | povid.json | 0.850 ± 0.071 | -0.500 ± 0.000 | 0.250 ± 0.000 | 0.000 ± 0.000 | 3.0 |"
    assert pages.reward_table(found).splitlines()[2:] == [line]
    logged = pages.log_table(found)
    assert "1.00 → 9.00" in logged and "20.00 → 15.00" in logged and len(logged.splitlines()) == 3
    assert pages.reward_table({"ppo": found["ppo"]}) == ""


def test_only_reward_models_have_no_table_of_policies(tmp_path):
    held = {"accuracy": 0.9, "length_correlation": 0, "longer_preferred": 1, "longer_favoured": 1}
    found = {"reward": {"0": {"after": {"reward": {"a.json": held}}, "minutes": 1.0}}}
    assert pages.table(found) == pages.log_table(found) == ""
    assert "a.json" in pages.reward_table(found)
    assert chart.draw(found, tmp_path / "chart.png", "recall", "") == []
    assert not (tmp_path / "chart.png").exists()


# ---- what lab.reproduce runs


def test_another_rows_folder(tmp_path):
    with pytest.raises(BadInput, match="reward-1: not there yet; --only reward makes it"):
        reproduce.written("@reward", 1, tmp_path)
    (tmp_path / "reward-1").mkdir()
    (tmp_path / "reward-1" / "summary.json").write_text("{}")
    assert reproduce.written("@reward", 1, tmp_path) == str(tmp_path / "reward-1")
    assert reproduce.written("--mix", 1, tmp_path) == "--mix"


SCRIPT = """
import json, sys
from pathlib import Path
out = Path(sys.argv[sys.argv.index("--out") + 1])
out.mkdir()
(out / "metrics.jsonl").write_text(json.dumps({"response_length": 2}) + "\\n")
seconds = {"setup": 2.0, "reference": 0.0, "train": 1.0, "sample": 2.0, "eval": 3.0}
(out / "summary.json").write_text(json.dumps({"before": {}, "after": {}, "seconds": seconds}))
(out / "preferences.json").write_text("[]")
"""


def test_a_cell_counts_its_cpu_seconds(tmp_path, monkeypatch):
    """4 s of making data, and of the last command's 4 s the three eighths that are neither setup nor evaluation."""
    wait, used = os.wait4, SimpleNamespace(ru_utime=3.0, ru_stime=1.0)
    monkeypatch.setattr(reproduce.os, "wait4", lambda *a: (*wait(*a)[:2], used))
    monkeypatch.setattr(reproduce, "ROOT", tmp_path)
    monkeypatch.setattr(reproduce.toy, "world", lambda seed: tmp_path)
    monkeypatch.setattr(reproduce.toy, "data_file", lambda seed, name: tmp_path / name)
    (tmp_path / "x.py").write_text(SCRIPT)
    row = ROWS["bdhs"]._replace(commands=[("x.py", "povid.json", []), ("x.py", None, [])])
    monkeypatch.setitem(ROWS, "bdhs", row)
    cell = reproduce.run_cell("bdhs", 1, False, tmp_path)
    assert cell["cpu_seconds"] == 5.5
    assert cell["log"] == {"response_length": [2, 2]}
    (tmp_path / "x.py").write_text("raise SystemExit(3)")
    with pytest.raises(BadInput, match="ended with status 3: see .*bdhs-1-data.log"):
        reproduce.run_cell("bdhs", 1, False, tmp_path)


def test_a_metric_that_some_steps_lack(tmp_path):
    """The mean over the steps that have it; left out if a fifth has none."""
    steps = [{"frac_reward_zero_std": 0.5, "rewards/exact/mean": 0.5} for _ in range(10)]
    steps[0] |= {"completions/wrong_length": 4}
    steps[8] |= {"completions/wrong_length": 3}
    del steps[8]["rewards/exact/mean"], steps[9]["rewards/exact/mean"]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(m) + "\n" for m in steps))
    found = {"frac_reward_zero_std": [0.5, 0.5], "completions/wrong_length": [4, 3]}
    assert reproduce.log_of(tmp_path) == found


def test_equal_numbers_of_answers():
    """What the table says is what the rows' flags make of the scripts' toy settings."""
    for row, (_, answers) in EQUAL.items():
        script, data, flags = ROWS[row].commands[0]
        given = dict(itertools.pairwise(flags))
        toy = {"annotate.py": annotate, "dpo.py": dpo, "online_dpo.py": online_dpo}
        toy = (toy | {"ppo.py": ppo, "grpo.py": grpo})[script].TOY
        number = lambda name, default: float(given.get(name, default))
        prompts = number("--steps", toy.get("steps", 0)) * number("--batch-size", toy["batch_size"])
        if script == "annotate.py":  # of 3,000 prompts
            assert round(number("--share", 1) * 3000) * 4 == answers
        elif script == "online_dpo.py":
            assert prompts * 2 == answers
        elif script == "ppo.py":
            kind = given.get("--advantage", "gae")
            each = number("--samples", ppo.TOY_SAMPLES[kind])
            assert prompts * number("--minibatches", toy["minibatches"]) * each == answers
        elif script == "grpo.py":
            assert prompts * 8 == answers
        else:
            assert answers == 0


def test_the_table_of_equal_answers_by_hand():
    """CPU seconds of the seeds that have them; nothing where none has."""
    row = by_seed(summary(0.8, 0.6), summary(0.9, 0.2), summary(0.9, 0.4))
    timed = copy.deepcopy(row)
    timed["1"]["cpu_seconds"] = 31.4
    lines = pages.equal_table({"rloo": row, "dpo": timed, "ipo": row}).splitlines()
    assert lines[0].startswith("| method | who judges | answers | CPU s | CHAIR_s | recall |")
    assert lines[2].startswith("| DPO, corrupted truth | the data | 0 | 31 | 0.300 ± 0.141 |")
    assert lines[3].startswith(
        "| RLOO, factual reward model | reward model, length | 2,560 |  | 0.3"
    )
    assert lines[3].endswith("| 0.900 ± 0.000 | 0.900 ± 0.000 | 0.700 ± 0.000 | 30.0 ± 0.0 |")
    assert len(lines) == 4


@pytest.fixture
def cells_run(tmp_path, monkeypatch):
    """lab.reproduce with cells that take no time: a function of its arguments -> what ran, in order."""
    ran = []
    monkeypatch.setattr(reproduce.toy, "base", lambda seed: ran.append(("base", seed)))
    monkeypatch.setattr(reproduce, "prepare", lambda seed, what: ran.append((what, seed)))

    def run_cell(row, seed, quick, folder):
        ran.append((row, seed))
        if (row, seed) == ("povid", 7):
            raise BadInput("povid, seed 7, failed")
        return {"minutes": 1.0}

    monkeypatch.setattr(reproduce, "run_cell", run_cell)

    def start(seeds, only, jobs=3):
        args = SimpleNamespace(seeds=seeds, only=only, jobs=jobs, quick=False)
        reproduce.run_all(args, tmp_path, tmp_path / "results.json")

    return start, ran


@pytest.mark.parametrize("jobs", [1, 3])
def test_what_a_cell_waits_for_runs_first(cells_run, tmp_path, jobs):
    """The base, what rows share, another row's run folder; and each of them once."""
    start, ran = cells_run
    start([1, 2], ["ppo", "judged-dpo", "reward", "dpo"], jobs)
    assert len(ran) == len(set(ran)) == 2 + 2 * 3 + 2 * 4
    place = {what: i for i, what in enumerate(ran)}
    for seed in (1, 2):
        assert place["base", seed] < 2
        assert place["reward", seed] < place["ppo", seed]
        assert place["ratings.jsonl", seed] < place["judged-dpo", seed]
        assert place["evaluation", seed] < min(place[row, seed] for row in ("dpo", "ppo"))
        assert place["vlfeedback.jsonl", seed] < place["reward", seed]
    written = json.loads((tmp_path / "results.json").read_text())
    assert [*written] == ["dpo", "reward", "ppo", "judged-dpo"]  # as in ROWS
    assert all([*by_seed] == ["1", "2"] for by_seed in written.values())


def test_cells_run_once_and_one_that_fails_stops_no_other(cells_run, tmp_path):
    start, ran = cells_run
    start([1], ["dpo"])
    with pytest.raises(BadInput, match="povid, seed 7, failed"):
        start([1, 7], ["dpo", "povid", "bdhs"], 1)
    cells = [one for one in ran if one[0] in ROWS]
    assert cells == [("dpo", 1), ("bdhs", 1), ("povid", 1), ("dpo", 7), ("bdhs", 7), ("povid", 7)]
    written = json.loads((tmp_path / "results.json").read_text())
    assert {row: [*by_seed] for row, by_seed in written.items()} == {
        "dpo": ["1", "7"],
        "bdhs": ["1", "7"],
        "povid": ["1"],
    }


def test_pages_are_of_the_seeds_of_two_rows():
    """The default may have further seeds, and so may others."""
    one, two, three = {"0": 1}, {"0": 1, "1": 2}, {"0": 1, "1": 2, "2": 3}
    cells = {DEFAULT: three, "dpo": two, "ipo": one, "ppo": three}
    assert comparable(cells) == {DEFAULT: two, "dpo": two, "ppo": two}
    assert comparable({DEFAULT: two, "dpo": one}) == {DEFAULT: one, "dpo": one}
    assert (
        comparable({DEFAULT: two, "ipo": one}) == comparable({"dpo": one}) == comparable({}) == {}
    )


def test_the_table_of_seeds_by_hand():
    """Each seed on a line, whether other rows have it or not."""
    before = summary(0.8, 0.6, 0.95, 40.0)
    later = summary(0.84, 0.1, 0.93, 30.0) | {"text": {"mean": 0.65}}
    cells = {
        DEFAULT: {"0": {"before": before, "after": later}, "7": {"before": before, "after": before}}
    }
    _, _, first, second = pages.seeds_table(cells | {"dpo": {}}).splitlines()
    assert first == (
        "| DPO, corrected samples (default) | 0 | 0.600 → 0.100 (-50.0) | 0.950 → 0.930 (-2.0) | 0.800 → 0.840 (+4.0) "
        "| 0.800 → 0.840 (+4.0) | 0.700 → 0.650 (-5.0) | 40.0 → 30.0 (-25 %) |"
    )
    assert second.startswith("| DPO, corrected samples (default) | 7 | 0.600 → 0.600 (+0.0) |")
    assert pages.seeds_table({}) == ""


def test_the_commands_of_the_results_are_those_of_the_rows():
    """Else a figure would have another command than the one that is said to give it."""
    elsewhere = ("--data", "--images", "--seed", "--out")
    for row, by_seed in json.loads((ROOT / "results" / "results.json").read_text()).items():
        for seed, cell in by_seed.items():
            for (script, _, flags), command in zip(
                ROWS[row].commands, cell["commands"], strict=True
            ):
                words = iter(command[1:])
                shown = [word for word in words if word not in elsewhere or not next(words)]
                assert command[0] == script and len(shown) == len(flags), (row, seed)
                for word, flag in zip(shown, flags):
                    made = flag.startswith("@") or flag.endswith(".jsonl")  # a path by now
                    assert word == flag or made and not word.startswith("-"), (row, seed)


def test_report_writes_pages_elsewhere_and_trains_nothing(cells, tmp_path, monkeypatch, capsys):
    """--report with another folder: its README.md and charts; the repository's README stays."""
    readme = (ROOT / "README.md").read_bytes()
    (tmp_path / "results.json").write_text(json.dumps(cells))
    monkeypatch.setattr("sys.argv", ["reproduce", "--report", "--out", str(tmp_path)])
    monkeypatch.setattr(reproduce, "run_cell", None)
    monkeypatch.setattr(claims, "SIGHT", tmp_path.with_name("sight.json"))
    claims.SIGHT.write_text(json.dumps(of_sight([(0.0, 0.1, 0.2)] * 2)))
    reproduce.main()
    names = {"results.json", "README.md", "chart.png", "chart_pope.png"}
    assert {p.name for p in tmp_path.iterdir()} == names
    page = (tmp_path / "README.md").read_text()
    assert pages.table(cells) in page and "**Open.**" not in page
    assert (ROOT / "README.md").read_bytes() == readme
    assert pages.table(cells) in capsys.readouterr().out

    # rows that are not there: their claims are open, and nothing else tells of them
    few = {row: cells[row] for row in ("dpo", "dpo-corrected", "reward")}
    (tmp_path / "results.json").write_text(json.dumps(few))
    reproduce.main()
    page = (tmp_path / "README.md").read_text()
    assert "the row 'online-povid' is not measured yet." in page and "**Open.**" in page
    (tmp_path / "results.json").write_text(json.dumps({"ipo": cells["ipo"]}))
    with pytest.raises(BadInput, match="the pages need a seed of the rows dpo-corrected and dpo,"):
        reproduce.main()


# ---- the claims


def test_figures_by_hand():
    """Two seeds. Base: CHAIR_s .6, recall .9, 30 words. dpo: CHAIR_s .3 and .1; ipo: .5 and .1."""
    base = summary(0.8, 0.6)
    f = claims.Figures(
        {
            "dpo": by_seed(base, summary(0.8, 0.3, 0.88, 20), summary(0.81, 0.1, 0.87, 25)),
            "ipo": by_seed(base, summary(0.7, 0.5), summary(0.8, 0.1)),
        }
    )
    assert f.chair("dpo") == "0.200" and f.value("dpo", "words") == "22.500"
    assert f.recall("dpo") == "-2.5" and f.loss("dpo") == "2.5"
    assert f.hard("dpo") == "+0.5" and f.seeds("dpo", "POPE adversarial") == "0.0, +1.0"
    assert f.both("dpo") == "CHAIR_s 0.200, recall -2.5 points"
    assert f.cut("dpo") == "67 %" and f.cut("dpo", "words") == "25 %"
    assert f.part("ipo", "dpo", "CHAIR_s") == "75 %"
    # a tie is not higher
    assert f.count("ipo", "dpo", "CHAIR_s") == 1 and not f.every("ipo", "dpo", "CHAIR_s")
    assert f.every("dpo", "ipo", "POPE adversarial")
    assert [claims.signed(v) for v in (0.04, -0.04, 0.05001, -12)] == [
        "0.0",
        "0.0",
        "+0.1",
        "-12.0",
    ]


def test_verdict():
    assert claims.verdict(True, True) == "**Holds here.**"
    assert claims.verdict(True, False) == "**Holds in part.**"
    assert claims.verdict(False, False) == "**Does not hold here.**"


def of_sight(gains, tuned=(0.5, 0.9)):
    """Cells of lab.sight: two seeds with these gains of facts at 144, 12 and 0 pixels, a third with one cell."""
    found = {"accuracy/2/0/facts": 1.0}
    for seed, of_seed in enumerate(gains):
        for side, gain in zip(claims.SIDES, of_seed):
            found[f"sight/{seed}/{side}"] = side / 200
            found[f"accuracy/{seed}/{side}/plain"] = 0.7
            found[f"accuracy/{seed}/{side}/facts"] = 0.7 + gain
        for base, right in zip(("plain", "plus"), tuned):
            pope = {"random": right, "adversarial": right - seed / 10}
            found[f"tuning/{seed}/{base}"] = {
                "pope": pope,
                "choice": right,
                "chair_s": 0.6,
                "text": 0.7,
            }
    return found


@pytest.mark.parametrize(
    "gains, tuned, facts, human",
    [
        ([(0.0, 0.1, 0.2), (0.01, 0.02, 0.1)], (0.5, 0.9), "Holds here", "Holds here"),
        ([(0.0, 0.1, 0.2), (0.03, 0.02, 0.1)], (0.9, 0.5), "Holds in part", "Does not hold here"),
        ([(0.1, -0.1, -0.2)] * 2, (0.5, 0.5), "Does not hold here", "Does not hold here"),
    ],
)
def test_claims_of_sight(cells, monkeypatch, tmp_path, gains, tuned, facts, human):
    """Seeds that lack a cell do not count."""
    monkeypatch.setattr(claims, "SIGHT", tmp_path / "sight.json")
    claims.SIGHT.write_text(json.dumps(of_sight(gains, tuned)))
    found = {c.sentence.partition(" ")[0]: c for c in claims.claims(cells) if c.paper == claims.SUN}
    assert found["Facts"].verdict == f"**{facts}.**"
    assert found["Human-made"].verdict == f"**{human}.**"
    first = gains[0][0]
    assert f"(by seed {claims.signed(100 * first)}, " in found["Facts"].here


VERDICTS = {  # read by hand from the seeds' figures
    "Offline DPO on corrupted": "Holds in part",
    "Mixing adds nothing": "Holds in part",
    "A stronger annotator": "Holds in part",
    "Pairs of an answer": "Cannot be tested here",
    "Prompts that the model": "Holds here",
    "Chosen answers of a weaker": "Cannot be tested here",
    "BDHS with the attention": "Holds in part",
    "Reference guidance": "Holds in part",
    "Online BDHS": "Does not hold here",
    "A reward model trained": "Does not hold here",
    "IPO and SLiC": "Holds in part",
    "DPO is better than": "Does not hold here",
    "SFT on a teacher": "Does not hold here",
    "Rejection sampling": "Does not hold here",
    "The gain grows": "Does not hold here",
    "Pairs that another": "Holds here",
    "A reward model that reads": "Does not hold here",
    "Facts help most": "Open",
    "Plain PPO": "Holds in part",
    "A larger reward": "Cannot be tested here",
    "Human-made": "Open",
    "Alignment costs": "Cannot be tested here",
    "DPO without the images": "Holds here",  # the same figures
    "mDPO hallucinates": "Does not hold here",
    "With MPO": "Holds here",
    "More and more": "Holds in part",
    "Dr. GRPO's wrong": "Holds here",
}


def test_verdicts_of_the_claims(cells, monkeypatch, tmp_path):
    monkeypatch.setattr(claims, "SIGHT", tmp_path / "sight.json")
    for claim, (begin, verdict) in zip(claims.claims(cells), VERDICTS.items(), strict=True):
        assert claim.sentence.startswith(begin) and claim.verdict.startswith(f"**{verdict}")


def changed(cells, row, place, value):
    """The cells with another figure on each seed of a row."""
    cells = copy.deepcopy(cells)
    for seed, cell in cells[row].items():
        target = cell["after"]
        for key in place[:-1]:
            target = target[key]
        target[place[-1]] = value(seed, target[place[-1]])
    return cells


@pytest.mark.parametrize(
    "begin, row, place, value, verdict",
    [
        ("Online BDHS", "bdhs-online", ("chair", "chair_s"), lambda s, v: 0.01, "Holds in part"),
        # fewer hallucinations on two seeds of three are not enough
        (
            "Online BDHS",
            "bdhs-online",
            ("chair", "chair_s"),
            lambda s, v: v if s == "1" else 0.01,
            "Does not hold here",
        ),
        ("BDHS with the", "povid", ("chair", "chair_s"), lambda s, v: 0.5, "Holds here"),
        ("BDHS with the", "bdhs", ("chair", "chair_s"), lambda s, v: 0.5, "Does not hold here"),
        ("Reference guidance", "bdhs", ("chair", "chair_s"), lambda s, v: 0.01, "Holds here"),
        ("Prompts that", "dpo-seen", ("chair", "chair_s"), lambda s, v: v + 0.1, "Holds in part"),
        ("A stronger", "online", ("chair", "chair_s"), lambda s, v: 0.01, "Holds here"),
        ("Plain PPO", "ppo-plain", ("chair", "length"), lambda s, v: 50.0, "Holds here"),
        ("A reward model trained", "ppo", ("chair", "chair_s"), lambda s, v: 0.9, "Holds in part"),
        ("Mixing adds", "online", ("chair", "chair_s"), lambda s, v: 0.01, "Holds here"),
        ("DPO is better", "judged-dpo", ("text", "mean"), lambda s, v: 0.9, "Holds in part"),
        # above the LLM on two seeds of three is not enough, and above the others it is
        (
            "DPO is better",
            "judged-dpo",
            ("text", "mean"),
            lambda s, v: 0.75 if s == "1" else 0.9,
            "Holds in part",
        ),
        ("SFT on a", "judged-sft", ("text", "mean"), lambda s, v: 0.6, "Holds in part"),
        (
            "Rejection",
            "judged-best",
            ("pope", "adversarial", "accuracy"),
            lambda s, v: 0.99,
            "Holds here",
        ),
        # better than SteerLM, which fell apart, is no part of it
        (
            "Rejection",
            "judged-steerlm",
            ("pope", "adversarial", "accuracy"),
            lambda s, v: 0.1,
            "Does not hold here",
        ),
        (
            "Pairs that another",
            "judged-transfer",
            ("chair", "chair_s"),
            lambda s, v: 0.9,
            "Holds in part",
        ),
        (
            "DPO without",
            "dpo-imageless",
            ("chair", "chair_s"),
            lambda s, v: v + 0.1,
            "Holds in part",
        ),
        ("mDPO", "mdpo", ("chair", "chair_s"), lambda s, v: 0.01, "Holds in part"),
        ("mDPO", "mdpo", ("chair", "recall"), lambda s, v: 0.5, "Holds in part"),
    ],
)
def test_a_verdict_follows_the_figures(cells, begin, row, place, value, verdict):
    found = claims.claims(changed(cells, row, place, value))
    (claim,) = [c for c in found if c.sentence.startswith(begin)]
    assert claim.verdict == f"**{verdict}.**"


@pytest.mark.parametrize(
    "begin, row, name, ends, verdict",
    [
        ("With MPO", "dpo", "logps/chosen", [-20, -20], "Holds in part"),
        ("With MPO", "mpo", "logps/chosen", [-20, -21], "Holds in part"),
        ("More and more", "grpo-dr", "frac_reward_zero_std", [0.2, 0.3], "Holds here"),
        ("Dr. GRPO", "grpo-dr", "completions/wrong_length", [9, 5], "Holds in part"),
        ("Dr. GRPO", "grpo-dr", "rewards/exact/mean", [0.9, 0.6], "Holds in part"),
    ],
)
def test_a_verdict_follows_the_logs(cells, begin, row, name, ends, verdict):
    """Another first and last fifth on each seed of a row."""
    cells = copy.deepcopy(cells)
    for cell in cells[row].values():
        cell["log"][name] = ends
    (claim,) = [c for c in claims.claims(cells) if c.sentence.startswith(begin)]
    assert claim.verdict == f"**{verdict}.**"


def test_facts_would_make_the_reward_model_more_accurate(cells):
    cells = copy.deepcopy(cells)
    for cell in cells["reward"].values():
        for held in cell["after"]["reward"].values():
            held["accuracy"] = 0.99
    (claim,) = [c for c in claims.claims(cells) if c.sentence.startswith("A reward model that")]
    assert claim.verdict == "**Holds here.**" and "0.990 against 0.837 (povid.json)" in claim.here


# ---- the charts


def test_pareto_by_hand():
    """x: higher is better, y: lower is better. b is beaten by c in both; d by c in y alone at the same x."""
    points = {"a": (0.0, 0.6), "b": (-3.0, 0.2), "c": (-2.0, 0.1), "d": (-2.0, 0.3), "e": (-9.0, 0.05)}  # fmt: skip
    assert chart.pareto(points) == ["e", "c", "a"]
    assert chart.pareto({"a": (0.0, 0.1), "b": (0.0, 0.1)}) == ["a", "b"]


def test_labels_by_hand():
    """Two points in one place: both labels are in the frame, beside each other, and not on the point."""
    points, sizes = {"a": (50, 50), "b": (50, 50)}, {"a": (40, 10), "b": (40, 10)}
    point = (45, 45, 55, 55)
    boxes = chart.place_labels(sizes, points, (0, 0, 200, 100), [point], [])
    assert not chart.overlap(boxes["a"], boxes["b"])
    for x0, y0, x1, y1 in boxes.values():
        assert 0 < x0 and 0 < y0 and x1 < 200 and y1 < 100 and (x1 - x0, y1 - y0) == (40, 10)
        assert not chart.overlap((x0, y0, x1, y1), point)
    with pytest.raises(ValueError, match="no free place for the label of"):
        chart.place_labels(sizes, points, (0, 0, 60, 30), [point], [])
    assert chart.crosses((0, 0), (10, 0), (5, 7)) and not chart.crosses((0, 0), (10, 0), (5, 9))
    assert not chart.crosses((0, 0), (10, 0), (19, 0))


@pytest.mark.parametrize("column", ["recall", "POPE adversarial"])
def test_no_label_of_the_charts_covers_another(cells, column, tmp_path):
    panels = chart.draw(cells, tmp_path / "chart.png", column, "")
    labelled = [row for boxes in panels for row in boxes if row != "base"]
    assert sorted(labelled) == sorted(row for row in ROWS if ROWS[row].family != "reward")
    for family, boxes in zip(chart.COLOURS, panels, strict=True):
        assert {ROWS[row].family for row in boxes if row != "base"} == {family}
        assert "base" in boxes
        for a, b in itertools.combinations(boxes.values(), 2):
            assert not chart.overlap(a, b)


# ---- the pages


def test_fill_by_hand():
    text = "a\n<!-- begin x -->\nold\n<!-- end x -->\nb\n<!-- begin y --><!-- end y -->\n"
    new = "a\n<!-- begin x -->\n1 \\1\n<!-- end x -->\nb\n<!-- begin y -->\n2\n<!-- end y -->\n"
    assert pages.fill(text, {"x": "1 \\1", "y": "2"}) == new
    assert pages.fill(new, {"x": "1 \\1", "y": "2"}) == new
    with pytest.raises(ValueError, match="begin z"):
        pages.fill(text, {"z": "3"})


def test_pages_are_those_of_the_results(real):
    """`python -m lab.reproduce --report` would change nothing."""
    everything = json.loads((ROOT / "results" / "results.json").read_text())
    gpu = json.loads((ROOT / "results" / "gpu.json").read_text())
    assert (ROOT / "results" / "README.md").read_text() == pages.results_page(everything, gpu)
    bench = json.loads((ROOT / "results" / "bench.json").read_text())
    readme = (ROOT / "README.md").read_text()
    assert pages.fill(readme, pages.blocks(real, bench, gpu)) == readme
    first = real[DEFAULT]["0"]
    assert report.table({"before": first["before"], "after": first["after"]}) in readme
    assert set(real) <= set(ROWS)


def test_front_page(real):
    """One page of moderate length whose table, read back, is the results' means; codes of claims stand nowhere."""
    readme = (ROOT / "README.md").read_text()
    assert len(readme.splitlines()) <= 220
    lines = pages.front_table(real).splitlines()
    assert pages.front_table(real) in readme
    for line in lines[3:]:
        name, *shown, words, _ = [cell.strip() for cell in line.strip("|").split("|")]
        (row,) = [r for r in ROWS if ROWS[r].name == name]
        seeds = real[row].values()
        assert words == f"{sum(c['after']['chair']['length'] for c in seeds) / len(seeds):.1f}"
        places = [
            ("chair", "chair_s"),
            ("chair", "recall"),
            ("pope", "adversarial", "accuracy"),
            ("text", "mean"),
        ]
        for cell, place in zip(shown, places, strict=True):
            get = lambda result: pages.figure(result, place)
            after = sum(get(c["after"]) for c in seeds) / len(seeds)
            change = 100 * sum(get(c["after"]) - get(c["before"]) for c in seeds) / len(seeds)
            assert cell == f"{after:.3f} ({change:+.1f})"
    for page in (readme, (ROOT / "results" / "README.md").read_text()):
        assert not re.search(r"\b[CDE]\d{1,2}\b", page)


def test_first_findings_by_hand(cells):
    """The numbers of the front page's findings, worked out by hand from the seeds' figures."""
    first, second, third = claims.findings(cells)
    assert "takes 86 % off CHAIR_s" in first and "costs 5.2 points" in first  # .5463 / .6377
    assert "20 % fewer words" in first and "by +3.1 points" in first  # 7.31 / 36.04
    assert "gets 82 %" in second  # .4597 / .5580
    assert "103 % of that reduction for 0.7" in second  # .5747 / .5580
    assert "by 5.2 points" in third and "by 8.7 with PPO" in third  # (2.6 + 9.4 + 3.6) / 3


def test_readme_names_every_file():
    readme = (ROOT / "README.md").read_text()
    for file in [*ROOT.glob("*.py"), *(ROOT / "lab").glob("*.py"), *ROOT.glob("formats/*.py")]:
        assert file.name == "__init__.py" or f"`{file.name}`" in readme, file.name
    for image in re.findall(r"!\[[^]]*\]\(([^)]+)\)", readme):
        assert (ROOT / image).is_file(), image
    page = (ROOT / "results" / "README.md").read_text()
    for image in re.findall(r"!\[[^]]*\]\(([^)]+)\)", page):
        assert (ROOT / "results" / image).is_file(), image


def test_table_of_gpus():
    """A table for each card; what was not measured is empty, and a column of nothing is left out."""
    row = lambda cell, card, seconds, **more: {
        "cell": cell, "card": card, "torch": "2", "transformers": "5", "seconds": [seconds, 0, 9], "peak_gib": 20.0, **more,
    }  # fmt: skip
    gpu = [
        row("step/1.5/b4", "A", 0.5),
        row("naive/1.5/b4", "A", 1.0),
        {"cell": "step/next/b1", "card": "A", "torch": "2", "does_not_fit": "out of memory"},
        row("step/1.5/b4/checkpointing", "B", 0.25, flop_share=0.412, commit="abc"),
        row("trl/1.5/b4/default", "B", 1.0, trl="1.16.0"),
        row("grpo/1.5/b4/r64", "B", 0.2, flop_share=0.5, counted_gib=21.0),
        row("grpo/1.5/b4/trl/r64", "B", 1.0),
        row("step/1.5/b4/r16", "B", 0.2),
        row("head/fused", "B", 0.1),
    ]
    assert pages.gpu_table(gpu).splitlines() == [
        "| A, torch 2, transformers 5 | seconds | plain: seconds | plain: ratio | peak GiB | plain: peak GiB |",
        "| --- | --- | --- | --- | --- | --- |",
        "| LLaVA-1.5-7B, 4 pairs | 0.50 | 1.00 | 2.0 | 20.0 | 20.0 |",
        "| LLaVA-NeXT-7B, 1 pair | does not fit |  |  |  |  |",
        "",
        "| B, torch 2, transformers 5, trl 1.16.0, commit abc | seconds | TRL: seconds | TRL: ratio | peak GiB | TRL: peak GiB | counted GiB | share of the matrix rate |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
        "| LLaVA-1.5-7B, 4 pairs, checkpointing | 0.25 | 1.00 | 4.0 | 20.0 | 20.0 |  | 41% |",
        "| LLaVA-1.5-7B, GRPO: an iteration, 4 prompts x 8 answers of 64 tokens | 0.20 | 1.00 | 5.0 | 20.0 | 20.0 | 21.0 | 50% |",
    ]


def test_bfloat16_columns_of_the_benchmark():
    bench = json.loads((ROOT / "results" / "bench.json").read_text()) | {"step-bfloat16": {}}
    table, said = pages.bench_table(bench).split("\n\n")
    assert "left out" in said and table.splitlines()[0].count("|") == 7
    ways = {"ours": "ours-bfloat16", "trl": "trl-bfloat16"}
    bench["step-bfloat16"] = {new: bench["step"][old] for old, new in ways.items()}
    head, _, ours, naive, trl, default = pages.bench_table(bench).splitlines()
    assert head.count("float32: ") == head.count("bfloat16: ") == 5
    for line in (ours, trl):  # the same figures twice
        cells = line.split(" | ")[1:]
        assert [c.rstrip(" |") for c in cells[:5]] == [c.rstrip(" |") for c in cells[5:]]
    assert naive.endswith("|  |  |  |  |  |") and default.endswith("|  |  |  |  |  |")


def test_readme_shows_the_benchmark():
    step, readme = (
        json.loads((ROOT / "results" / "bench.json").read_text())["step"],
        (ROOT / "README.md").read_text(),
    )
    assert step.keys() == {"ours", "naive", "trl", "trl-default"}
    for name, row in step.items():
        shown = lambda figure, digits: "{median:.{d}f} ({min:.{d}f} - {max:.{d}f})".format(
            **row[figure], d=digits
        )
        ratios = (
            []
            if name == "ours"
            else [shown("seconds_ratio", 1), shown("seconds_3_epochs_ratio", 1)]
        )
        for cell in (
            shown("seconds", 1),
            shown("seconds_3_epochs", 1),
            shown("peak_mib", 0),
            *ratios,
        ):
            assert f"| {cell} |" in readme, f"{name}: {cell}"


def test_the_page_tells_the_speed_of_pope():
    pope = json.loads((ROOT / "results" / "bench.json").read_text())["pope"]
    ours, ratio = pope["pope-ours"]["seconds"], pope["pope-generate"]["seconds_ratio"]
    told = " ".join(claims.REST.split())
    assert f"took {ours['median']:.3f} CPU s".replace("0.", ".") in told
    assert "{median:.1f} ({min:.1f} - {max:.1f}) times as long".format(**ratio) in told


def test_the_page_tells_the_speed_of_grpo():
    grpo = json.loads((ROOT / "results" / "bench.json").read_text())["grpo"]
    ours, trl = grpo["grpo-ours"], grpo["grpo-trl"]
    told = " ".join(claims.REST.split())
    seconds, peak = ours["seconds"]["median"], ours["peak_mib"]["median"]
    assert f"took {seconds:.1f} CPU s an iteration and {peak:.0f} MiB beside the weights" in told
    times = "{median:.1f} ({min:.1f} - {max:.1f}) times"
    longer, more = (times.format(**trl[f"{kind}_ratio"]) for kind in ("seconds", "peak_mib"))
    assert f"{longer} as long and {more} the memory" in told


def test_the_page_tells_the_speed_of_sampling():
    cells = {row["cell"]: row for row in json.loads((ROOT / "results" / "gpu.json").read_text())}
    seconds = lambda name: cells[name]["seconds"][0]
    told = " ".join(claims.REST.split())
    pairs = [(f"sample/1.5/{n}/{how}", f"sample/1.5/{n}/generate{k}")
             for n, how, k in (("b8", "t0", ""), ("b32", "t0", ""), ("b8", "t1/k4", "/k4"))]  # fmt: skip
    ours = [f"{seconds(one):.2f} s" for one, _ in pairs]
    longer = [f"{seconds(other) / seconds(one):.1f}" for one, other in pairs]
    assert (
        "8 greedy answers take {}, of 32 {}, of 4 drawn answers to each of 8 prompts {}".format(
            *ours
        )
        in told
    )
    assert "`generate` takes {}, {} and {} times as long".format(*longer) in told
    assert f"4 bits 8 answers take {seconds('sample/1.5/b8/t1/nf4'):.1f} s" in told
    each = [
        f"{cells[f'negative/1.5/b8{how}']['seconds_an_answer']:.3f}"[1:] for how in ("", "/plain")
    ]
    assert (
        "{} s an answer where every sentence shares one prefill, {} s where".format(*each) in told
    )
    ppo, grpo = cells["ppo/1.5/b32/r64"], "grpo/1.5/b4/{}r64"
    assert f"takes {ppo['seconds'][0]:.1f} s, {ppo['sample_seconds']:.1f} of them sampling" in told
    ratio = seconds(grpo.format("trl/")) / seconds(grpo.format(""))
    assert (
        f"{seconds(grpo.format('')):.1f} s, where TRL's `GRPOTrainer` takes {ratio:.1f} times"
        in told
    )


def test_the_page_tells_the_last_sample_of_mutants():
    run = json.loads((ROOT / "tests" / "mutants.json").read_text())["run"]
    can = run["mutants"] - run["equivalent"]
    assert (
        f"`python tests/mutants.py --sample {run['mutants']} --seed {run['seed']}`" in claims.REST
    )
    assert f"can change a result | {can} | noticed by a test | {run['noticed']} |" in claims.REST
