"""Made-up reports of comparisons in their real shape, and a reader that says what is wrong with a page."""

from __future__ import annotations

import re
from html.parser import HTMLParser

COLUMNS = [
    {"name": "paired_pixels", "title": "paired error, pixels", "better": "lower", "digits": 4, "network": "", "real": False},
    {"name": "fid", "title": "FID", "better": "lower", "digits": 2, "network": "inception", "real": True},
    {"name": "clip_score", "title": "CLIP score", "better": "higher", "digits": 2, "network": "clip", "real": False},
    {"name": "vendi", "title": "Vendi, DINOv2", "better": "higher", "digits": 2, "network": "dinov2", "real": False},
]


def interval(mean, half=0.1, **more):
    return {"mean": mean, "low": None if half is None else mean - half, "high": None if half is None else mean + half, "count": 8, **more}


def row(model, steps, guidance=1.0, reference=True, seconds=True, **measures):
    """reference: whether there is a teacher at 32 steps that this row is compared with; None for the reference's own row."""
    beside = {"model": "teacher", "steps": 32, "guidance": guidance} if reference else None
    return {
        "model": model, "steps": steps, "guidance": guidance, "reference": beside, "is_reference": reference is None,
        "evaluations": steps * (2 if guidance != 1 else 1), "drawing_seconds": 3.0, "measures": measures,
        "seconds": {"text": 0.002, "denoise": 0.1 * steps, "decode": 0.01, "rounds": [0.1 * steps] * 5} if seconds else None,
    }  # fmt: skip


def report(rows, *, limit=0, count=0, digest="abc0", prompts="def0", features=None, dtype="fp32", straightness=(), notes=(), command="reflow evaluate"):
    models = list(dict.fromkeys(r["model"] for r in rows))
    there = {name for r in rows for name in r["measures"]}
    teacher = any(r["reference"] or r["is_reference"] for r in rows)
    if teacher and "teacher" not in models:
        models.insert(0, "teacher")
    return {
        "format": 2, "kind": "comparison", "key": "k" * 24, "command": command,
        "protocol": {
            "name": "coco30k", "title": f"coco30k, first {limit}" if limit else "coco30k", "about": "captions of COCO", "source": "arXiv 0000.00000", "teacher": True,
            "captions": {"kind": "coco", "file": "captions.json", "choice": "first", "order": "seeded", "count": count, "seed": 7},
            "images": {"folder": "val2014", "resize": "bicubic", "size": 256, "all": True},
            "samples": {"per_prompt": 2, "seed": 5}, "measures": {"wanted": ["fid", "vendi"]}, "limit": limit, "digest": digest,
        },
        "prompts": {"count": 4, "digest": prompts}, "real_images": 9, "samples": 8, "batch": 2,
        "reference": {"model": "teacher", "steps": 32, "guidance": None} if teacher else None,
        "models": [{"label": name, "kind": "pipeline", "path": f"/home/me/models/{n}", "dtype": dtype, "weights": {"unet": "e" * 64}} for n, name in enumerate(models)],
        "features": features or {}, "columns": COLUMNS, "rows": rows,
        "not_measured": {c["name"]: f"needs --features {c['network']}=PATH" for c in COLUMNS if c["name"] not in there},
        "straightness": list(straightness), "notes": list(notes), "replicates": 20,
        "cost": {"network_evaluations": 1234, "device_hours": 0.5, "devices": ["cuda:0"]},
        "machine": {"processor": "a processor", "cores": 2, "memory_gib": 8.0, "system": "Linux", "gpu": "1 x a card"}, "versions": {"torch": "2"},
    }  # fmt: skip


def several(**keys):
    """Two students and the teacher at other steps, at one guidance."""
    return report([
        row("teacher", 32, reference=None, fid=interval(10.0), clip_score=interval(31.0)),
        row("A", 4, paired_pixels=interval(0.5, 0.01, over_seeds=interval(0.5, 0.2, values=[0.4, 0.6])), fid=interval(12.0), clip_score=interval(30.0, 0.5)),
        row("A", 2, paired_pixels=interval(0.7, 0.01), fid=interval(15.0), clip_score=interval(29.0, 0.5)),
        row("B", 4, paired_pixels=interval(0.6, 0.01), fid=interval(12.1), clip_score=interval(30.1, 0.5)),
    ], **keys)  # fmt: skip


VOID = {"meta", "img", "br", "hr", "input", "link", "source"}
SHAPES = {"line", "circle", "polygon", "polyline", "path"}


class Page(HTMLParser):
    """Reads a page. faults: what is wrong with it; found: (tag, attributes) of everything; text: all that is written outside script and style."""

    def __init__(self, html):
        super().__init__()
        self.open, self.faults, self.found, self.parts = [], [], [], []
        self.feed(html)
        self.close()
        self.faults += [f"<{tag}> is never closed" for tag in self.open]
        ids = [a["id"] for _, a in self.found if "id" in a]
        self.faults += [f"id {name} is there twice" for name in {i for i in ids if ids.count(i) > 1}]
        for tag, attributes in self.found:
            for key in ("src", "href", "srcset", "action", "data", "xlink:href"):
                if not (attributes.get(key) or "data:").startswith(("data:", "#")):
                    self.faults.append(f"<{tag} {key}> leads elsewhere: {attributes[key]}")
            self.faults += [f"<{tag}> has {key}" for key in attributes if key.startswith("on")]
            if tag == "img" and "alt" not in attributes:
                self.faults.append("a picture has no alt")
        if re.search(r"@import|url\((?!data:)", html):
            self.faults.append("a style leads elsewhere")

    def handle_starttag(self, tag, attrs):
        self.found.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.found.append((tag, dict(attrs)))
        if tag not in SHAPES:
            self.faults.append(f"<{tag}/> closes itself")

    def handle_endtag(self, tag):
        if not self.open or self.open.pop() != tag:
            self.faults.append(f"</{tag}> closes another")

    def handle_data(self, data):
        if not {"script", "style"} & set(self.open):
            self.parts.append(data)

    @property
    def text(self):
        return " ".join(" ".join(self.parts).replace("\xa0", " ").split())

    def all(self, tag, name=""):
        return [a for t, a in self.found if t == tag and (not name or name in (a.get("class") or "").split())]
