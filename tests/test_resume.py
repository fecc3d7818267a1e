"""A training that was killed, told to stop or cut off by a full disk ends like one that was not."""

import os
import resource
import signal
import subprocess
import sys
import time
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from safetensors.torch import save_file

from lightmedvlm_utils.config import StageSettings
from lightmedvlm_utils.errors import UserError
from lightmedvlm_utils.learning.checkpoints import KEPT, Checkpoints
from lightmedvlm_utils.learning.examples import report_examples
from lightmedvlm_utils.learning.features import FeatureStore
from lightmedvlm_utils.learning.loop import TEXT, prepare_stage, train
from lightmedvlm_utils.observations import LABELS

SETTINGS = StageSettings(2.5, 2, ("connector", "lora"), connector_lr=1e-3, lora_lr=1e-3, disease_loss=1.0)
STEPS = 10  # of two and a half epochs of 7 studies


class Killed(Exception):
    pass


@pytest.fixture
def lesson(make_model):
    """Trains a small model with dropout and batch norm; `after` is called behind every step."""
    rng = np.random.default_rng(0)
    frame = pd.DataFrame(rng.choice([1.0, 0.0, -1.0, np.nan], (7, len(LABELS))), columns=list(LABELS))
    reports = [f"Findings: There is {'no' if i % 2 else 'a'} left pleural effusion." for i in range(7)]
    studies = frame.assign(study_id=range(100, 107), report=reports)
    torch.manual_seed(5)
    store = FeatureStore(studies.study_id, [torch.randn(7, 7, 7, 16).half()])

    def run(checkpoints=None, after=lambda step: None):
        model, processor = make_model()
        prepare_stage(model, SETTINGS, rank=2, alpha=2, dropout=0.2)
        examples, count = report_examples(studies, processor), 0

        def losses(*arguments):
            nonlocal count
            count += 1
            after(count)
            return TEXT.losses(*arguments)

        options = dict(validation=examples[:2], log=lambda line: None, checkpoints=checkpoints)
        history = train(model, processor, examples, store, SETTINGS, objective=replace(TEXT, losses=losses), **options)
        return model.state_dict(), history

    return run


def assert_same(one, other):
    (weights, history), (expected, whole) = one, other
    assert history == whole
    assert weights.keys() == expected.keys() and all(torch.equal(weights[n], expected[n]) for n in weights)


def stop_at(*moments):
    """Raises at these calls, counted over all runs."""
    calls = 0

    def after(_):
        nonlocal calls
        calls += 1
        if calls in moments:
            raise Killed

    return after


@pytest.mark.parametrize("minutes", [0, 1e9])
def test_killed_anywhere_it_ends_the_same(lesson, tmp_path, minutes):
    """With a state a step, and with one only at the end of every epoch."""
    whole = lesson()
    assert [record["step"] for record in whole[1] if "loss" in record] == list(range(1, STEPS + 1))
    for moment in (1, 4, 5, STEPS):  # an epoch has 4 steps
        states = Checkpoints(tmp_path / f"{moment}", "this", minutes)
        with pytest.raises(Killed):
            lesson(states, stop_at(moment))
        assert_same(lesson(states), whole)
        assert len(list(states.folder.iterdir())) <= KEPT
    states, after = Checkpoints(tmp_path / "often", "this", minutes), stop_at(3, 4, 8, 9)
    for _ in range(4):
        with pytest.raises(Killed):
            lesson(states, after)
    assert_same(lesson(states, after), whole)


def test_told_to_stop_it_saves_and_says_so(lesson, tmp_path):
    whole, states = lesson(), Checkpoints(tmp_path, "this", 1e9)
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(UserError, match="after step 4 of 10; its state is saved"):
        lesson(states, lambda step: os.kill(os.getpid(), signal.SIGTERM) if step == 4 else None)
    assert signal.getsignal(signal.SIGTERM) is before
    assert_same(lesson(states, lambda step: step < 7 or pytest.fail("begun anew")), whole)


def test_a_broken_state_costs_only_itself_and_another_trainings_is_none(lesson, tmp_path):
    whole, states = lesson(), Checkpoints(tmp_path, "this", 0)
    with pytest.raises(Killed):
        lesson(states, stop_at(7))
    newest = max(tmp_path.iterdir())
    newest.write_bytes(newest.read_bytes()[:1000])
    steps = []
    assert_same(lesson(states, steps.append), whole)
    assert len(steps) == 5, "from the state after step 5"
    assert Checkpoints(tmp_path, "another", 0).load() is None
    assert not list(tmp_path.iterdir())
    save_file({"a": torch.zeros(1)}, tmp_path / "step-000000001.safetensors")
    assert states.load() is None


def test_a_full_disk_keeps_the_last_state(lesson, tmp_path):
    whole, states = lesson(), Checkpoints(tmp_path, "this", 0)
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    old = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)

    def fill(step):
        if step == 4:  # no file may grow beyond this: what a full disk looks like to who writes
            resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limit[1]))

    try:
        with pytest.raises(UserError, match="step 4 cannot be written"):
            lesson(states, fill)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
        signal.signal(signal.SIGXFSZ, old)
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"step-{n:09d}.safetensors" for n in (2, 3)]
    assert_same(lesson(states), whole)


SCRIPT = """
import sys, time, torch
from pathlib import Path
from torch import nn
from lightmedvlm_utils.learning.checkpoints import Checkpoints, learned_tensors, restore_tensors
torch.set_num_threads(1)
states = Checkpoints(Path(sys.argv[1]), "this", 0)
torch.manual_seed(0)
model = nn.Sequential(nn.Linear(64, 512), nn.Dropout(0.5), nn.Linear(512, 64))
optimizer = torch.optim.AdamW(model.parameters())
step, saved = 0, states.load()
if saved:
    restore_tensors(saved[0], model, optimizer)
    step = saved[1]["step"]
print("from", step, flush=True)
while step < 400:
    model(torch.randn(8, 64)).square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()
    step += 1
    states.save(step, learned_tensors(model, optimizer), {"step": step})
print(sum(p.double().abs().sum().item() for p in model.parameters()))
"""


def test_sigkill_while_it_writes(tmp_path):
    """A process that does nearly nothing but write states, and is killed."""

    def start(name):
        command = [sys.executable, "-c", SCRIPT, str(tmp_path / name)]
        return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)

    whole, killed = start("whole"), start("killed")
    assert killed.stdout.readline() == "from 0\n"
    time.sleep(np.random.default_rng().uniform(0.05, 0.4))
    killed.kill()
    killed.communicate()
    printed = start("killed").communicate()[0].splitlines()
    assert printed[0] != "from 0"
    assert printed[-1] == whole.communicate()[0].splitlines()[-1]
