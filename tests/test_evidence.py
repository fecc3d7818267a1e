"""SASA's detector: the map shown is the map used, evidence lies where the finding is, and tokens say it in words."""

import math

import numpy as np
import pytest
import torch
from torch.nn.functional import interpolate

from lightmedvlm_utils.config import StageSettings
from lightmedvlm_utils.data.descriptions import GROUPS, WORDS, describe
from lightmedvlm_utils.errors import UserError
from lightmedvlm_utils.learning.examples import Example, known_of
from lightmedvlm_utils.learning.features import FeatureStore
from lightmedvlm_utils.learning.loop import parameter_groups, warm_up_diseases
from lightmedvlm_utils.model.connectors import build_connector
from lightmedvlm_utils.model.connectors.base import Known, Words, sine_positions
from lightmedvlm_utils.model.connectors.evidence import Detector, enlarging
from lightmedvlm_utils.model.connectors.losses import detection_loss
from lightmedvlm_utils.model.connectors.sasa import SHARPNESS, UNTOLD_WORDS, word_shares
from lightmedvlm_utils.observations import LABELS

GRIDS, WIDTHS = ((12, 8), (6, 4), (3, 2)), (16, 32, 64)


def random_maps(count=2):
    return tuple(torch.randn(count, *grid, width) for grid, width in zip(GRIDS, WIDTHS, strict=True))


@pytest.fixture
def detector():
    torch.manual_seed(0)
    return Detector(WIDTHS, name_dim=16, num_labels=14, num_words=len(WORDS), width=32)


def test_the_map_shown_is_the_map_used(detector):
    """The attention is the gradient of the logit by the scores, up to the gain: no place counts that it hides."""
    detector.gain.data.normal_()
    found = detector(random_maps())
    scores = found.scores.detach().requires_grad_()
    logits = detector._logits(scores.flatten(2).logsumexp(-1) - math.log(scores[0, 0].numel()))
    torch.testing.assert_close(logits, found.logits)
    (gradient,) = torch.autograd.grad(logits.sum(), scores)
    torch.testing.assert_close(gradient, found.attention * detector.gain.exp()[:, None, None])
    torch.testing.assert_close(found.attention.sum((-1, -2)), torch.ones(2, 14))


def test_neither_keys_nor_values_need_be_formed(detector):
    """What the detector computes is ordinary attention over the sum of the enlarged stages."""
    maps = random_maps()

    def merged(projections):
        normed = [project(norm(m)) for project, norm, m in zip(projections, detector.norms, maps, strict=True)]
        enlarged = [interpolate(m.permute(0, 3, 1, 2), GRIDS[0], mode="bilinear") for m in normed]
        return torch.stack(enlarged).sum(0).flatten(2).mT  # (B, N, M)

    keys = merged(detector.keys) + detector.key_place(sine_positions(GRIDS[0], 32))
    scores = detector.query(detector.names) @ keys.mT / math.sqrt(32)
    found = detector(maps)
    torch.testing.assert_close(found.scores.flatten(2), scores)
    torch.testing.assert_close(found.attended, detector.norm(scores.softmax(-1) @ merged(detector.values)))


def test_who_looks_first_does_not_matter(detector):
    """What is kept between calls must serve inference, training and shapes without numbers alike."""
    enlarging.cache_clear()
    with torch.device("meta"):
        Detector(WIDTHS, 16, 14, len(WORDS), 32)(tuple(torch.empty_like(m, device="meta") for m in random_maps()))
    with torch.inference_mode():
        detector(random_maps())
    detector(random_maps()).logits.sum().backward()
    assert all(norm.weight.grad.isfinite().all() for norm in detector.norms)


def test_what_cannot_be_is_refused(make_model):
    for options, words in (
        ({"num_queries": 14, "evidence": 3}, "num_queries >= 15"),
        ({"evidence": 3, "disease_head": False}, "leave disease_head on"),
    ):
        with pytest.raises(UserError, match=words):
            build_connector("sasa", 64, 32, (7, 7), **options)
    with pytest.raises(UserError, match="reads 2 stages, but swin_tiny_patch4_window7_224 has 1"):
        make_model(evidence=2)


def planted(count, rng):
    """Maps in which finding 0 is a pattern in 3 x 3 places of the finest stage, in half of the images."""
    fine, middle, coarse = random_maps(count)
    fine = torch.arange(16.0).sin() + 0.3 * fine  # tissue, nearly the same everywhere
    present, rows, columns = rng.random(count) < 0.5, rng.integers(0, 10, count), rng.integers(0, 6, count)
    pattern = torch.arange(16.0).cos()
    masks, words = torch.zeros(count, 14, *GRIDS[0], dtype=torch.bool), np.zeros((count, 14, len(WORDS)), np.float32)
    for i in np.flatnonzero(present):
        place = (slice(rows[i], rows[i] + 3), slice(columns[i], columns[i] + 3))
        fine[i, *place] = pattern + 0.3 * torch.randn(3, 3, 16)
        masks[i, 0, *place] = True
        words[i, 0, WORDS.index("right" if columns[i] < 3 else "left")] = 1  # the patient's right is the film's left
    states = torch.zeros(count, 14)
    states[:, 0] = torch.from_numpy(present.astype(np.float32))
    return (fine, middle, coarse), Known(states, torch.from_numpy(words), masks)


def test_labels_alone_teach_where_a_finding_is_and_which_side(detector):
    rng = np.random.default_rng(0)
    optimizer = torch.optim.Adam(detector.parameters(), 3e-3)
    for _ in range(250):
        maps, known = planted(32, rng)
        detection_loss(detector(maps), known._replace(masks=None), 0.3).backward()
        optimizer.step()
        optimizer.zero_grad()
    maps, known = planted(200, rng)
    found = detector.eval()(maps)
    is_there = known.states[:, 0] == 1
    assert ((found.logits[:, 0] > 0) == is_there).float().mean() > 0.95
    peaks = found.attention[is_there, 0].flatten(1).argmax(1)
    inside = known.masks[is_there, 0].flatten(1)[torch.arange(len(peaks)), peaks]
    assert inside.float().mean() > 0.95
    sides = [WORDS.index(side) for side in ("left", "right")]
    said, true = word_shares(found.words)[is_there, 0][:, sides], known.words[is_there, 0][:, sides]
    assert (said.argmax(1) == true.argmax(1)).float().mean() > 0.9


def test_masks_pull_the_attention_inside_and_an_empty_one_says_nothing(detector):
    maps, known = planted(32, np.random.default_rng(1))
    found = detector(maps)
    without, pulled = (detection_loss(found, known, weight) for weight in (0.0, 1.0))
    share = (found.attention * known.masks).sum((-1, -2))[known.states == 1]
    torch.testing.assert_close(pulled - without, -share.log().mean())
    nothing = known._replace(masks=torch.zeros_like(known.masks))
    torch.testing.assert_close(detection_loss(found, nothing, 1.0), without)


def test_what_is_unknown_teaches_nothing(detector):
    maps, known = planted(4, np.random.default_rng(2))
    found = detector(maps)
    assert detection_loss(found, known._replace(states=torch.full((4, 14), torch.nan), masks=None), 0.3) == 0


@pytest.fixture
def sasa():
    torch.manual_seed(0)
    connector = build_connector("sasa", 64, 32, GRIDS[-1], num_queries=20, evidence=3, conv_norm="group")
    names, states = torch.randn(14, 32), torch.randn(14, 3, 32)
    connector.start_from_words(Words(names, states, torch.randn(len(WORDS), 32)))
    return connector.eval()


def test_a_told_token_says_what_is_true_in_words(sasa):
    with torch.no_grad():
        sasa.residue[-1].weight.zero_()
        sasa.residue[-1].bias.zero_()
    report = "Moderate right pleural effusion. Left rib fracture is possible."
    effusion, fracture, edema = (LABELS.index(label) for label in ("Pleural Effusion", "Fracture", "Edema"))
    states = torch.zeros(2, 14)
    states[0, effusion], states[0, fracture], states[1] = 1.0, 0.5, torch.nan
    known = Known(states, torch.from_numpy(describe(report)).expand(2, -1, -1))
    maps = random_maps()
    tokens = sasa(maps, known)
    assert tokens.shape == (2, 20, 32)

    def words(*said):
        return sum(sasa.description_words[WORDS.index(word)] for word in said)

    torch.testing.assert_close(tokens[0, effusion], sasa.state_words[effusion, 2] + words("right", "moderate"))
    torch.testing.assert_close(tokens[0, fracture], sasa.state_words[fracture, 1] + 0.5 * words("left", "rib"))
    torch.testing.assert_close(tokens[0, edema], sasa.state_words[edema, 0])
    torch.testing.assert_close(tokens[1], sasa(maps)[1])  # who is told nothing looks


def test_in_training_some_words_are_the_detectors_own(sasa):
    """The language model must learn to word a finding whose words are in doubt; its state is told all the same."""
    maps = random_maps(60)
    known = Known(torch.ones(60, 14), torch.zeros(60, 14, len(WORDS), dtype=torch.bool))
    found = word_shares(SHARPNESS * sasa.detector(maps).words) @ sasa.description_words
    told = sasa.eval()(maps, known)[:, :14]
    torch.manual_seed(0)
    learned = sasa.train()(maps, known)[:, :14]
    own = (learned - told - found).abs().amax(-1) < 1e-4
    as_told = (learned - told).abs().amax(-1) < 1e-4
    assert (own ^ as_told).all() and own.float().mean().item() == pytest.approx(UNTOLD_WORDS, abs=0.05)


def test_an_untold_token_says_what_the_detector_finds(sasa):
    maps = random_maps(1)
    found = sasa.detector(maps)
    p = (SHARPNESS * found.logits).sigmoid()
    for label in range(14):
        told = Known(p.detach(), word_shares(SHARPNESS * found.words).detach())
        torch.testing.assert_close(sasa(maps, told)[0, label], sasa(maps)[0, label])
    torch.testing.assert_close(sasa.disease_logits(maps), found.logits)
    maps_of = sasa.attention_maps(maps)
    assert maps_of.shape == (1, 20, *GRIDS[0])
    torch.testing.assert_close(maps_of[:, :14], found.attention)
    torch.testing.assert_close(maps_of.sum((-1, -2)), torch.ones(1, 20))


def test_words_of_a_group_share_one_and_may_all_be_unsaid():
    shares = word_shares(torch.randn(5, 14, len(WORDS)))
    sides = shares[..., : len(GROUPS["side"])]
    assert (shares >= 0).all() and (sides.sum(-1) < 1).all()
    assert (word_shares(torch.full((1, len(WORDS)), -20.0)) < 1e-6).all()


def test_reports_are_described_by_the_words_they_use():
    said = describe("Findings: Small left and moderate right effusions. No edema. Impression: Endotracheal tube. PICC.")
    rows = {
        label: {w for w, share in zip(WORDS, row, strict=True) if share}
        for label, row in zip(LABELS, said, strict=True)
    }
    assert rows["Pleural Effusion"] == {"bilateral", "small", "moderate"}
    assert said[LABELS.index("Pleural Effusion"), WORDS.index("small")] == 0.5
    assert rows["Support Devices"] == {"endotracheal tube", "PICC"} and not rows["Edema"]


def test_the_detector_learns_before_the_connector_and_not_with_it(make_model):
    model, processor = make_model(evidence=1)
    detector = {f"connector.detector.{name}" for name, _ in model.connector.detector.named_parameters()}
    examples = [Example(i, "", "", np.eye(14)[i], np.zeros((14, len(WORDS)), np.float32)) for i in range(4)]
    store = FeatureStore(range(4), [torch.randn(4, 7, 7, 16)])
    before = {name: value.clone() for name, value in model.state_dict().items()}
    warm_up_diseases(model, processor, examples, store, StageSettings(1, 2, disease_warmup=2))
    moved = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert moved and moved <= detector
    parameter_groups(model, StageSettings(1, 2))
    learns = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert learns and not learns & detector and all(name.startswith("connector.") for name in learns)
    assert known_of(examples).masks is None
