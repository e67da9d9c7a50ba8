"""Draws study.json, or a report of your own: python -m results.study figures [REPORT.json ...]

A row, from study.py: the question, what a run is called there, the run, what it is compared with.
"""

from pathlib import Path

import numpy as np

from results.study import difference, read, rows_of

try:
    import matplotlib
    from matplotlib.figure import Figure
    from PIL import Image
except ImportError:
    raise ValueError("figures needs pip install matplotlib")

matplotlib.rcParams["font.size"] = 12
# Okabe and Ito's colors, which color-blind readers tell apart.
COLORS = "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#000000", "#56B4E9", "#E69F00", "#999999"
CER = "character error rate, %"
FAR = 10        # larger differences are written as numbers


def draw(path: Path):
    """Draw all that this report has numbers for, beside it."""
    report = read(path)

    def rows(section, question):
        """Runs that the study does not list (your own) are drawn for every question."""
        entries = report.get(section, {})
        listed = [row for row in rows_of(entries) if row[0] == question]
        return listed or [(question, name, entry, None) for name, entry in entries.items()]

    figures = {
        "learning": draw_lines(rows("runs", "headline") + rows("runs", "embedding tables"),
                               learning, "epoch", CER,
                               "Learning curves on dev speech, lower is better"),
        "bits": draw_lines(rows("runs", "bits"), bits, "kbit per second", CER,
                           "Error rate by bits, lower is better"),
        "noise": draw_lines(rows("runs", "noise"), noise, "signal-to-noise ratio, dB", CER,
                            "Error rate in noise, lower is better"),
        "codecs": draw_lines(rows("codecs", "codecs"), distance, "training step", "mel distance",
                             "Mel distance of codecs on training speech, lower is better"),
        "content": draw_lines(rows("content", "content"), revealed, "codebook", "bits",
                              "What the code of each codebook reveals"),
        "languages": draw_lines(rows("runs", "languages"), languages, CER, "",
                                "Error rate by language, lower is better"),
        "questions": draw_questions(report.get("runs", {})),
    }
    for name, fig in figures.items():
        if fig:
            picture = path.with_name(f"{name}.png")
            fig.savefig(picture)
            Image.open(picture).quantize(64).save(picture)          # a third of the bytes
            print(f"wrote {picture}")


def canvas(title, width, height, columns=1):
    """-> figure, its axes beside each other."""
    fig = Figure((width, height), dpi=100, layout="constrained")
    fig.suptitle(title)
    return fig, fig.subplots(1, columns, sharey=True, squeeze=False)[0]


# ------------------------------------------------------------------------------------------ lines

def draw_lines(rows, points, xlabel, ylabel, title):
    """A line for each run; points(run) yields (panel, x, y). Runs whose labels agree before a colon
    share a color, and with the same seed a line."""
    panels = {}             # panel: {(label, seed): [(x, y)]}
    for _, label, run, _ in rows:
        key = label.split(":")[0], run["flags"]["seed"]
        for panel, x, y in points(run):
            panels.setdefault(panel, {}).setdefault(key, []).append((x, y))
    if sum(len(line) for lines in panels.values() for line in lines.values()) < 2:
        return None
    fig, axes = canvas(title, 5 + 1.5 * len(panels), 11 if points == languages else 5, len(panels))
    colors, legend = {}, {}             # of each label
    for axis, (panel, lines) in zip(axes, panels.items()):
        for (label, _), line in lines.items():
            color = colors.setdefault(label, COLORS[len(colors) % len(COLORS)])
            style = "o" if points == languages else "o-"
            (legend[label],) = axis.plot(*zip(*sorted(line)), style, color=color)
        axis.set(title=panel, xlabel=xlabel)
        if points == learning:
            axis.xaxis.get_major_locator().set_params(integer=True)
        if points == languages:
            axis.grid(axis="y")
        if points == noise:
            axis.set_xticks([0, 10, 20, CLEAN], ["0", "10", "20", "clean"])
    axes[0].set_ylabel(ylabel)
    fig.legend(legend.values(), legend.keys(), loc="outside lower center", ncols=2)
    return fig


def learning(run):
    for row in run["log"]:
        yield f"--size {run['flags']['size']}", row["epoch"], 100 * row["dev_cer"]


def distance(codec):
    for row in codec.get("log", [])[-50:]:              # without the steep first steps
        yield "", row["step"], row["mel"]


def revealed(run):
    for kind in ("character", "speaker"):
        for level, found in enumerate(run[kind], 1):
            yield f"about the {kind}", level, found


def bits(run):
    """Log-mel, which has no bits, becomes a horizontal line."""
    first = next(iter(run["test"].values()))
    cer = 100 * run["test"].get("test-clean", first)["cer"]
    for kbits in [run["bitrate"] / 1000] if run["bitrate"] else [0, 4]:
        yield "", kbits, cer


CLEAN = 30      # where clean speech stands on the axis of signal-to-noise ratios


def noise(run):
    for test in run["test"].values():
        if test["noise"] and test["subset"] in run["test"]:
            kind = "recorded sounds" if "/" in test["noise"] else f"{test['noise']} noise"
            yield kind, test["snr"], 100 * test["cer"]
            yield kind, CLEAN - 5, np.nan               # which no line crosses
            yield kind, CLEAN, 100 * run["test"][test["subset"]]["cer"]


def languages(run):
    """A dot for each language: of several tests, the first one counts."""
    for test in run["test"].values():
        if "cer_by_language" in test:
            for language, cer in test["cer_by_language"].items():
                yield "", 100 * cer, language
            return


# -------------------------------------------------------------------------------------- questions

def draw_questions(runs):
    """The difference of each run from its reference, in CER on test-clean; seeds below each other.
    The older questions are left to tables.md."""
    test, apart = "test-clean", [0]
    for name, run in runs.items():
        seeds = [run, runs.get(f"{name}-1", run)]
        if all(test in seed["test"] for seed in seeds):
            apart.append(100 * np.ptp([seed["test"][test]["cer"] for seed in seeds]))
    answers = {}            # question: {label: [what difference() returns, for each seed]}
    for question, label, run, base in rows_of(runs):
        fair = not question.startswith("noise") and not question.endswith("older")
        if base and fair and test in run["test"] and test in base["test"]:
            labels = answers.setdefault(question, {})
            labels.setdefault(label, []).append(difference(run, base, test))
    if not answers:
        return None

    names = []              # from top to bottom
    fig, (axis,) = canvas("What changes the error rate?", 8, 8)
    axis.axvspan(-max(apart), max(apart), color="0.88")
    axis.axvline(0, color="black", linewidth=1)
    for question, labels in answers.items():
        names.append(question)
        for label, seeds in labels.items():
            for number, (middle, low, high) in enumerate(seeds):
                y = len(names) + number / 3
                axis.plot([low, high], [y, y], linewidth=2, color=COLORS[0])
                axis.plot(middle, y, "o", color=COLORS[0])
            far = ", ".join(f"{middle:+.0f} ▶" for middle, _, _ in seeds if middle > FAR)
            axis.text(FAR, len(names), far, ha="right", va="center", clip_on=True)
            names.append(label)
    axis.set_yticks(range(len(names)), names)
    for name in axis.get_yticklabels():
        if name.get_text() in answers:
            name.set_weight("bold")
    axis.set(xlim=(None, FAR), ylim=(len(names), -1))
    fig.supxlabel("points of character error rate (test-clean) more than the reference, which is\n"
                  "RVQ tokens of the mel encoder unless a row says otherwise (recipe: the next\n"
                  "newer one). Left is better. Lines: 95% intervals, one for each seed.\n"
                  f"Gray: two seeds differ by up to {max(apart):.1f}.", size=12)
    return fig
