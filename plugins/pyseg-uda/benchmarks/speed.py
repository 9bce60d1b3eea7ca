"""What a step of training takes beside its forward and backward passes, and the memory.

    python benchmarks/speed.py

A pass is the network alone: teacher forward; student forward and backward of the sum of its logits.
A step is all else besides: views of the data, pseudo-labels, mixing, jitter, blur, losses, teacher,
optimizer. Medians of interleaved rounds, one thread; memory is the process's peak.
"""

from __future__ import annotations

import resource
import statistics
import sys
import time
from typing import Any

import torch
from pyseg_uda.steps import Called, Steps, head_of, normalised
from pyseg_uda.streams import attended, four_streams, mix_transformer
from pyseg_uda.teacher import teacher_of
from pyseg_uda.views import Views

import pyseg
from pyseg.training import make_optimizer

ROUNDS = 5


def measure(name: str, method: str, crop: tuple[int, int], **options: Any) -> dict[str, Any]:
    torch.manual_seed(0)
    data = pyseg.datasets.create("synthetic", length=8, size=(360, 480))
    count = len(data.classes)
    model = pyseg.models.create(name, num_classes=count, weights=None, **options).train()
    trunk = mix_transformer(model) if method == "attention" else None
    teacher = teacher_of(model)
    steps = Steps(
        model,
        teacher,
        trunk,
        None,
        threshold=0.968,
        trusted=(0, 0),
        decay=0.999,
        colour=0.2,
        blur=0.5,
        consistency=1.0,
        distance=0.0,
        auxiliary=0.4,
        key=(0, 0),
    )
    samples = [data[k] for k in range(len(data))]
    views = Views(
        samples,
        [sample.image for sample in samples],
        None,
        crop_size=crop,
        scale=(1.0, 1.0),
        flip=0.5,
        category_limit=0.75,
        rare_crop=0.0,
        alignment=None,
        beta=0.0,
        key=(0, 0, 0),
        length=1000,
    )
    optimizer = make_optimizer("adamw", model, learning_rate=1e-5, weight_decay=0.01)
    images = torch.rand(2, 3, *crop)

    def passes() -> None:
        if trunk is None:
            with torch.no_grad():
                teacher(images)
            for _ in range(2):
                sum(x.sum() for x in model(images).values()).backward()
            return
        x = normalised(model, images)
        with torch.no_grad():
            features, _ = attended(mix_transformer(teacher), torch.cat([x, x]))
            head_of(teacher)([stage[2:] for stage in features])
        streams, _ = four_streams(trunk, x, x)
        sum(head_of(model)(stream).sum() for stream in streams).backward()

    def step(number: int) -> None:
        pair = [views[2 * number + k] for k in range(2)]
        batch: dict[str, Any] = {key: torch.stack([v[key] for v in pair]) for key in pair[0]}
        steps(Called(model), {**batch, "step": number})["loss"].backward()
        optimizer.step()

    times: dict[str, list[float]] = {"step": [], "passes": []}
    for number in range(ROUNDS + 1):
        for kind in times:
            begin = time.perf_counter()
            step(number) if kind == "step" else passes()
            times[kind].append(time.perf_counter() - begin)
            optimizer.zero_grad()
    found = {kind: statistics.median(values[1:]) for kind, values in times.items()}
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return {**found, "ratio": found["step"] / found["passes"], "peak": peak}


if __name__ == "__main__":
    torch.set_num_threads(1)
    if len(sys.argv) == 1:  # each in a process of its own, for its memory
        import subprocess

        for k in range(4):
            subprocess.run([sys.executable, __file__, str(k)], check=True)
        raise SystemExit
    cases: list[tuple[str, str, dict[str, Any]]] = [
        ("streetnet", "self-training", {}),
        ("segformer_b0", "self-training", {}),
        ("segformer_b0", "attention", {}),
        ("segformer_b0", "attention", {"head": "daformer"}),
    ]
    name, method, options = cases[int(sys.argv[1])]
    found = measure(name, method, (96, 128), **options)
    title = name + (f"(head={options['head']!r})" if options else "")
    print(
        f"| `{title}` | {method} | {1e3 * found['step']:.0f} | {1e3 * found['passes']:.0f} | "
        f"{found['ratio']:.2f} | {found['peak']:.0f} |",
        flush=True,
    )
