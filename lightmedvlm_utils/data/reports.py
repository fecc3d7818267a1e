"""Report text: find the sections of a radiology report, and clean prose without damaging its content."""

from __future__ import annotations

import re

# Canonical section -> headings seen in MIMIC-CXR and Open-i. Add a heading here and nowhere else.
HEADINGS = {
    "examination": ("EXAMINATION", "EXAM", "TYPE OF EXAMINATION", "STUDY"),
    "indication": ("INDICATION", "INDICATIONS", "REASON FOR EXAM", "REASON FOR EXAMINATION", "REASON FOR STUDY"),
    "history": ("HISTORY", "CLINICAL HISTORY", "CLINICAL INFORMATION", "CLINICAL INDICATION"),
    "technique": ("TECHNIQUE", "PROCEDURE", "VIEWS"),
    "comparison": ("COMPARISON", "COMPARISONS", "COMPARISON STUDY"),
    "findings": ("FINDINGS", "FINDING", "FINDINGS AND IMPRESSION", "FINDINGS/IMPRESSION"),
    "impression": ("IMPRESSION", "IMPRESSIONS", "CONCLUSION", "CONCLUSIONS", "SUMMARY"),
    "recommendation": ("RECOMMENDATION", "RECOMMENDATIONS"),
    "notification": ("NOTIFICATION", "NOTIFICATIONS", "COMMUNICATION"),
    "addendum": ("ADDENDUM",),
    "wet_read": ("WET READ",),
    "unlabelled": ("REPORT", "CHEST", "FRONTAL AND LATERAL VIEWS OF THE CHEST", "PA AND LATERAL VIEWS OF THE CHEST",
                   "PA AND LATERAL CHEST RADIOGRAPHS", "PORTABLE CHEST RADIOGRAPH", "SINGLE VIEW OF THE CHEST"),
}  # fmt: skip
SECTIONS = tuple(HEADINGS)
# Sections of one paragraph: whatever follows a blank line is the report itself, written without a heading.
_ONE_PARAGRAPH = ("examination", "indication", "history", "technique", "comparison")

_CANONICAL = {name: section for section, names in HEADINGS.items() for name in names}
_NAMES = "|".join(re.escape(name) for name in sorted(_CANONICAL, key=len, reverse=True))
# A heading opens a line or follows the end of a sentence and starts with a capital: "chest:" in prose is none.
# "WET READ" is followed by a name and a time before its colon, "ADDENDUM" often by no colon at all.
_HEADING = re.compile(
    rf"(?:^[ \t]*|(?<=[.\n:])[ \t]+)(?=[A-Z])(?:(?P<name>(?i:{_NAMES}))[ \t]*:|(?P<bare>WET READ|ADDENDUM)\b:?)",
    re.MULTILINE,
)
# Where one document of the file ends and the next begins.
_DIVIDER = re.compile(
    r"^.*\b(?:FINAL REPORT|FINAL ADDENDUM|PROVISIONAL REPORT)\b.*$|^[ \t]*_{10,}[ \t]*$", re.MULTILINE
)

_BLANK_LINE = re.compile(r"\n[ \t]*\n")
# What was removed for privacy: MIMIC-CXR writes ___ for names and dates, Open-i XXXX for any word. The token goes
# together with the words that only introduced it ("dated ___", "by Dr. ___ on ___"); XXXX may stand inside a
# sentence ("the XXXX are clear"), so its introduction goes only where nothing follows ("degeneration of the XXXX.").
_LEAD_IN = r"\b(?:(?:dated|from|on|of|by|with|to|at|in|the|an?|since|and|or)\s+)"
_DEID = re.compile(
    rf"(?:{_LEAD_IN}*)?(?:\bDr\.?\s+)?_{{3,}}(?:\s*,?\s*_{{3,}})*(?:'s)?"
    rf"|{_LEAD_IN}+X{{4,}}\b(?=\s*(?:[.,;:]|$))|\bX{{4,}}\b",
    re.IGNORECASE,
)
# An item number stands where a sentence can start, or on a new line once a list is open.
_NUMBERING = re.compile(r"(?P<before>\A|[.:;!?]\s+|\n\s*\n|\n)\s*(?P<number>\d{1,2})[.)]\s+(?=\S)")


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
    for document in _DIVIDER.split(text.replace("\r\n", "\n")):
        for name, body in _split_document(document):
            if name in _ONE_PARAGRAPH:
                body, rest = _first_paragraph(body)
                loose.append(rest)
            if name == "unlabelled":
                loose.append(body)
            elif body.strip():
                sections[name] = body.strip()
    paragraphs = [part.strip() for text in loose for part in _BLANK_LINE.split(text)]
    # A paragraph in capitals is a title ("CHEST RADIOGRAPH PERFORMED ON ___"), not a report.
    sections["unlabelled"] = "\n\n".join(part for part in paragraphs if part and not part.isupper())
    sections["indication"] = sections["indication"] or sections["history"]
    sections["findings"] = sections["findings"] or sections["unlabelled"]
    return sections


def _split_document(document: str) -> list[tuple[str, str]]:
    """Return (section, text) pairs in order; text before the first heading comes as "unlabelled"."""
    matches = list(_HEADING.finditer(document))
    starts = [match.start() for match in matches] + [len(document)]
    pairs = [("unlabelled", document[: starts[0]])]
    for match, end in zip(matches, starts[1:], strict=True):
        pairs.append((_CANONICAL[(match["name"] or match["bare"]).upper()], document[match.end() : end]))
    return pairs


def _first_paragraph(body: str) -> tuple[str, str]:
    first, _, rest = _BLANK_LINE.sub("\n\n", body.strip()).partition("\n\n")
    return first, rest


def clean_report(text: str, deid: str = "remove") -> str:
    """Return `text` as one line of plain sentences; numbers, units, levels and case stay as they were.

    Removes line breaks, item numbers ("1. ...", where they count up from 1), separator lines and repeated
    blanks or full stops. `deid` says what becomes of de-identification tokens (`___`, `XXXX`): "remove" takes
    them out together with the words that only introduced them, "keep" leaves them.

    >>> clean_report("1. A 1.2-cm nodule, seen on ___.\\n2. Compression of T11. No PTX.")
    'A 1.2-cm nodule, seen. Compression of T11. No PTX.'
    """
    if deid not in ("remove", "keep"):
        raise ValueError(f"deid={deid!r}: choose 'remove' or 'keep'")
    text = re.sub(r"_{10,}", " ", text.replace("\r\n", "\n"))
    text = _drop_numbering(text)
    if deid == "remove":
        text = _DEID.sub(" ", text)
    text = re.sub(r"\s+", " ", text).strip()
    text = re.sub(r" +(?=[,.;:)?!])", "", text)
    text = re.sub(r"([,;:])(?=[,;:.])", "", text)  # what a removed token leaves: ", ." and ",,"
    text = re.sub(r"\.{2,}", ".", text)
    text = re.sub(r"(?<=[.!?]) [.,;:]+(?= |$)|^[.,;:\s]+", "", text)
    text = text.rstrip(" ,;:")
    return text if not text or text[-1] in ".!?" else f"{text}."


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
        return ". " if match["before"] == "\n" else match["before"]  # list items often lack a full stop

    return _NUMBERING.sub(drop, text)


def report_text(findings: str, impression: str) -> str:
    """Join cleaned sections into the training target, "Findings: ... Impression: ..."; "" if both are empty."""
    named = (("Findings", findings), ("Impression", impression))
    return " ".join(f"{name}: {text}" for name, text in named if text)
