"""The GPU's work alone: fixed decode and prefill steps on 1, 2, 4 … engines at once, with and without MPS.

    python benchmarks/gpu_steps.py --model Qwen/Qwen2.5-0.5B --out DIR [--ctx 1024,4096] [--batch 256] 1 2 2m 4m

A NAME is a number of engines, `m` for MPS; the first one is what the others are compared with, and of its steps the
kernels are traced: where the GPU's time goes, and how near to its ceilings. Decode shares the batch among the engines;
of prompts each engine reads a full token budget.
"""

from __future__ import annotations

import asking
import msgspec

from advisor import flow
from advisor.core import specs
from advisor.core.overlap import StepRate, overlap, step_rate
from advisor.core.records import Manifest, Step, TrialSpec
from advisor.core.saturation import Saturation, saturation
from advisor.core.tried import judge
from advisor.core.wording import times


def steps_spec(
    manifest: Manifest, name: str, batch: int, contexts: list[int], seconds: float, traced: int = 0
) -> TrialSpec:
    """The spec of a NAME: decode of the whole batch at each context, then full prefill steps of each."""
    engines = int(name.rstrip("m"))
    spec = specs.load_spec(manifest, engines, mps=name.endswith("m"))
    budget = manifest.settings.max_num_batched_tokens
    if batch < engines:
        raise ValueError(f"a batch of {batch} cannot be shared among {engines} engines")
    steps = [Step(decode=batch // engines, decode_context=context) for context in contexts]
    steps += [Step(prefill=max(1, budget // context), prefill_tokens=min(context, budget)) for context in contexts]
    return msgspec.structs.replace(spec, kind="steps", steps=steps, step_s=seconds, traced=traced)


def told(found: Saturation) -> str:
    """Where the time of a traced step goes, in one line."""
    parts = [
        f"{part.label} {part.share:.1%}"
        + ("" if part.achieved is None else f" ({part.achieved:.2f} of its roofline)")
        + ("" if part.sms_covered is None else f" on {part.sms_covered:.0%} of the SMs")
        for part in sorted(found.parts, key=lambda part: -part.share)
    ]
    why = f"; unlabelled: {found.why_unlabelled}" if found.why_unlabelled else ""
    return f"kernels run for {found.busy_s * 1e3:.2f} of {found.span_s * 1e3:.2f} ms: {', '.join(parts)}{why}"


def main() -> None:
    parser = asking.parser(__doc__)
    parser.add_argument("--ctx", type=lambda text: [int(one) for one in text.split(",")], default=[1024])
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--seconds", type=float, default=4.0)
    parser.add_argument("--traced", type=int, default=3, help="repetitions of each step that are traced")
    parser.add_argument("names", nargs="+", metavar="NAME")
    options = parser.parse_args()

    def story(manifest: Manifest, runner: flow.Runner) -> None:
        first: dict[int, StepRate] = {}
        for name in options.names:
            traced = options.traced if name == options.names[0] else 0
            spec = steps_spec(manifest, name, options.batch, options.ctx, options.seconds, traced)
            one = judge(runner.run(spec))
            if not one.ok:
                print(f"{name}: {one.outcome} ({one.why})", flush=True)
                continue
            for index, step in enumerate(spec.steps):
                what = f"decode at {step.decode_context}" if step.decode else f"prefill of {step.prefill_tokens}"
                seen = step_rate(one.raw, index)
                if isinstance(seen, str):
                    print(f"{name}, {what}: {seen}", flush=True)
                    continue
                if name == options.names[0]:
                    first.setdefault(index, seen)
                base = first.get(index)
                against = times(overlap(seen, base)) if base else f"{options.names[0]} gave no rate to compare with"
                print(
                    f"{name}, {what}: {seen.tok_per_s.value:,.0f} tokens/s, {seen.step_ms:.2f} ms a step, {against}",
                    flush=True,
                )
            for trace in one.raw.traces:
                found = saturation(trace, spec.steps[trace.step], manifest.model, manifest.gpu.sms, manifest.ceilings)
                print(f"  step {trace.step + 1}: {found if isinstance(found, str) else told(found)}", flush=True)

    asking.run(options, story, ctx=max(options.ctx), concurrency=options.batch)


if __name__ == "__main__":
    main()
