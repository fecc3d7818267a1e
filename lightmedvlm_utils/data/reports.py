"""Report text: find the sections of a radiology report, and clean prose without damaging its content."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

import pandas as pd

from lightmedvlm_utils.data.parallel import map_chunks

TARGETS = ("findings", "impression")  # what the model learns to write

# Canonical section -> headings seen in MIMIC-CXR and Open-i. Add a heading here and nowhere else.
HEADINGS = {
    "examination": ("EXAMINATION", "EXAM", "TYPE OF EXAMINATION", "STUDY"),
    "indication": ("INDICATION", "INDICATIONS", "REASON FOR EXAM", "REASON FOR EXAMINATION", "REASON FOR STUDY",
                   "REASON FOR THIS EXAM", "REASON FOR THIS EXAMINATION"),
    "history": ("HISTORY", "CLINICAL HISTORY", "PATIENT HISTORY", "MEDICAL HISTORY", "PERTINENT HISTORY",
                "BRIEF HISTORY", "RELEVANT HISTORY", "HISTORY OF PRESENT ILLNESS", "CLINICAL INFORMATION",
                "CLINICAL INDICATION", "CLINICAL INDICATIONS", "CLINICAL DATA", "CLINICAL HISTORY/INDICATION",
                "CLINICAL HISTORY AND INDICATION", "HISTORY/INDICATION", "INDICATION/HISTORY"),
    "technique": ("TECHNIQUE", "PROCEDURE", "VIEWS"),
    "comparison": ("COMPARISON", "COMPARISONS", "COMPARISON STUDY"),
    "findings": ("FINDINGS", "FINDING", "FINDINGS AND IMPRESSION", "FINDINGS/IMPRESSION"),
    "impression": ("IMPRESSION", "IMPRESSIONS", "CONCLUSION", "CONCLUSIONS", "SUMMARY", "OPINION",
                   "IMPRESSION(S)", "IMPRESSION AND RECOMMENDATION", "IMPRESSION AND RECOMMENDATIONS",
                   "IMPRESSION AND RECOMMENDATION(S)"),
    "recommendation": ("RECOMMENDATION", "RECOMMENDATIONS", "RECOMMENDATION(S)"),
    "notification": ("NOTIFICATION", "NOTIFICATIONS", "NOTIFICATION(S)", "COMMUNICATION", "COMMUNICATIONS"),
    "addendum": ("ADDENDUM",),
    "wet_read": ("WET READ",),
    "unlabelled": ("REPORT", "CHEST"),
}  # fmt: skip
SECTIONS = tuple(HEADINGS)
# Sections of one paragraph: whatever follows a blank line is the report itself, written without a heading.
_ONE_PARAGRAPH = ("examination", "indication", "history", "technique", "comparison")

_CANONICAL = {name: section for section, names in HEADINGS.items() for name in names}
_NAMES = "|".join(re.escape(name) for name in sorted(_CANONICAL, key=len, reverse=True))
# A heading opens a line or follows the end of a sentence and starts with a capital: "chest:" in prose is none. It ends
# in a colon, or stands in capitals alone on its line. "WET READ" is followed by a name and a time before its colon,
# "ADDENDUM" often by no colon at all. A line in capitals that names the film ("CHEST, TWO VIEWS:") heads the report.
# Any other word with a colon at a line's start may be a misspelt heading (see `_misspelt`).
_HEADING = re.compile(
    rf"(?:^[ \t]*|(?<=[.\n:])[ \t]+)(?=[A-Z])(?:(?P<name>(?i:{_NAMES}))[ \t]*:|(?P<bare>WET READ|ADDENDUM)\b:?)"
    rf"|^[ \t]*(?P<alone>{_NAMES})[ \t]*(?:-(?=[ \t])|$)"
    r"|^[ \t]*(?P<film>(?=[A-Z])(?=[^\n:]*\b(?:CHEST|VIEWS?|RADIOGRAPHS?|FILMS?|PORTABLE)\b)[A-Z ,()/&-]+):"
    r"|^[ \t]*(?P<word>[A-Z][A-Za-z]{5,12})[ \t]*:",
    re.MULTILINE,
)
# Where one document of the file ends and the next begins.
_DIVIDER = re.compile(
    r"^.*\b(?:FINAL REPORT|FINAL ADDENDUM|PROVISIONAL REPORT)\b.*$|^[ \t]*_{10,}[ \t]*$", re.MULTILINE
)

_BLANK_LINE = re.compile(r"\n[ \t]*\n")
_MANY_BLANK_LINES = re.compile(r"\n[ \t]*\n(?:[ \t]*\n)+")
# What was removed for privacy: MIMIC-CXR writes ___ for names and dates, Open-i XXXX for any word. The token goes
# together with its compound ("___-year-old", "x-XXXX", "5XXXX": half a word says nothing or something else), but never
# with the number behind it ("___-20 mm"), and with the words that only introduced it ("compared to ___", "by Dr. ___ on
# ___"); XXXX may stand inside a sentence ("the XXXX are clear"), so its introduction goes only where nothing follows
# ("degeneration of the XXXX."). Repeats are bounded or atomic, so that the time grows with the text and not faster.
_INTRODUCTION = (
    r"(?:(?:as |when |in )?compar(?:ed|ison)(?: (?:is|was) made)? (?:to|with)|relative to|prior to|as of|(?:as )?per|"
    r"dated|from|on|of|by|with|to|at|in|the|an?|since|and|or|than|versus|vs\.?|between|via|until|before|after) "
).replace(" ", r"\s+")
_BLANKED = r"(?>(?:\w{1,30}-){0,3}\w*?X{4,}\w*(?:-(?!\d)\w{1,30}){0,3}(?:'s|-(?=\d))?)"
_BLANKED = rf"{_BLANKED}(?:(?:\s*,\s*|\s+){_BLANKED})*"
_DEID = re.compile(
    rf"(?P<introduction>\b(?:{_INTRODUCTION}){{1,6}})?(?P<title>\bDrs?\.?\s+)?(?>_{{3,}}(?:\s*(?:,\s*)?_{{3,}})*)"
    r"(?:[-\s]years?[-\s]old\b|(?!\d)\w+)?(?:-(?!\d)\w+)*(?:'s|-(?=\d))?"
    rf"|(?P<before_end>\b(?:{_INTRODUCTION}){{1,6}}){_BLANKED}(?=\s*(?:[.,;:]|$))|\b{_BLANKED}",
    re.IGNORECASE,
)
# Behind a token that was only a date ("compared with the ___ study") the sentence goes on: its introduction stays.
_DATED_STUDY = re.compile(
    r"\s+(?:(?:chest|portable|frontal|(?:pa|ap)(?:\s+and)?|lateral|prior|previous|comparison)\s+){0,4}"
    r"(?:stud(?:y|ies)|exam(?:ination)?s?|radiographs?|x-?rays?|films?|images?|cts?|mris?|scans?|reports?)\b",
    re.IGNORECASE,
)
# An item number stands where a sentence can start, or on a new line once a list is open. "1.Edema" needs no blank.
_NUMBERING = re.compile(r"(?P<before>\A|[.:;!?]\s+|\n\s*\n|\n)\s*(?P<number>\d{1,2})(?:[.)]\s+(?=\S)|[.)](?=[A-Za-z]))")

# Comparisons with earlier studies, which a model that sees one study cannot know (Ramesh et al. 2022 remove them with
# a language model; these rules take out what stands apart from the finding and leave the finding).
_ARTICLE = r"(?:the|an?|any|multiple|several|recent|most recent|immediate(?:ly)?|outside|patient's) "
_IMAGING = (
    r" (?:chest|portable|frontal|pa|ap|and|lateral|\d+-view|ct|cxr|x-?rays?|radiographs?|radiographic|films?|images?|"
    r"imaging|stud(?:y|ies)|exams?|examinations?|scans?|reports?|from|of|dated|performed)\b"
)
_PRIOR = rf"(?:{_ARTICLE}){{0,3}}(?:prior|previous|preceding|old|earlier|comparison)s?(?:{_IMAGING})*"
_IS = r"(?:is|are|was|were|remains?|appears?|has been|have been)"
_SAME = (
    r"(?:(?:relatively|essentially|grossly|largely|otherwise|overall|not significantly|not|without|in) )?"
    r"(?:unchanged|changed|stable|similar|constant)"
)
_END = r"(?= *(?:[.,;]|$))"
_COMPARISONS = tuple(
    re.compile(pattern, re.IGNORECASE)
    for pattern in (
        rf"\b(?:as |when |in )?compar(?:ed|ison|able)(?: is made)? (?:with|to) (?:{_PRIOR}|the (?:study|exam\w*)),? *",
        rf",? *\b(?:since|from|than|on|seen on|similar to|as (?:seen )?(?:on|in)) {_PRIOR}{_END}",
        rf",? *\b(?:and |but |which |that )?{_IS}(?: \w+ly)? {_SAME}\b"
        rf"(?: in (?:appearance|size|position|extent|severity))?{_END}",
        rf",? *\b(?:in the interval|over the interval|as before|again){_END}",
        rf",? *\b(?:and |but )?(?:unchanged|stable){_END}",
        r"\b(?:again (?:seen|noted|demonstrated|identified)|redemonstrat(?:ed|ion of)|unchanged|stable|persistent)"
        r"(?: is| are)? +(?=\w)(?!(?:in|from|since|compared|and|or|to|with|appearance|position)\b)",
        r"(?<!no )(?<!not )(?<!any )(?<!out )\bnew(?:ly)? +(?=\w)",  # "no new effusion" does not deny an old one
    )
)
_ONLY_CHANGE = re.compile(
    r"(?:(?:there|which) (?:is|are|has been) )?(?:no|little|minimal)?(?: \w+)? ?(?:interval )?(?:change|difference)s?"
    r"(?: (?:in|of) (?:the )?(?:appearance|chest))?",
    re.IGNORECASE,
)


def parse_sections(text: str) -> dict[str, str]:
    """Split a report into its sections; every name of `SECTIONS` is a key, "" where the report has none.

    Of several sections of one kind the last one that has text wins (drafts precede the final version). The
    findings of a report without a FINDINGS heading are its paragraphs that stand under no heading, or under one
    that only names the film. A "FINDINGS AND IMPRESSION" section counts as findings.

    >>> parse_sections("FINDINGS: Clear lungs. IMPRESSION: Normal chest.")["impression"]
    'Normal chest.'
    """
    sections = dict.fromkeys(SECTIONS, "")
    loose: list[str] = []
    for document in _DIVIDER.split(_MANY_BLANK_LINES.sub("\n\n", text.replace("\r\n", "\n"))):
        for name, body in _split_document(document):
            if name in _ONE_PARAGRAPH:
                body, rest = _first_paragraph(body)
                loose.append(rest)
            if name == "unlabelled":
                loose.append(body)
            elif body.strip():
                sections[name] = body.strip()
    paragraphs = [part.strip() for text in loose for part in _BLANK_LINE.split(text)]
    # A line in capitals is a title ("CHEST RADIOGRAPH PERFORMED ON ___"); sentences in capitals are a report.
    sections["unlabelled"] = "\n\n".join(part for part in paragraphs if part and not _is_title(part))
    sections["indication"] = sections["indication"] or sections["history"]
    sections["findings"] = sections["findings"] or sections["unlabelled"]
    return sections


def _is_title(paragraph: str) -> bool:
    return paragraph.isupper() and paragraph[-1] != "." and len(paragraph.split()) < 12


def _split_document(document: str) -> list[tuple[str, str]]:
    """Return (section, text) pairs in order; text before the first heading comes as "unlabelled"."""
    matches = [found for found in _HEADING.finditer(document) if not found["word"] or _misspelt(found["word"].upper())]
    starts = [match.start() for match in matches] + [len(document)]
    pairs = [("unlabelled", document[: starts[0]])]
    for match, end in zip(matches, starts[1:], strict=True):
        heading = (match["name"] or match["bare"] or match["alone"] or match["word"] or "REPORT").upper()
        heading = _misspelt(heading) if match["word"] else heading  # the film's name, here "REPORT", is no section
        pairs.append((_CANONICAL[heading], document[match.end() : end]))
    return pairs


def _misspelt(word: str) -> str:
    """The target heading that `word` was meant to be, "" if none: one edit away, or two with the first letter right.

    Two edits make a DEPRESSION or a COMPRESSION an IMPRESSION, but not behind a right first letter.
    """
    for heading in ("FINDINGS", "IMPRESSION"):
        if _edits(word, heading) <= 1 + (word[0] == heading[0]):
            return heading
    return ""


def _edits(a: str, b: str) -> int:
    """Levenshtein distance: letters to insert, delete or replace."""
    row = list(range(len(b) + 1))
    for i, letter in enumerate(a, start=1):
        above, row = row, [i]
        for j, other in enumerate(b, start=1):
            row.append(min(above[j] + 1, row[-1] + 1, above[j - 1] + (letter != other)))
    return row[-1]


def _first_paragraph(body: str) -> tuple[str, str]:
    first, _, rest = _BLANK_LINE.sub("\n\n", body.strip()).partition("\n\n")
    return first, rest


def clean_report(text: str, deid: str = "remove", priors: str = "keep") -> str:
    """Return `text` as one line of plain sentences; numbers, units, levels and case stay as they were.

    Removes line breaks, item numbers ("1. ...", where they count up from 1) and bullets, separator lines and repeated
    blanks or full stops. `deid` says what becomes of de-identification tokens (`___`, `XXXX`): "remove" takes
    them out together with the words that only introduced them, "keep" leaves them. `priors` says what becomes of
    comparisons with earlier studies: "keep" leaves them, "remove" takes them out (see `remove_priors`).

    >>> clean_report("1. A 1.2-cm nodule, seen on ___.\\n2. Compression of T11. No PTX.")
    'A 1.2-cm nodule, seen. Compression of T11. No PTX.'
    """
    for name, value, known in (("deid", deid, ("remove", "keep")), ("priors", priors, ("keep", "remove"))):
        if value not in known:
            raise ValueError(f"{name}={value!r}: choose {known[0]!r} or {known[1]!r}")
    text = re.sub(r"\s+", _shortest_break, re.sub(r"_{10,}", " ", text))
    text = re.sub(r"(?m)^[ \t]*[*\u2022][ \t]+", ". ", text)
    text = _drop_numbering(text)
    if deid == "remove":
        text = _DEID.sub(_drop_token, text)
        text = re.sub(r"\0[\s,;:]*(\w?)", lambda opening: f" {opening[1].upper()}", text)
    text = _tidy(text)
    return remove_priors(text) if priors == "remove" else text


def _shortest_break(blanks: re.Match) -> str:
    """Blanks, a line break or a blank line, as short as each can be: later rules see no long runs."""
    breaks = blanks[0].count("\n")
    return " " if not breaks else "\n" if breaks == 1 else "\n\n"


def _drop_token(match: re.Match) -> str:
    """What stays in place of a token: a zero byte before the word that opens the sentence where the token did."""
    introduction = match["introduction"] or match["before_end"] or match["title"] or ""
    if match["introduction"] and not match["title"] and _DATED_STUDY.match(match.string, match.end()):
        return introduction
    before = match.string[max(0, match.start() - 4) : match.start()].rstrip()
    return "\0" if introduction[:1].isupper() and before[-1:] in ("", ".", "!", "?") else " "


def _tidy(text: str) -> str:
    """One line, no blanks before punctuation, none of the punctuation that removed words leave; a full stop ends it."""
    text = re.sub(r"\s+", " ", text).strip()
    text = re.sub(r" +(?=[,.;:)?!])", "", text)
    text = re.sub(r"([,;:])(?=[,;:.])", "", text)  # what a removed token leaves: ", ." and ",,"
    text = re.sub(r"\.{2,}", ".", text)
    text = re.sub(r"(?<=[.!?]) [.,;:]+(?= |$)|^[.,;:\s]+", "", text)
    text = text.rstrip(" ,;:")
    return text if not text or text[-1] in ".!?" else f"{text}."


def remove_priors(text: str) -> str:
    """Take comparisons with earlier studies out of a cleaned report; findings, numbers and negations stay.

    Sentences that say nothing but "no change" go whole. By rules: what is woven into a finding ("has increased",
    "interval removal of the tube") stays.

    >>> remove_priors("Compared to the prior study, the small effusion is unchanged. No interval change.")
    'The small effusion.'
    """
    sentences = []
    for sentence in re.split(r"(?<=[.!?]) +(?=[A-Z])", text):
        kept = sentence
        for pattern in _COMPARISONS:
            kept = re.sub(" +", " ", pattern.sub(" " if pattern.pattern[0] != "," else "", kept))
        kept = _tidy(kept)
        if kept.strip(".") and not _ONLY_CHANGE.fullmatch(kept.strip(".")):
            sentences.append(kept[0].upper() + kept[1:] if sentence[0].isupper() else kept)
    return " ".join(sentences)


def _drop_numbering(text: str) -> str:
    """Remove item numbers. A number counts as one only where a sentence can start and it continues 1, 2, 3, ...:
    "rib 7." that a line break pushed to the margin stays."""
    expected = 1

    def drop(match: re.Match) -> str:
        nonlocal expected
        number = int(match["number"])
        wrapped = match["before"] == "\n" and expected == 1  # no list is open: a line break inside a sentence
        if number not in (1, expected) or wrapped:
            return match[0]
        expected = number + 1
        return match["before"] if match["before"].strip() else ". "  # list items often lack a full stop

    return _NUMBERING.sub(drop, text)


def report_text(findings: str, impression: str) -> str:
    """Join cleaned sections into the training target, "Findings: ... Impression: ..."; "" if both are empty."""
    named = (("Findings", findings), ("Impression", impression))
    return " ".join(f"{name}: {text}" for name, text in named if text)


def split_report(report: str) -> dict[str, str]:
    """The findings and the impression of a text in the form of `report_text`: its inverse.

    A text without headings counts as findings; the impression reaches to the end. Nothing else is taken out.

    >>> split_report("Findings: Clear. Impression: Normal.")
    {'findings': 'Clear.', 'impression': 'Normal.'}
    """
    findings, *impression = re.split(r"\bimpression\s*:", report, maxsplit=1, flags=re.IGNORECASE)
    findings = re.sub(r"^\s*findings\s*:", "", findings, flags=re.IGNORECASE)
    return {"findings": findings.strip(), "impression": "".join(impression).strip()}


def clean_reports(
    texts: Iterable[str], deid: str = "remove", priors: str = "keep", jobs: int | None = None, progress: bool = False
) -> pd.DataFrame:
    """Sections and cleaning for n report files at once: n rows x indication, findings, impression, report.

    `deid` and `priors` as in `clean_report`; `jobs` and the bar as in `parallel.map_chunks`.
    """
    chunks = map_chunks(_clean_chunk, texts, deid, priors, jobs=jobs, title="cleaning" if progress else "")
    return pd.DataFrame([row for rows in chunks for row in rows], columns=["indication", *TARGETS, "report"])


def _clean_chunk(texts: Sequence[str], deid: str, priors: str) -> list[tuple[str, str, str, str]]:
    rows = []
    for text in texts:
        sections = parse_sections(text or "")
        findings, impression = (clean_report(sections[name], deid, priors) for name in TARGETS)
        indication = clean_report(sections["indication"], deid)
        rows.append((indication, findings, impression, report_text(findings, impression)))
    return rows
