"""Clinical metrics of reports: models read both reports and say how much of their content agrees. All are optional.

`CLINICAL_METRICS` names them. Each needs a package (extra `clinical`) and models of its own; where these are missing
it is refused with one sentence, and the others go on. Draws come by protocol, which states model and settings:
`{protocol: {metric: (1 + samples,)}}`, mean over studies as in `metrics.py`. A study that a model's answer gives no
score for is left out of the mean, and `<metric>_unscored` counts it. Texts go to the models as they are.

- chexbert: F1 of CheXbert's labels (Smit et al. 2020, arXiv 2004.09167), as `metrics.label_draws` computes it.
  Uncertain as positive is f1chexbert's convention; it also counts a label that no report has as 0 in the macro.
- bertscore: BERTScore F (Zhang et al. 2020, arXiv 1904.09675) as ReXrank has it: fifth layer of distilroberta-base,
  rescaled with its baseline, without IDF.
- radgraph, radgraph_v1: F1 of RadGraph's entities (Delbrouck et al. 2022, arXiv 2210.12186), at the reward levels
  simple, partial (the usual one) and complete; RadGraph-XL (Delbrouck et al. 2024), RadGraph (arXiv 2106.14463).
- radcliq: RadCliQ-v1 (Yu et al. 2023, doi 10.1016/j.patter.2023.100802), lower is better, its inverse as ReXrank ranks
  by, and two of its parts; without IDF, as ReXrank has it (RadEval's own RadCliQ has IDF).
- ratescore: RaTEScore (Zhao et al. 2024, arXiv 2406.16845).
- green: GREEN (Ostmeier et al. 2024, arXiv 2405.03595); 7 billion parameters. Its package runs the code that comes
  with the weights.
- crimson: CRIMSON (arXiv 2603.06183) by its local model; crimson_hosted: by OpenAI's, which is sent the reports.
"""

from __future__ import annotations

import importlib
import importlib.util
import math
import sys
import tarfile
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import lru_cache, partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd

from lightmedvlm_utils.data.chexbert import HUB as CHEXBERT
from lightmedvlm_utils.data.chexbert import chexbert_embeddings, chexbert_labels
from lightmedvlm_utils.errors import UserError, no_such
from lightmedvlm_utils.evaluation.metrics import Draws, label_draws

Models = Mapping[str, str | Path]  # name of a model (see MODELS) -> where it lies
ByProtocol = dict[str, Draws]


class Source(NamedTuple):
    """A model on the Hugging Face hub: one file of a repository, or ("") all that its class loads."""

    repository: str
    file: str = ""


MODELS = {
    "chexbert": Source(*CHEXBERT),
    "distilroberta-base": Source("distilbert/distilroberta-base"),
    "radgraph-xl": Source("StanfordAIMI/RRG_scorers", "radgraph-xl.tar.gz"),
    "radgraph": Source("StanfordAIMI/RRG_scorers", "radgraph.tar.gz"),
    "rate-ner-deberta": Source("Angelakeke/RaTE-NER-Deberta"),
    "biolord-2023-c": Source("FremyCompany/BioLORD-2023-C"),
    "green-radllama2-7b": Source("StanfordAIMI/GREEN-radllama2-7b"),
    "medgemma-4b-it-crimson": Source("rajpurkarlab/medgemma-4b-it-crimson"),
}


def clinical_draws(
    names: Sequence[str],
    references: Sequence[str],
    hypotheses: Sequence[str],
    weights: np.ndarray,
    models: Models | None = None,
    dataset: str = "",
) -> tuple[ByProtocol, dict[str, str]]:
    """Draws of the named metrics by protocol, and why the others were refused: `{name: one sentence}`.

    `models` says where models lie (a folder; for CheXbert and RadGraph also the file itself); one that it does not name
    is looked for in the hub's cache and, unless HF_HUB_OFFLINE is set, downloaded, which is said. `dataset` is what the
    reports are of: a metric that sends them to others needs it. Raises UserError for an unknown name or model.
    """
    check_clinical(names, models)
    if len(references) != len(hypotheses):
        raise UserError(f"There are {len(references)} references but {len(hypotheses)} reports; they must be in pairs.")
    draws: ByProtocol = {}
    refused = {}
    for name in names:
        metric = CLINICAL_METRICS[name]
        try:
            if metric.hosted:
                _may_leave(dataset)
            _installed(metric.package)
            draws |= metric.score(list(references), list(hypotheses), weights, models or {})
        except UserError as error:
            refused[name] = f"{metric.title} cannot run: {error}"
        except Exception as error:  # of a foreign package, as the GPU's lack of memory: must not cost the other metrics
            refused[name] = f"{metric.title} failed on these reports ({_said(error)})."
    return draws, refused


def check_clinical(names: Sequence[str], models: Models | None = None) -> None:
    """Raises UserError unless all names are metrics of CLINICAL_METRICS and all models are of MODELS."""
    if isinstance(names, str):
        raise UserError(f"clinical is {names!r}; it must be a list: [{names!r}].")
    for name in names:
        if name not in CLINICAL_METRICS:
            raise no_such("clinical metric", name, CLINICAL_METRICS)
    for name in models or {}:
        if name not in MODELS:
            raise no_such("model of a clinical metric", name, MODELS)


def _may_leave(dataset: str) -> None:
    if not dataset:
        raise UserError("it sends the reports to others, so it must be told the data set (dataset=...) they are of.")
    if "mimic" in dataset.lower():
        raise UserError("it sends the reports to others, which PhysioNet's terms forbid for MIMIC; use crimson, which "
                        "runs on this machine.")  # fmt: skip


# ------------------------------------------------------------------------------- packages, models, their absence


def _said(error: Exception) -> str:
    """An exception in half a line."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:200]}{'…' if len(text) > 200 else ''}" if text else type(error).__name__


PACKAGES = {"bert_score": "bert-score>=0.3.13", "radeval": "radeval>=2.2.1,<3"}  # as pip knows them


def _installed(package: str) -> None:
    if package and importlib.util.find_spec(package) is None:
        raise UserError(f"the package {package} is not installed; pip install '{PACKAGES.get(package, package)}'.")


def _import(module: str, remedy: str):
    """A module of a package that is installed, though perhaps not so that it can be imported."""
    try:
        return importlib.import_module(module)
    except Exception as error:  # of the kinds that packages built for other versions raise
        raise UserError(f"{module.partition('.')[0]} cannot be imported ({_said(error)}); {remedy}.") from error


def _radeval(module: str, remedy: str = f"pip install '{PACKAGES['radeval']}'"):
    """A module of RadEval's metrics. Version 2.2.1 needs three cares, none of which hurts another version:

    importing it has nltk download a tokenizer that only its ROUGE needs, and sets how this process starts others;
    and its RadGraph imports itself under the package's earlier name, RadEval (its issue 27).
    """
    import multiprocessing

    nltk = _import("nltk", remedy)
    method, download = multiprocessing.get_start_method(allow_none=True), nltk.download
    try:
        nltk.download = lambda *_, **__: False
        sys.modules.setdefault("RadEval", _import("radeval", remedy))
        return _import(f"radeval.metrics.{module}", remedy)
    finally:
        nltk.download = download
        multiprocessing.set_start_method(method, force=True)


def _advice(source: Source) -> str:
    names = [name for name, known in MODELS.items() if known == source]
    copy = f", or give the place of a copy as clinical_models={{{names[0]!r}: PATH}}" if names else ""
    return f"fetch it with `{' '.join(('hf download', *filter(None, source)))}`{copy}."


def _place(name: str, models: Models) -> str:
    """Where a model lies: the given path, the downloaded file, or the repository's name for its class to load."""
    if models.get(name):
        path = Path(models[name]).expanduser()
        if not path.exists():
            raise UserError(f"{name} is not at {path}; {_advice(MODELS[name])}")
        return str(path)
    return _from_hub(MODELS[name])


def _from_hub(source: Source) -> str:
    from huggingface_hub import hf_hub_download, try_to_load_from_cache
    from huggingface_hub.constants import HF_HUB_OFFLINE

    file = source.file or "config.json"
    if not isinstance(try_to_load_from_cache(source.repository, file), str) and not HF_HUB_OFFLINE:
        print(f"downloading {source.file or 'the model'} of {source.repository} from the Hugging Face hub", flush=True)
    try:
        path = hf_hub_download(source.repository, file)
    except Exception as error:  # offline, not cached, no access: many kinds, one remedy
        what = (
            f"{source.file or source.repository} is not in the cache of the Hugging Face hub and cannot be downloaded"
        )
        raise UserError(f"{what} ({type(error).__name__}); {_advice(source)}") from error
    return path if source.file else source.repository


@contextmanager
def _loading(source: Source) -> Iterator[None]:
    """Turns whatever goes wrong while a package loads a model into the one sentence about that model."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        what = source.file or source.repository
        raise UserError(f"{what} could not be loaded ({_said(error)}); {_advice(source)}") from error


def _study_mean(metric: str, scores: Iterable[float | None], weights: np.ndarray) -> Draws:
    """Mean over the studies that have a score; how often the others occur in a draw is a metric of its own."""
    values = np.array([math.nan if score is None else float(score) for score in scores])
    if len(values) != weights.shape[1]:
        raise UserError(f"{len(values)} scores came back for {weights.shape[1]} studies.")
    known = ~np.isnan(values)
    with np.errstate(invalid="ignore"):
        draws = {metric: (weights[:, known] @ values[known]) / weights[:, known].sum(1)}
    return draws if known.all() else draws | {f"{metric}_unscored": weights @ (~known).astype(float)}


# -------------------------------------------------------------------------------------------------- CheXbert


@lru_cache(maxsize=4)  # the references are labelled once, not once a system
def _chexbert_labels(texts: tuple[str, ...], place: str) -> pd.DataFrame:
    return chexbert_labels(texts, place)


@lru_cache(maxsize=4)
def _chexbert_embeddings(texts: tuple[str, ...], place: str) -> np.ndarray:
    return chexbert_embeddings(texts, place)


def chexbert_draws(
    references: Sequence[str], hypotheses: Sequence[str], weights: np.ndarray, models: Models
) -> ByProtocol:
    """Macro and micro F1 over 14 and 5 labels, by what an uncertain mention counts as."""
    place = _place("chexbert", models)
    truth, guess = (_chexbert_labels(tuple(texts), place) for texts in (references, hypotheses))
    return {
        f"chexbert_uncertain_{rule}": {
            metric.replace("label_", "chexbert_"): draws
            for metric, draws in label_draws(truth, guess, weights, rule).items()
        }
        for rule in ("positive", "negative")
    }


# ------------------------------------------------------------------------------------------------- BERTScore


@lru_cache(maxsize=1)
def _bert_scorer(place: str):
    package = _import("bert_score", f"pip install '{PACKAGES['bert_score']}'")
    from transformers import AutoTokenizer

    baseline = Path(package.__file__).parent / "rescale_baseline" / "en" / "distilroberta-base.tsv"
    with _loading(MODELS["distilroberta-base"]):
        scorer = package.BERTScorer(
            model_type=place, num_layers=5, lang="en", rescale_with_baseline=True, baseline_path=str(baseline)
        )
        # bert-score asks for a space before the first word with every text; transformers 5 hears it only here.
        scorer._tokenizer = AutoTokenizer.from_pretrained(place, add_prefix_space=True)
    return scorer


def _bertscore(references: Sequence[str], hypotheses: Sequence[str], place: str) -> np.ndarray:
    """Rescaled F of n pairs; a pair with an empty side has, as bert-score sets it, F 0 before rescaling."""
    scorer = _bert_scorer(place)
    baseline = float(scorer.baseline_vals[2])
    pairs = [(" ".join(a.split()), " ".join(b.split())) for a, b in zip(hypotheses, references, strict=True)]
    full = [index for index, pair in enumerate(pairs) if all(pair)]
    scores = np.full(len(pairs), -baseline / (1 - baseline))
    if full:
        proposed, expected = (list(side) for side in zip(*(pairs[index] for index in full), strict=True))
        scores[full] = scorer.score(proposed, expected)[2].numpy()
    return scores


def bertscore_draws(
    references: Sequence[str], hypotheses: Sequence[str], weights: np.ndarray, models: Models
) -> ByProtocol:
    """BERTScore F as ReXrank has it."""
    scores = _bertscore(references, hypotheses, _place("distilroberta-base", models))
    return {"distilroberta-base_layer-5_rescaled_no-idf": _study_mean("bertscore", scores, weights)}


# -------------------------------------------------------------------------------------------------- RadGraph


class _Annotator:
    """RadGraph's annotation of texts, each text read once; None where RadGraph could not read it."""

    def __init__(self, model: Callable[[list[str]], dict[str, dict]]):
        self.model = model
        self.known: dict[str, dict | None] = {}

    def __call__(self, texts: Sequence[str]) -> list[dict | None]:
        texts = [text if text.strip() else "" for text in texts]  # RadGraph knows how to read "", but not blanks
        new = sorted(set(texts) - self.known.keys())
        if new:
            found = self.model(new)
            self.known |= {text: found.get(str(number)) for number, text in enumerate(new)}
        return [self.known[text] for text in texts]


@lru_cache(maxsize=2)
def _annotator(name: str, place: str) -> _Annotator:
    import json

    core = _radeval("radgraph._vendor.core")
    with _loading(MODELS[name]), _unpacked(name, Path(place)) as folder:
        config = json.loads((folder / name / "config.json").read_text(encoding="utf-8"))
        encoder = config["model"]["embedder"]["token_embedders"]["bert"]["model_name"]
        if not Path(encoder).is_dir():
            _from_hub(Source(encoder))
        return _Annotator(core.RadGraph(model_type=name, model_cache_dir=str(folder)))


@contextmanager
def _unpacked(name: str, path: Path) -> Iterator[Path]:
    """The folder that holds the folder `name` with RadGraph's config.json and weights: packed or unpacked."""
    if path.is_file():
        with tempfile.TemporaryDirectory() as temporary, tarfile.open(path) as archive:
            archive.extractall(Path(temporary) / name, filter="data")
            yield Path(temporary)
        return
    folder = path.parent if path.name == name else path
    if not (folder / name / "config.json").is_file():
        raise UserError(f"{path} holds no folder {name} with RadGraph's config.json; {_advice(MODELS[name])}")
    yield folder


def _annotate(name: str, models: Models) -> _Annotator:
    """The annotator of a model: as given, as RadGraph's package unpacked it earlier, or from the hub."""
    unpacked = Path(_radeval("radgraph._vendor.core").CACHE_DIR) / name
    if not models.get(name) and (unpacked / "weights.th").is_file():
        return _annotator(name, str(unpacked))
    return _annotator(name, _place(name, models))


def radgraph_draws(
    references: Sequence[str], hypotheses: Sequence[str], weights: np.ndarray, models: Models, name: str
) -> ByProtocol:
    """F1 of RadGraph's entities at each reward level; 0 where a report is empty or names no entity."""
    annotate = _annotate(name, models)
    reward = _radeval("radgraph._vendor.rewards").compute_reward
    texts = zip(hypotheses, references, strict=True)
    annotations = zip(annotate(hypotheses), annotate(references), strict=True)
    rows = [
        (0.0,) * 3 if not all(map(str.strip, pair)) else (math.nan,) * 3 if None in read else reward(*read, "all")
        for pair, read in zip(texts, annotations, strict=True)
    ]
    levels = zip(("simple", "partial", "complete"), zip(*rows, strict=True), strict=True)
    return {f"{name}_{level}": _study_mean("radgraph_f1", scores, weights) for level, scores in levels}


# --------------------------------------------------------------------------------------------------- RadCliQ

# Mean, scale and coefficient of each part in the published model. Its weights of BLEU-2 and of the intercept are below
# 1e-9 and left out.
RADCLIQ = {
    "radgraph_combined": (0.53792312, 0.30282584, -0.377083683),
    "bertscore": (0.61757256, 0.22430938, -0.3703001),
    "semb_score": (0.76479421, 0.25394391, -0.252616218),
}


def radcliq_draws(
    references: Sequence[str], hypotheses: Sequence[str], weights: np.ndarray, models: Models
) -> ByProtocol:
    """RadCliQ-v1 and its inverse, the mean F1 of RadGraph's entities and relations, and SembScore."""
    radcliq = _radeval("RadCliQv1.radcliq")
    roberta, chexbert = _place("distilroberta-base", models), _place("chexbert", models)
    annotate = _annotate("radgraph", models)
    annotations = zip(annotate(references), annotate(hypotheses), strict=True)
    parts = {
        "radgraph_combined": np.array([_combined_f1(radcliq, *pair) for pair in annotations]),
        "bertscore": _bertscore(references, hypotheses, roberta),
        "semb_score": _cosines(*(_chexbert_embeddings(tuple(side), chexbert) for side in (references, hypotheses))),
    }
    scores = np.zeros(len(references))
    for part, (mean, scale, coefficient) in RADCLIQ.items():
        scores += coefficient * (parts[part] - mean) / scale
    draws = _study_mean("radcliq_v1", scores, weights)
    with np.errstate(divide="ignore"):
        draws["inverse_radcliq_v1"] = 1 / draws["radcliq_v1"]
    for part in ("radgraph_combined", "semb_score"):
        draws |= _study_mean(part, parts[part], weights)
    return {"radgraph_chexbert_distilroberta-base_no-idf": draws}


def _combined_f1(radcliq, reference: dict | None, hypothesis: dict | None) -> float:
    if reference is None or hypothesis is None:
        return math.nan
    kinds = (radcliq.extract_entities, radcliq.extract_relations)
    return sum(radcliq.compute_f1(kind(reference), kind(hypothesis)) for kind in kinds) / len(kinds)


def _cosines(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    return (first * second).sum(1) / (np.linalg.norm(first, axis=1) * np.linalg.norm(second, axis=1))


# ------------------------------------------------------------------------------------- RaTEScore, GREEN, CRIMSON


@lru_cache(maxsize=1)
def _rate_scorer(entities: str, synonyms: str):
    with _loading(MODELS["rate-ner-deberta"]):
        return _ratescore("scorer").RaTEScore(bert_model=entities, eval_model=synonyms)


def _ratescore(module: str):
    # medspacy keeps Python 3.11 below spaCy 3.8, whose binaries do not fit numpy 2; the later spaCy works with it.
    return _radeval(f"RaTEScore.{module}", "pip install 'spacy>=3.8'")


def ratescore_draws(
    references: Sequence[str], hypotheses: Sequence[str], weights: np.ndarray, models: Models
) -> ByProtocol:
    """RaTEScore with its affinity matrix "long"; 0.5, its own rule, where a report names no entity."""
    sentences = _ratescore("utils").sentence_split
    scorer = _rate_scorer(_place("rate-ner-deberta", models), _place("biolord-2023-c", models))
    scores = []
    for pair in zip(hypotheses, references, strict=True):
        # One study a call: in a list, the package loses a text without a sentence and shifts all that follow.
        readable = all(sentences([text])[0] for text in pair)
        scores.append(scorer.compute_score(*([text] for text in pair))[0][0] if readable else 0.5)
    return {"rate-ner-deberta_biolord-2023-c_long": _study_mean("ratescore", scores, weights)}


@lru_cache(maxsize=1)
def _green_scorer(place: str):
    module = _radeval("green_score.green")
    with _loading(MODELS["green-radllama2-7b"]):
        return module.GREEN(place, num_gpus=1)


def green_draws(
    references: Sequence[str], hypotheses: Sequence[str], weights: np.ndarray, models: Models
) -> ByProtocol:
    """GREEN: matched findings over matched findings and significant errors, as its language model counts them.

    An answer without these counts is 0 to the package, and so here; `green_unread` says how many a draw has.
    """
    scorer = _green_scorer(_place("green-radllama2-7b", models))
    _, _, scores, table = scorer(references, hypotheses)
    draws = _study_mean("green", scores, weights)
    unread = [
        any(scorer.parse_error_counts(answer, kind, for_reward=True)[1] is None for kind in _GREEN_COUNTS)
        for answer in table["green_analysis"]
    ]
    if any(unread):
        draws["green_unread"] = weights @ np.array(unread, float)
    return {"green-radllama2-7b": draws}


_GREEN_COUNTS = ("Clinically Significant Errors", "Matched Findings")


@lru_cache(maxsize=1)
def _crimson_scorer(place: str):
    module = _radeval("crimson.crimson")
    with _loading(MODELS["medgemma-4b-it-crimson"]):
        return module.CRIMSON(provider="hf", model_name=place)


def crimson_draws(
    references: Sequence[str], hypotheses: Sequence[str], weights: np.ndarray, models: Models
) -> ByProtocol:
    """CRIMSON, in (-1, 1], by its local model, which was trained without the guidelines in its prompt."""
    scorer = _crimson_scorer(_place("medgemma-4b-it-crimson", models))
    scores = scorer(references, hypotheses, include_guidelines=False)[2]
    return {"medgemma-4b-it-crimson": _study_mean("crimson", scores, weights)}


def crimson_hosted_draws(
    references: Sequence[str], hypotheses: Sequence[str], weights: np.ndarray, models: Models
) -> ByProtocol:
    """CRIMSON by OpenAI's model, which is sent all reports; needs the package openai and OPENAI_API_KEY."""
    crimson = _radeval("crimson.crimson").CRIMSON
    _installed("openai")
    try:
        scorer = crimson(provider="openai")
    except OSError as error:  # what RadEval raises without a key
        raise UserError("it needs a key of OpenAI's in the environment variable OPENAI_API_KEY.") from error
    return {f"openai_{scorer.model_name}": _study_mean("crimson", scorer(references, hypotheses)[2], weights)}


class ClinicalMetric(NamedTuple):
    """A metric: title, function, the package and the models that it needs, and whether it sends reports to others."""

    title: str
    score: Callable[[Sequence[str], Sequence[str], np.ndarray, Models], ByProtocol]
    package: str
    models: tuple[str, ...]
    hosted: bool = False


CLINICAL_METRICS = {
    "chexbert": ClinicalMetric("CheXbert F1", chexbert_draws, "", ("chexbert",)),
    "bertscore": ClinicalMetric("BERTScore", bertscore_draws, "bert_score", ("distilroberta-base",)),
    "radgraph": ClinicalMetric("RadGraph-F1", partial(radgraph_draws, name="radgraph-xl"), "radeval", ("radgraph-xl",)),
    "radgraph_v1": ClinicalMetric("RadGraph-F1", partial(radgraph_draws, name="radgraph"), "radeval", ("radgraph",)),
    "radcliq": ClinicalMetric("RadCliQ-v1", radcliq_draws, "radeval", ("radgraph", "chexbert", "distilroberta-base")),
    "ratescore": ClinicalMetric("RaTEScore", ratescore_draws, "radeval", ("rate-ner-deberta", "biolord-2023-c")),
    "green": ClinicalMetric("GREEN", green_draws, "radeval", ("green-radllama2-7b",)),
    "crimson": ClinicalMetric("CRIMSON", crimson_draws, "radeval", ("medgemma-4b-it-crimson",)),
    "crimson_hosted": ClinicalMetric("CRIMSON (hosted)", crimson_hosted_draws, "radeval", (), hosted=True),
}
