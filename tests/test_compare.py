"""``bench/compare.py --at-most RATIO`` fails where a tree is slower; the times here are made up."""

import itertools
from contextlib import contextmanager
from pathlib import Path

import pytest

pytest.importorskip("rich")

BENCH = Path(__file__).parent.parent / "bench"


@pytest.fixture
def compare(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCH))
    import compare

    monkeypatch.setattr(compare, "tree_of", lambda revision: Path("other"))
    return compare


@pytest.fixture
def run(compare, monkeypatch, capsys):
    """Return a function that runs the command with a function of tree, model and mode for its times."""

    def run(milliseconds, *arguments):
        @contextmanager
        def worker(tree, name, threads):
            yield ("here" if tree == compare.ROOT else "there", name)

        def ask(process, mode, count):
            tree, name = process
            return [milliseconds(tree, name, mode)] * count

        monkeypatch.setattr(compare, "worker", worker)
        monkeypatch.setattr(compare, "ask", ask)
        status = compare.main(["abc", "--repeats", "10", *arguments])
        return status, capsys.readouterr().out

    return run


def slower_by(factor, model="200 x 8x8", mode="with gradients"):
    def milliseconds(tree, name, its_mode):
        return factor if tree == "here" and (name, its_mode) == (model, mode) else 1.0

    return milliseconds


def test_a_planted_slowdown_is_named_and_fails(run):
    status, shown = run(slower_by(1.1), "--at-most", "1.03")
    assert status == 1
    assert shown.splitlines()[-1] == "slower than 1.03: 200 x 8x8, with gradients"
    assert shown.count("slower than") == 1
    row = next(line for line in shown.splitlines() if "1.100 (1.100 to 1.100)" in line)
    assert "200 x 8x8" in row and "with gradients" in row


@pytest.mark.parametrize("factor", [1.02, 0.5])
def test_what_is_within_the_bound_passes(run, factor):
    status, shown = run(slower_by(factor), "--at-most", "1.03")
    assert status == 0 and "slower than" not in shown


def test_without_a_bound_nothing_fails(run):
    status, shown = run(slower_by(3.0))
    assert status == 0 and "3.000 (3.000 to 3.000)" in shown


@pytest.mark.parametrize(("slow_turns", "status"), [(7, 0), (9, 1)])
def test_turns_of_noise_do_not_fail(run, compare, monkeypatch, slow_turns, status):
    """The 20 % quantile of ten ratios is the third one: with seven slow turns it is a fast one."""
    monkeypatch.setattr(compare, "PAIRS", 1)
    calls = itertools.count()

    def milliseconds(tree, name, mode):
        if (tree, name, mode) != ("here", "1 x 8x8", "forward"):
            return 1.0
        return 2.0 if 0 < next(calls) <= slow_turns else 1.0  # the first call finds the count

    assert run(milliseconds, "--at-most", "1.03", "--models", "1 x 8x8")[0] == status


def test_turns_are_shared_by_pairs_of_processes(compare, run, monkeypatch):
    """Each process is asked once for the count, then for its turns of each mode."""
    monkeypatch.setattr(compare, "PAIRS", 4)
    started = []
    real = contextmanager(lambda *args: iter([started.append(args) or (args[0], "n")]))
    monkeypatch.setattr(compare, "worker", real)
    monkeypatch.setattr(compare, "ask", lambda process, mode, count: [1.0] * count)
    rows = list(compare.compare("n", ("here", "there"), 10, 1, lambda: None))
    assert len(started) == 2 * 4
    assert all(len(row.ratios) == 10 for row in rows)


def test_two_turns_are_needed(compare):
    with pytest.raises(SystemExit):
        compare.main(["abc", "--repeats", "1"])


def test_every_mode_of_the_models_runs(compare):
    """The processes answer for real, with this tree on both sides; of the times only their number counts."""
    trees = (compare.ROOT, compare.ROOT)
    rows = list(compare.compare("3 x 8x8", trees, 2, 1, lambda: None))
    assert [row.mode for row in rows] == list(compare.MODES)
    assert all(len(row.ratios) == 2 and min(row.ratios) > 0 for row in rows)
