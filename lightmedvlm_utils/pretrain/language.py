"""Pretrain the small Qwen3 and its tokenizer on reports about phantom patients of its own.

Stage 1 freezes the language model, so it must know two things beforehand, as Qwen3-0.6B does: how reports are
worded, and how to put given facts into words. Facts are taught as bags of words: one token per fact, the sum of the
embeddings of what it says (a phrase counts as the mean of its words), standing where image tokens will stand. The
facts about the 14 labels are said as SASA's detector will say them. No image is involved.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch
from safetensors.torch import save_file
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from lightmedvlm_utils.data.descriptions import WORDS, describe
from lightmedvlm_utils.data.labels import ABSENT, label_reports, label_sentence
from lightmedvlm_utils.data.questions import build_questions
from lightmedvlm_utils.data.reports import clean_reports
from lightmedvlm_utils.data.wordings import DEVICES, KINDS, wordings
from lightmedvlm_utils.files import atomic_path
from lightmedvlm_utils.model.connectors import STATES
from lightmedvlm_utils.model.processing import (
    END_OF_TURN,
    IMAGE_TOKEN,
    OPEN_SYSTEM,
    PADDING,
    REPORT_SYSTEM,
    REPORT_USER,
    VQA_SYSTEM,
    VQA_USER,
    Processor,
    token_id,
)
from lightmedvlm_utils.observations import LABELS
from lightmedvlm_utils.phantom.patients import Study, sample_patients
from lightmedvlm_utils.phantom.reports import write_report
from lightmedvlm_utils.pretrain import FIRST_SEED

SPECIAL_TOKENS = (PADDING, "<|im_start|>", END_OF_TURN, "<|vision_start|>", "<|vision_end|>", IMAGE_TOKEN)
VOCABULARY = 1600
NUM_FACTS = 22
UNDESCRIBED = 0.2  # of the findings in a report
DESCRIPTION_WEIGHT = 4.0  # in the loss, of a word that describes a finding
QUESTIONS_AT_ONCE = 3  # about each study of a batch: a question is short and its answer a word
STATE_WORDS = dict(zip((0.0, -1.0, 1.0), STATES, strict=True))  # the words that SASA's disease loss will use
# GPT-style splitting: a word with its leading space, digits one by one, runs of punctuation.
_SPLIT = r"""[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"""
_SENTENCE = re.compile(r"(?<=[.])\s+")


class Phase(NamedTuple):
    """A stretch of training: how many texts, and the share of batches that are questions."""

    texts: int
    questions: float
    rate: float = 2e-3  # at its peak


# Both skills; then questions, whose one word of answer teaches little at a time; then mostly reports again: which side
# goes with which finding is learned last.
PHASES = (Phase(80_000, 0.5), Phase(56_000, 0.95), Phase(72_000, 0.35))


def train_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    """Byte-level BPE with Qwen's chat tokens; any text survives encoding and decoding unchanged."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_SPLIT), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END_OF_TURN, pad_token=PADDING)


def small_language_model(tokenizer: PreTrainedTokenizerFast) -> Qwen3ForCausalLM:
    """A Qwen3 of about 1 million parameters, with Qwen3-0.6B's proportions where they matter."""
    config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=token_id(tokenizer, END_OF_TURN),
        pad_token_id=token_id(tokenizer, PADDING),
    )
    torch.manual_seed(0)
    return Qwen3ForCausalLM(config)


Fact = list[tuple[str, float]]  # phrases, and how far each is said


def facts(
    states: np.ndarray, described: np.ndarray, report: str, view: str, rng: np.random.Generator, asked: bool = False
) -> list[Fact]:
    """A study's facts in words, NUM_FACTS at most: each label with its state and, where it is present, the words that
    `describe` it (14, W); the view; and some sentences of the report, so that it can be worded from them.

    A detector is often less sure of the words than of the state. So a word is said more or less loudly, and of some
    findings (UNDESCRIBED) none: what is present must be said then, too. Who is `asked` gets the sentences that state a
    finding, sometimes, and every word, since what is not said cannot be answered.
    """
    found: list[Fact] = []
    for label, state, words in zip(LABELS, states, described, strict=True):
        found.append([(f" {label} {STATE_WORDS.get(state, STATES[0])}", 1.0)])
        if STATE_WORDS.get(state, STATES[0]) != STATES[0]:
            shares = words if asked else words * rng.uniform(0.4, 1, len(words)) * (rng.random() >= UNDESCRIBED)
            found[-1] += [(f" {WORDS[place]}", float(shares[place])) for place in np.flatnonzero(shares)]
    sentences = [" " + sentence for sentence in _SENTENCE.split(report) if sentence]
    keep = rng.random() * 0.4
    if asked:
        sentences = [text for text in sentences if any(s != ABSENT for _, s in label_sentence(text.strip().lower()))]
        keep = float(rng.random() < 0.3)
    chosen: list[Fact] = [[(sentence, 1.0)] for sentence in sentences if rng.random() < keep]
    return [*found, [(f" {view} view", 1.0)], *chosen][:NUM_FACTS]


class FactReader:
    """Turns facts into one vector each: (B, NUM_FACTS, D)."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast):
        self.tokenizer = tokenizer
        self.known: dict[str, list[int]] = {}  # phrases recur all the time, and tokenizing is slow

    def __call__(self, embedding: nn.Embedding, studies: list[list[Fact]]) -> Tensor:
        every = [fact for study in studies for fact in study]
        for phrase in {phrase for fact in every for phrase, _ in fact} - self.known.keys():
            self.known[phrase] = self.tokenizer(phrase, add_special_tokens=False)["input_ids"]
        bags = [[(token, share / len(self.known[p])) for p, share in fact for token in self.known[p]] for fact in every]
        offsets = torch.tensor([0, *np.cumsum([len(bag) for bag in bags])[:-1]])
        flat = torch.tensor([token for bag in bags for token, _ in bag])
        shares = torch.tensor([share for bag in bags for _, share in bag])
        vectors = nn.functional.embedding_bag(flat, embedding.weight, offsets, mode="sum", per_sample_weights=shares)
        # A missing fact is a padding token's embedding: studies have different numbers of sentences.
        result = embedding(torch.full((len(studies), NUM_FACTS), self.tokenizer.pad_token_id))
        counts = torch.tensor([len(study) for study in studies])
        places = torch.arange(NUM_FACTS) < counts[:, None]
        return result.masked_scatter(places[..., None], vectors)


def report_table(patients: int, seed: int = FIRST_SEED) -> pd.DataFrame:
    """Reports about that many phantom patients, cleaned and labelled as notebook 01 does it: a table of `study_id`,
    `split` (the last twentieth of the patients validate), `images`, `report` and the 14 labels."""
    rows, texts = [], []
    for index, patient in enumerate(sample_patients(patients, seed)):
        rng = np.random.default_rng([seed, patient.subject_id])
        prior: Study | None = None
        for study in patient.studies:
            views = [{"view": view.position} for view in study.views if view.position != "LATERAL"]
            rows.append((study.study_id, "validate" if 20 * index >= 19 * patients else "train", views))
            texts.append(write_report(study, rng, prior))
            prior = study
    table = pd.DataFrame(rows, columns=["study_id", "split", "images"]).assign(report=clean_reports(texts)["report"])
    return pd.concat([table, label_reports(table.report)], axis=1)[table.report != ""].reset_index(drop=True)


def pretrain_language(
    target: Path,
    patients: int = 16_000,
    phases: Sequence[Phase] = PHASES,
    start: Path | None = None,
    batch_size: int = 16,
) -> dict:
    """Train on reports about `patients` phantom patients and questions about them; writes model and tokenizer to
    `target`.

    `start` is the folder of a Qwen3 that this function made, to continue from with `phases`. Questions in held-out
    wordings are never among the texts.
    """
    studies = report_table(patients)
    train = studies[studies.split == "train"].reset_index(drop=True)
    held_out = studies[studies.split == "validate"].head(200)
    questions = build_questions(train, per_study=16, seed=0, synthetic_minority=True)
    record: dict[str, Any] = {"reports_seen": 0, "questions_seen": 0}
    if start is None:
        tokenizer = train_tokenizer([*train.report, *_words(questions)])
        model = small_language_model(tokenizer)
    else:
        tokenizer = PreTrainedTokenizerFast.from_pretrained(start)
        model = Qwen3ForCausalLM.from_pretrained(start, dtype=torch.float32)
        record |= {name: model.config.pretraining[name] for name in record}
    processor = Processor(tokenizer, 1, (0,), (1,), num_image_tokens=NUM_FACTS, max_report_tokens=160)
    lesson = _Lesson(model, processor, FactReader(tokenizer), dict(list(questions.groupby("study_id"))))
    for phase in phases:
        _train_phase(lesson, phase, train, held_out, record, batch_size)
    record |= {"training_reports": len(train), "parameters": model.num_parameters()}
    record["held_out_loss"] = round(_held_out_loss(lesson, held_out), 4)
    _write(model, tokenizer, target, record)
    return record


def _train_phase(
    lesson: _Lesson, phase: Phase, train: pd.DataFrame, held_out: pd.DataFrame, record: dict, batch_size: int
) -> None:
    """One warm-up and cosine; adds to `record` what was seen."""
    optimizer = torch.optim.AdamW(lesson.model.parameters(), lr=phase.rate, weight_decay=0.05, betas=(0.9, 0.98))
    rng = np.random.default_rng(record["questions_seen"])
    seen, reported = 0, 0.0
    while seen < phase.texts:
        for rows in _batches(train, batch_size, rng):
            rate = phase.rate * min(1, (seen + batch_size) / 3200) * 0.5 * (1 + math.cos(math.pi * seen / phase.texts))
            for group in optimizer.param_groups:
                group["lr"] = rate
            lesson.model.train()
            asked = rng.random() < phase.questions
            loss = lesson.question_loss(rows, rng) if asked else lesson.report_loss(rows, rng)
            loss.backward()
            nn.utils.clip_grad_norm_(lesson.model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            count = len(rows) * (QUESTIONS_AT_ONCE if asked else 1)
            record["questions_seen" if asked else "reports_seen"] += count
            seen += count
            if seen >= phase.texts:
                return
            if seen / phase.texts - reported > 0.1:
                reported = seen / phase.texts
                known = _held_out_loss(lesson, held_out)
                print(f"{reported:4.0%}  {seen:6d} texts  loss {loss.item():.3f}  held out {known:.3f}", flush=True)


def _words(questions: pd.DataFrame) -> list[str]:
    """What the tokenizer learns beside the reports: questions, answers, prompts and the words of facts."""
    every = [wordings("presence", label).known for label in LABELS if label != "No Finding"]
    plain = [text for known in every for text in known]
    prompts = [REPORT_SYSTEM, REPORT_USER, VQA_SYSTEM, VQA_USER, OPEN_SYSTEM, *LABELS, *DEVICES, *KINDS]
    return [*questions.question, *questions.answer, *plain, *prompts, *[f"yes no view {' '.join(STATES)}"] * 50]


def _batches(studies: pd.DataFrame, batch_size: int, rng: np.random.Generator) -> Iterator[pd.DataFrame]:
    """One epoch in random order, reports of like length together."""
    rows = studies.iloc[rng.permutation(len(studies))]
    rows = rows.iloc[np.argsort(rows.report.str.len().to_numpy() // 100, kind="stable")]
    chunks = [rows.iloc[i : i + batch_size] for i in range(0, len(rows), batch_size)]
    for index in rng.permutation(len(chunks)):
        yield chunks[index]


class _Lesson:
    """A model, what it is taught from, and the two things it is taught: to word facts, and to answer from them.

    Only the facts decide an answer: questions teach to read the facts, reports to word them.
    """

    def __init__(self, model: Qwen3ForCausalLM, processor: Processor, reader: FactReader, questions: dict):
        self.model, self.processor, self.reader = model, processor, reader
        self.questions = {
            study_id: {kind: list(rows.itertuples()) for kind, rows in found.groupby(["kind", "closed"])}
            for study_id, found in questions.items()
        }
        self.described: dict[int, np.ndarray] = {}
        self.weights = description_weights(processor.tokenizer)

    def report_loss(self, rows: pd.DataFrame, rng: np.random.Generator) -> Tensor:
        """Half of the reports are mirrored, with their facts: else a line is nearly always right and a pacemaker left,
        and habit beats reading."""
        known, reports = self._facts(rows, rng, asked=False), list(rows.report)
        for row in np.flatnonzero(rng.random(len(reports)) < 0.5):
            reports[row] = mirrored(reports[row])
            known[row] = mirrored_facts(known[row])
        batch = self.processor.for_training([self.processor.report_prompt()] * len(rows), reports)
        return _text_loss(self.model, batch, self.reader, known, self.weights)

    def question_loss(self, rows: pd.DataFrame, rng: np.random.Generator) -> Tensor:
        """Some questions about each study, each in one of its known wordings; half of them mirrored, as reports are."""
        rows = rows[rows.study_id.isin(self.questions)]
        rows = rows.loc[rows.index.repeat(QUESTIONS_AT_ONCE)]
        one = [self._question(study_id, rng) for study_id in rows.study_id]
        choices = [wordings(row.kind, row.subject, row.value, row.negated).known for row in one]
        questions, answers = [str(rng.choice(known)) for known in choices], [row.answer for row in one]
        known = self._facts(rows, rng, asked=True)
        for row in np.flatnonzero(rng.random(len(one)) < 0.5):
            questions[row], answers[row] = mirrored(questions[row]), mirrored(answers[row])
            known[row] = mirrored_facts(known[row])
        batch = self.processor.for_training([self.processor.question_prompt(text) for text in questions], answers)
        return _text_loss(self.model, batch, self.reader, known, self.weights)

    def _question(self, study_id: int, rng: np.random.Generator) -> Any:
        """A question about the study; half of the time about a label's presence, else of any other kind, the rare
        kinds as often as the others."""
        by_kind = self.questions[study_id]
        labels = [kind for kind in by_kind if kind[0] in ("presence", "normality")]
        others = [kind for kind in by_kind if kind not in labels]
        kinds = labels if labels and (not others or rng.random() < 0.5) else others
        found = by_kind[kinds[rng.integers(len(kinds))]]
        return found[rng.integers(len(found))]

    def _facts(self, rows: pd.DataFrame, rng: np.random.Generator, asked: bool) -> list[list[Fact]]:
        states = rows[list(LABELS)].to_numpy(dtype=float)
        views = [images[0]["view"] if len(images) else "" for images in rows.images]
        for study_id, report in zip(rows.study_id, rows.report, strict=True):
            if study_id not in self.described:
                self.described[study_id] = describe(report)
        described = [self.described[study_id] for study_id in rows.study_id]
        return [facts(*of_one, rng, asked) for of_one in zip(states, described, rows.report, views, strict=True)]


_OTHER_SIDE = {"left": "right", "right": "left", "Left": "Right", "Right": "Left"}


def mirrored(text: str) -> str:
    """The same words about the other side."""
    return re.sub("left|right|Left|Right", lambda match: _OTHER_SIDE[match[0]], text)


def mirrored_facts(known: Sequence[Fact]) -> list[Fact]:
    """The same facts about the other side."""
    return [[(mirrored(phrase), share) for phrase, share in fact] for fact in known]


def description_weights(tokenizer: PreTrainedTokenizerBase) -> Tensor:
    """(vocabulary,): how much each token weighs in the loss. The few words that say where and how much are what a
    reader needs and the rest of a report does not tell; by their number alone they would be learned last."""
    weights = torch.ones(len(tokenizer))
    for word in [*WORDS, *map(str.capitalize, WORDS)]:
        ids = tokenizer(f" {word}", add_special_tokens=False)["input_ids"]
        weights[ids] = DESCRIPTION_WEIGHT
    return weights


def _text_loss(model, batch: dict[str, Tensor], reader: FactReader, known: list[list[Fact]], weights: Tensor) -> Tensor:
    table = model.get_input_embeddings()
    places = batch["input_ids"] == token_id(reader.tokenizer, IMAGE_TOKEN)
    embeddings = table(batch["input_ids"]).masked_scatter(places[..., None], reader(table, known))
    hidden = model.model(inputs_embeds=embeddings, attention_mask=batch["attention_mask"]).last_hidden_state
    targets = batch["labels"][:, 1:]
    supervised = targets != -100
    return nn.functional.cross_entropy(model.lm_head(hidden[:, :-1][supervised]), targets[supervised], weights)


@torch.no_grad()
def _held_out_loss(lesson: _Lesson, rows: pd.DataFrame) -> float:
    """Loss of reports that were not trained on, from some of their facts."""
    lesson.model.eval()
    return lesson.report_loss(rows, np.random.default_rng(0)).item()


def _write(model: Qwen3ForCausalLM, tokenizer, target: Path, record: dict) -> None:
    """Hugging Face form, half precision; the tied output head is not written twice."""
    Path(target).mkdir(parents=True, exist_ok=True)
    weights = {n: v.half().contiguous() for n, v in model.state_dict().items() if n != "lm_head.weight"}
    with atomic_path(Path(target) / "model.safetensors") as temporary:
        save_file(weights, temporary, metadata={"format": "pt"})
    model.config.pretraining = record
    model.config.save_pretrained(target)
    tokenizer.save_pretrained(target)
