"""Put faults that were once in the package back, one at a time, and see whether the machine finds them.

    python tests/fuzz/planted.py --minutes 30          # all of them, with a table at the end
    python tests/fuzz/planted.py --only fake_mode

Each fault is a function that changes the package at run time. A fault runs in a process of its own, until
the machine fails or its time is over. It counts as found if the script of the failure, in new processes,
fails with the fault and passes without it; else the search goes on.
"""

import argparse
import json
import subprocess
import sys
import time
import warnings
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).parent))

import machine
import torch
from long_run import explore
from registry import Skip

import spectral_ext  # noqa: F401


def module(name: str) -> Any:
    """Return a module of ``spectral_ext.nn``; functions of the same name hide some of them."""
    return sys.modules[f"spectral_ext.nn.{name}"]


dynamic_class, group, history = module("dynamic_class"), module("group"), module("history")
hook, kept, plan = module("hook"), module("kept"), module("plan")

FAULTS: dict[str, Callable[[], None]] = {}


def fault(function: Callable[[], None]) -> Callable[[], None]:
    FAULTS[function.__name__] = function
    return function


def vectors_stay(is_bad: Callable[[torch.Tensor], bool]) -> None:
    """Leave vectors that are of no use as they are, in every computation."""
    parametrization = module("parametrization")
    parametrization.SpectralNorm.mend_vectors = lambda self, weight: None
    module("plan").Plan.prepared = lambda self, backend: None
    real = parametrization.normalize_layers
    is_traced = sys.modules["spectral_ext.normalization"].is_traced

    def normalize(weights: Any, us: Any, vs: Any, *rest: Any) -> Any:
        if is_traced():
            return real(weights, us, vs, *rest)
        pairs = [(u, v) for u, v in zip(us, vs, strict=True) if u is not None]
        bad = [(pair, [x.clone() for x in pair]) for pair in pairs if any(map(is_bad, pair))]
        results = real(weights, us, vs, *rest)
        with torch.no_grad():
            for pair, before in bad:
                for x, value in zip(pair, before, strict=True):
                    x.copy_(value)
        return results

    parametrization.normalize_layers = module("group").normalize_layers = normalize


@fault
def zero_vectors() -> None:
    """A weight that is zero when the norm is put on it leaves u = v = 0, for ever."""
    vectors_stay(lambda x: not x.any())
    norm = module("parametrization").SpectralNorm
    norm.make_unit_vectors = lambda self: None


@fault
def vectors_that_are_not_finite() -> None:
    """NaN in u or v is never left again."""
    vectors_stay(lambda x: not x.isfinite().all())


@fault
def fake_mode() -> None:
    """A prepared call keeps the tensors of a forward under ``FakeTensorMode``."""
    from spectral_ext import normalization

    def is_traced() -> bool:
        return normalization.is_transformed() or normalization.is_recorded()

    for each in (normalization, *(module(n) for n in ("group", "hook", "parametrization"))):
        each.is_traced = is_traced


@fault
def hook_that_never_fires() -> None:
    """A layer whose module is never called has a normalized weight."""
    real = hook.GroupHook.__init__

    def init(self: Any, stock: Any) -> None:
        real(self, stock)
        self.called = True

    hook.GroupHook.__init__ = init


@fault
def reads_iterate() -> None:
    """Each access of a hook's weight outside of the root's forward is an iteration."""

    def read(self: Any, module: Any) -> Any:
        list_, norm = self._find(module)
        return norm(list_.original)

    hook.GroupHook.read = read


@fault
def checkpoints_forget() -> None:
    """Of the vectors of checkpointed forwards the last eight are kept."""
    last: dict[int, deque[Any]] = {}
    add, next_ = history.Notes.add, history.Notes.next

    def add_and_evict(self: Any, owner: Any, entry: Any) -> None:
        last.setdefault(id(owner), deque(maxlen=8)).append(entry)
        add(self, owner, entry)

    def next_of_eight(self: Any, owner: Any, token: Any) -> Any:
        entry, entries = next_(self, owner, token), last.get(id(owner), ())
        return entry if any(entry is other for other in entries) else entries[-1]

    history.Notes.add, history.Notes.next = add_and_evict, next_of_eight


@fault
def offloaded_weights() -> None:
    """A weight on the meta device is computed on entry."""

    def is_direct(self: Any) -> bool:
        return not dynamic_class.parametrization_lists(self.module)[
            self.tensor_name
        ]._forward_pre_hooks

    plan.Layer.is_direct = is_direct


@fault
def fx_enters() -> None:
    """The group is entered while ``torch.fx`` traces."""
    dynamic_class.is_fx_symbolic_tracing = lambda: False


@fault
def kept_in_evaluation() -> None:
    """Evaluation takes what was kept, whatever has happened to the weights through ``.data``."""
    real = group.SpectralGroup._may_keep
    group.SpectralGroup._may_keep = lambda self, plan, tensors, training: real(
        self, plan, tensors, [True] * len(training)
    )


@fault
def kept_of_a_capture() -> None:
    """A captured forward takes what was kept before the capture."""
    real = group.SpectralGroup._may_keep

    def may_keep(self: Any, *arguments: Any) -> bool:
        module = sys.modules[group.SpectralGroup.__module__]
        before, module.is_capturing = module.is_capturing, lambda device: False
        try:
            return real(self, *arguments)
        finally:
            module.is_capturing = before

    group.SpectralGroup._may_keep = may_keep


@fault
def kept_weights_that_were_written_on() -> None:
    """A change in place of a kept normalized weight stays for later forwards."""
    real = kept.Kept.serves

    def serves(self: Any, *arguments: Any) -> bool:
        self._versions = [y._version for y in self._outputs]
        return real(self, *arguments)

    kept.Kept.serves = serves


@fault
def replaced_layers_stay() -> None:
    """A layer that has left the model stays in the group."""
    group.SpectralGroup._follow_model = lambda self: None


@fault
def order_of_parameters() -> None:
    """The parameters of a hook's module come after those of its other children."""
    real = module("hook_layout").replace_hook

    def replace(owner: Any, *arguments: Any) -> None:
        real(owner, *arguments)
        owner._modules["parametrizations"] = owner._modules.pop("parametrizations")

    module("hook_layout").replace_hook = replace


@fault
def interrupt_on_exit() -> None:
    """The weights are taken out of force by a call, which an interrupt can come before."""
    entry = group._Entry
    entry.__del__ = lambda self: None
    real = dynamic_class.fused_class

    def fused_class(base: Any) -> Any:
        cls = real(base)

        def forward(self: Any, *args: Any, **keywords: Any) -> Any:
            if torch.fx._symbolic_trace.is_fx_symbolic_tracing():
                return base.forward(self, *args, **keywords)
            with self.__dict__["_spectral_group"].of(self).normalized():
                return base.forward(self, *args, **keywords)

        cls.forward = forward
        return cls

    for name in ("dynamic_class", "fuse"):
        module(name).fused_class = fused_class


@fault
def no_update_in_a_backward() -> None:
    """A forward inside of a backward never advances u and v."""
    real = plan.Plan.training

    def training(self: Any) -> list[bool]:
        modes = real(self)
        return modes if torch._C._current_graph_task_id() == -1 else [False] * len(modes)

    plan.Plan.training = training


def replay(lines: list[str]) -> int:
    """Run a script of the machine; return whether it fails."""
    import script

    space = dict(vars(script))
    for line in lines:
        try:
            exec(line, space)
        except Skip:
            continue
        except BaseException as error:
            print(f"{error!r:.200}")
            return 1
    return 0


def explore_here(minutes: float, seed: int) -> int:
    """Run the machine; print the number of its models and the script that failed."""
    try:
        explore(minutes, [], seed, shrink=False)
    except BaseException:
        if not machine.FAILED:
            raise
    print(json.dumps([machine.COUNTS["build"], *machine.FAILED[-1:]]))
    return 0


def child(text: str, *arguments: str) -> tuple[int, str]:
    """Run this file in another process; return its status and the last line that it printed."""
    command = [sys.executable, __file__, *arguments]
    done = subprocess.run(command, input=text, capture_output=True, text=True)
    if done.returncode < 0 or "Traceback" in done.stderr:
        print(done.stderr[-2000:], file=sys.stderr)
    return done.returncode, (done.stdout.splitlines() or [""])[-1]


class Search(NamedTuple):
    """What a search for one fault gave."""

    script: list[str]
    """The script that fails with the fault and passes without it; empty if none was found."""
    seconds: float
    models: int
    others: int
    """Failures that were not those of the fault."""


def search(name: str, minutes: float, seed: int) -> Search:
    """Run the machine with a fault until a failure is that of the fault, or the time is over."""
    begin, models, others = time.monotonic(), 0, 0
    while (seconds := time.monotonic() - begin) < 60 * minutes:
        left = str(minutes - seconds / 60)
        _, line = child("", "--here", "--only", name, "--minutes", left, "--seed", str(seed))
        seconds, seed = time.monotonic() - begin, seed + 1000
        count, *scripts = json.loads(line or "[0]")
        models += count
        for script in scripts:
            text = "\n".join(script)
            if child(text, "--replay", "--only", name)[0] and not child(text, "--replay")[0]:
                return Search(script, seconds, models, others)
            others += 1
    return Search([], seconds, models, others)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--minutes", type=float, default=30, help="for each fault")
    parser.add_argument("--only", choices=list(FAULTS), nargs="*", default=[])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--here", action="store_true", help="in this process")
    parser.add_argument("--replay", action="store_true", help="a script from the standard input")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    if arguments.here or arguments.replay:
        for name in arguments.only:
            FAULTS[name]()
        if arguments.replay:
            return replay(sys.stdin.read().splitlines())
        return explore_here(arguments.minutes, arguments.seed)
    print("| fault | seconds | models | operation | other failures |\n|---|---|---|---|---|")
    names = arguments.only or list(FAULTS)
    missed = []
    for name in names:
        script, seconds, models, others = search(name, arguments.minutes, arguments.seed)
        what = "not found"
        if script:
            what = "`" + script[-1].removeprefix("pair.do(").partition(",")[0].rstrip(")") + "`"
            print("\n".join([f"\n{name}:", *script]), file=sys.stderr)
        else:
            missed.append(name)
        print(f"| {name} | {seconds:.0f} | {models} | {what} | {others} |", flush=True)
    print(f"{len(names) - len(missed)} of {len(names)} found.")
    return int(len(missed) > 2)


if __name__ == "__main__":
    sys.exit(main())
