"""The command line: `lightmedvlm run | ablate | config | report | vqa | check | import-thesis`.

Nothing heavy is imported before the arguments are understood, so that `--help` and mistakes answer at once.
Exit codes: 0 done, 1 a defect, 2 something the user can put right, 130 interrupted, 143 told to stop
(SIGTERM).
"""

from __future__ import annotations

import argparse
import errno
import json
import logging
import os
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

from lightmedvlm_utils import __version__
from lightmedvlm_utils.config import DATASETS, NOT_FOR_CLINICAL_USE, PROFILES
from lightmedvlm_utils.errors import UserError

DEFAULT_PROFILE = "laptop"

# What a user can put right about a file; any other OSError is a defect and keeps its traceback.
_FILE_TROUBLE = {
    errno.ENOSPC, errno.EDQUOT, errno.EFBIG,  # full
    errno.EACCES, errno.EPERM, errno.EROFS,  # forbidden
    errno.ENOTDIR, errno.EISDIR, errno.EEXIST,  # a file where a folder should be, or the other way round
}  # fmt: skip


def main(argv: list[str] | None = None) -> int:
    """Run one command; returns the exit code."""
    arguments = _parser().parse_args(argv)
    try:
        return arguments.command(arguments)
    except UserError as error:
        return _refuse(str(error))
    except BrokenPipeError:  # the reader of our output (head, less) has left
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except OSError as error:
        if error.errno not in _FILE_TROUBLE:
            raise
        place = error.filename or "The output folder"
        return _refuse(f"{place} cannot be written ({error.strerror}); free space or choose another folder.")
    except KeyboardInterrupt:
        # asyncio would report the notebook's task, which died with its kernel, in a traceback at exit.
        logging.getLogger("asyncio").setLevel(logging.CRITICAL)
        print("\nInterrupted.", file=sys.stderr)
        return 130


def _refuse(sentence: str) -> int:
    print(f"lightmedvlm: {sentence}", file=sys.stderr)
    return 2


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="lightmedvlm",
        description="A lightweight vision-language model for chest X-rays, taught as a notebook course.",
        epilog=NOT_FOR_CLINICAL_USE,
    )
    parser.add_argument("--version", action="version", version=f"lightmedvlm {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    _add_run(commands)
    _add_ablate(commands)
    _add_config(commands)
    _add_report(commands)
    _add_vqa(commands)
    check = commands.add_parser("check", help="report packages, hardware and the state of the runs")
    check.add_argument("--json", action="store_true", help="print the report as JSON")
    check.set_defaults(command=_check)
    _add_import(commands)
    return parser


def _add_run(commands) -> None:
    run = commands.add_parser(
        "run",
        help="execute the notebooks in order",
        description="Execute the course notebooks in order; steps that are already done are kept.",
    )
    _add_settings(run)
    run.add_argument("--dataset", default="phantom", choices=DATASETS, help="data set (%(default)s)")
    run.add_argument("--data-root", default="", metavar="DIR", help="folder of a real data set")
    run.add_argument("--vqa-data", default="", metavar="DIR", help="published VQA data set for stage 3 and its test")
    run.add_argument("--run-name", default="", metavar="NAME", help="folder under outputs/ (the profile's name)")
    run.add_argument("--seed", default=0, type=int, help="seed of everything random (%(default)s)")
    run.add_argument("--from", dest="first", default="", metavar="NN", help="first notebook (number or name)")
    run.add_argument("--to", dest="last", default="", metavar="NN", help="last notebook (number or name)")
    run.add_argument("--force", action="store_true", help="redo steps that are already done")
    run.add_argument("--dry-run", action="store_true", help="say what would be redone and why, and stop there")
    run.add_argument("--json", action="store_true", help="print the run's record as JSON, progress on stderr")
    run.add_argument(
        "-p",
        "--parameter",
        dest="parameters",
        nargs=2,
        action="append",
        default=[],
        metavar=("NAME", "VALUE"),
        help="set a parameter of the notebooks that have it; repeatable",
    )
    run.set_defaults(command=_run)


def _add_ablate(commands) -> None:
    ablate = commands.add_parser(
        "ablate",
        help="train the course with one thing changed at a time, over seeds, and compare",
        description="Train and measure every arm of an ablation with every seed; what is done already is kept.",
    )
    ablate.add_argument("file", metavar="FILE", help="YAML file that describes it, like those in benchmarks/ablations")
    ablate.add_argument("--dry-run", action="store_true", help="say what would be trained, and stop there")
    ablate.add_argument("--json", action="store_true", help="print the records as JSON, progress on stderr")
    ablate.set_defaults(command=_ablate)


def _add_config(commands) -> None:
    config = commands.add_parser(
        "config",
        help="print a profile's settings as YAML",
        description="Print every setting of a profile, with yours in their place, as YAML that --config reads back.",
    )
    _add_settings(config)
    config.set_defaults(command=_config)


def _add_settings(command: argparse.ArgumentParser) -> None:
    command.add_argument("--profile", choices=PROFILES, help=f"size of everything ({DEFAULT_PROFILE})")
    command.add_argument("--config", metavar="FILE", help="YAML file of settings, as `lightmedvlm config` prints them")
    command.add_argument(
        "--set",
        dest="assignments",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="a setting instead of the profile's, like stage2.epochs=3; repeatable",
    )


def _add_image_options(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--image",
        required=True,
        action="append",
        metavar="FILE",
        help="chest X-ray as PNG, JPEG or DICOM; repeat it for further views of the same study",
    )
    command.add_argument("--model", metavar="DIR", help="checkpoint folder (the newest trained run)")
    command.add_argument(
        "--plugin", action="append", default=[], metavar="MODULE", help="module that registers the model's connector"
    )
    command.add_argument("--json", action="store_true", help="print JSON")


def _add_report(commands) -> None:
    report = commands.add_parser(
        "report", help="write Findings and Impression for a chest X-ray", epilog=NOT_FOR_CLINICAL_USE
    )
    _add_image_options(report)
    report.add_argument("--output", metavar="FILE", help="write the report to FILE instead of the screen")
    report.set_defaults(command=_report)


def _add_vqa(commands) -> None:
    vqa = commands.add_parser("vqa", help="answer questions about a chest X-ray", epilog=NOT_FOR_CLINICAL_USE)
    _add_image_options(vqa)
    vqa.add_argument(
        "--question", required=True, action="append", metavar="TEXT", help="question, yes/no or open; repeatable"
    )
    vqa.set_defaults(command=_vqa)


def _add_import(commands) -> None:
    command = commands.add_parser(
        "import-thesis",
        help="turn a checkpoint of the thesis' own code into a checkpoint folder",
        description="Read a Lightning checkpoint of the thesis (report stages, VQA stage or baseline; complete or "
        "trainable parameters alone), account for every key, and write a folder that `report` and `vqa` can use.",
    )
    command.add_argument("checkpoint", metavar="CKPT", help="the .ckpt file; no code in it is run")
    command.add_argument("folder", metavar="DIR", help="new folder for the checkpoint")
    command.add_argument("--vision", metavar="NAME", help="encoder it was trained with: timm name or folder (Swin-B)")
    command.add_argument("--language-model", metavar="NAME", help="hub name or folder (Qwen/Qwen3-0.6B)")
    command.add_argument("--tokenizer", metavar="DIR", help="its tokenizer's folder (the language model's)")
    command.add_argument("--lora-alpha", type=int, default=16, help="alpha it was trained with (%(default)s)")
    command.add_argument("--merge", action="store_true", help="add the LoRA adapter to the weights")
    command.add_argument("--json", action="store_true", help="print the account of all keys as JSON")
    command.set_defaults(command=_import)


def _given_settings(arguments) -> tuple[str, dict]:
    """(profile, settings): the file's, those of the command line before them."""
    from lightmedvlm_utils.settings import from_assignments, from_file

    profile, settings = from_file(arguments.config) if arguments.config else ("", {})
    if profile and arguments.profile not in (None, profile):
        raise UserError(f"{arguments.config} is for profile {profile!r}, not {arguments.profile!r}; drop --profile.")
    return arguments.profile or profile or DEFAULT_PROFILE, settings | from_assignments(arguments.assignments)


def _config(arguments) -> int:
    from lightmedvlm_utils.settings import resolve, to_yaml

    print(to_yaml(resolve(*_given_settings(arguments))), end="")
    return 0


def _run(arguments) -> int:
    profile, settings = _given_settings(arguments)
    from lightmedvlm_utils.course.runner import run_course

    names = [name for name, _ in arguments.parameters]
    repeated = {name for name in names if names.count(name) > 1}
    if repeated:
        raise UserError(f"Parameter {sorted(repeated)[0]!r} is given twice; give it once.")
    extra = {}
    if arguments.vqa_data:
        from lightmedvlm_utils.data.vqa_sets import find_vqa

        find_vqa(arguments.vqa_data)  # what is no VQA data set is refused now, not in an hour
        extra["vqa_data"] = str(Path(arguments.vqa_data).expanduser().resolve())
    run = partial(
        run_course,
        profile,
        arguments.dataset,
        arguments.data_root,
        arguments.run_name,
        arguments.seed,
        arguments.first,
        arguments.last,
        parameters=dict(arguments.parameters) | extra,
        force=arguments.force,
        settings=settings,
        dry=arguments.dry_run,
        say=_speaker(arguments),
    )
    return _executed(run, arguments)


def _ablate(arguments) -> int:
    from lightmedvlm_utils.course.ablation import read_ablation, run_ablation

    ablation = read_ablation(arguments.file)
    return _executed(partial(run_ablation, ablation, arguments.dry_run, _speaker(arguments)), arguments)


def _executed(work: Callable[[], object], arguments) -> int:
    """Do what executes notebooks; print its record where JSON is asked for, and say which notebook has stopped."""
    from lightmedvlm_utils.course.kernel import NotebookFailed

    try:
        record = work()
    except NotebookFailed as failure:
        print(f"\nlightmedvlm: {failure}", file=sys.stderr)
        return failure.exit_code
    if arguments.json:
        print(json.dumps(record, indent=1))
    return 0


def _speaker(arguments):
    """Prints progress: on stderr where stdout is for JSON."""

    def say(*texts, **options) -> None:
        print(*texts, **options, file=sys.stderr if arguments.json else sys.stdout)

    return say


def _open(arguments):
    """The views of one study, checked before the seconds that a model takes; the model and its folder."""
    from lightmedvlm_utils.data.images import read_image

    views = [read_image(path) for path in arguments.image]
    from lightmedvlm_utils import inference
    from lightmedvlm_utils.settings import load_plugins

    load_plugins(arguments.plugin)

    folder = Path(arguments.model) if arguments.model else inference.newest_model()
    return views, inference.load(folder), folder


def _report(arguments) -> int:
    from lightmedvlm_utils.data.reports import split_report
    from lightmedvlm_utils.files import write_text

    if arguments.output:
        _check_output(Path(arguments.output))
    views, reporter, folder = _open(arguments)
    sections = split_report(reporter.report([views])[0])
    record = dict(images=arguments.image, model=str(folder), **sections, notice=NOT_FOR_CLINICAL_USE)
    text = "\n\n".join(f"{heading.capitalize()}: {body}" for heading, body in sections.items() if body)
    text = json.dumps(record, indent=1) if arguments.json else text
    if arguments.output:
        write_text(arguments.output, text + "\n")
        print(f"Report written to {arguments.output}", file=sys.stderr)
    else:
        print(text)
    print(NOT_FOR_CLINICAL_USE, file=sys.stderr)
    return 0


def _check_output(path: Path) -> None:
    """Refuse an output file that cannot be written before the model is loaded, not after."""
    if path.is_dir():
        raise UserError(f"{path} is a folder; name a file for the report.")
    folder = path.parent
    if not folder.is_dir():
        raise UserError(f"The folder {folder} does not exist; make it, or write the report elsewhere.")
    if not os.access(folder, os.W_OK):
        raise UserError(f"The folder {folder} cannot be written; choose another one for the report.")


def _vqa(arguments) -> int:
    if not all(question.strip() for question in arguments.question):
        raise UserError("A --question is empty; write one, like 'Is there a pneumothorax?'.")
    views, reporter, folder = _open(arguments)
    answers = reporter.answer([views] * len(arguments.question), arguments.question)
    from lightmedvlm_utils.data.questions import is_closed

    rows: list[dict] = []
    for question, (answer, probability) in zip(arguments.question, answers, strict=True):
        of_what = "probability_of_yes" if is_closed(question) else "probability"
        rows.append({"question": question, "answer": answer, of_what: round(probability, 6)})
    if arguments.json:
        record = dict(images=arguments.image, model=str(folder), answers=rows, notice=NOT_FOR_CLINICAL_USE)
        print(json.dumps(record, indent=1))
    else:
        for row in rows:
            of_what = "probability_of_yes" if "probability_of_yes" in row else "probability"
            print(f"{row['question']}  {row['answer']} ({of_what.replace('_', ' ')}: {row[of_what]:.2f})")
    print(NOT_FOR_CLINICAL_USE, file=sys.stderr)
    return 0


def _check(arguments) -> int:
    from lightmedvlm_utils.course.check import collect, format_report

    report = collect()
    print(json.dumps(report, indent=1) if arguments.json else format_report(report))
    return 2 if report["problems"] else 0


def _import(arguments) -> int:
    folder = Path(arguments.folder)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{folder} exists and is not empty; name a new folder.")
    from dataclasses import asdict

    from lightmedvlm_utils.course.stages import save_checkpoint
    from lightmedvlm_utils.model.thesis import LANGUAGE_MODEL, VISION, load_thesis_checkpoint

    model, processor, account = load_thesis_checkpoint(
        arguments.checkpoint,
        arguments.vision or VISION,
        arguments.language_model or LANGUAGE_MODEL,
        tokenizer=arguments.tokenizer,
        lora_alpha=arguments.lora_alpha,
    )
    folder.parent.mkdir(parents=True, exist_ok=True)
    save_checkpoint(model.merge_lora() if arguments.merge else model, processor, folder)
    print(json.dumps({**asdict(account), "read": account.read}, indent=1) if arguments.json else account)
    print(f"Written to {folder}. {NOT_FOR_CLINICAL_USE}", file=sys.stderr)
    return 0
