"""What a trial's cores were worth: who else used them, how long its engines waited for one, how fast each is. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

from advisor.core.records import CoreSpeed, RawTrial, Stranger

STRANGER_SHARE_MAX = 0.10  # of one core
WAITED_SHARE_MAX = 0.05  # of the window
# Engines that use more of their cores than this wait for themselves: no one else is needed to explain it.
OWN_SHARE_FULL = 0.80
# Below that threads queue for each other in bursts, as r / (1 - r) where the engine uses the share r of its cores.
# In clean runs on H200 hosts engines at 67 to 80 % of three cores waited 5 to 10 % of the time; the most, by this
# measure, were engines with two API servers at 55 %: 10 %, which is 0.08 of r / (1 - r).
BURST_WAIT = 0.12
# Two cores for an engine and two API servers: 20 % at 72 %. More was never seen without somebody else.
MOST_WAIT = 0.25
UNEVEN_RATIO = 1.25
SLOWED_RATIO = 1.5
_ROLES = {"engine_core": "engine core", "api_server": "API server"}


class Wait(NamedTuple):
    """The process of an engine that waited longest for a core, and the share of the window that it did."""

    engine: int
    who: str
    share: float


def longest_wait(raw: RawTrial, engines: Iterable[int]) -> Wait | None:
    """Of these engines' processes the one that waited longest for a core; None where that was not recorded."""
    if raw.window is None:
        return None
    length_s, wanted = raw.window[1] - raw.window[0], set(engines)
    waits = [
        Wait(use.engine, _ROLES[use.role], use.waited_s / length_s)
        for use in raw.cpu
        if use.role in _ROLES and use.engine in wanted and use.engine is not None and use.waited_s is not None
    ]
    return max(waits, key=lambda wait: wait.share, default=None)


def contention(raw: RawTrial) -> str | None:
    """One sentence on what else ran on the trial's cores, None when nothing did that matters.

    It matters when a stranger used more than 10 % of a core, or when an engine's process waited for more than 5 % of
    the window, and more than its own bursts explain, although the engine has its cores to itself and room on them.
    """
    if raw.window is None:
        return None
    length_s = raw.window[1] - raw.window[0]
    strangers = sorted(raw.strangers, key=lambda one: -one.cpu_s)
    loud = [one for one in strangers if one.cpu_s > STRANGER_SHARE_MAX * length_s]
    if loud:
        more = f"; {len(loud) - 1} more used the trial's cores too" if len(loud) > 1 else ""
        return f"{_intrusion(raw, loud[0], length_s)}{more}."
    alone = [engine for engine in range(len(raw.spec.engine_cores)) if _unexplained(raw, engine, length_s)]
    # Each engine against its own allowance: one that waits for itself must not hide one that does not.
    waits = [
        found
        for engine in alone
        if (found := longest_wait(raw, [engine])) and found.share > _explained(_own_share(raw, engine, length_s))
    ]
    if not waits:
        return None
    wait = max(waits, key=lambda one: one.share)
    own = raw.spec.engine_cores[wait.engine]
    if quiet := next((one for one in strangers if one.core in own), None):
        return f"{_intrusion(raw, quiet, length_s)}."
    return (
        f"Engine {wait.engine}'s {wait.who} waited {wait.share * 100:.0f} % of the window for a core, though its "
        f"own processes used only {_own_share(raw, wait.engine, length_s) * 100:.0f} % of its cores: something that "
        "cannot be seen from here ran on them."
    )


def _explained(own_share: float) -> float:
    """The share of the window that a process may wait for others of its own engine."""
    return min(MOST_WAIT, max(WAITED_SHARE_MAX, BURST_WAIT * own_share / (1 - own_share)))


def _unexplained(raw: RawTrial, engine: int, length_s: float) -> bool:
    """Whether this engine waits for somebody else: nobody of ours is on its cores, and it left room on them.

    An engine core with a core of its own shares that with its own threads, however free the engine's other cores are.
    """
    if raw.spec.split_cores:
        return False
    own = set(raw.spec.engine_cores[engine])
    others = [*raw.spec.engine_cores[:engine], *raw.spec.engine_cores[engine + 1 :], raw.spec.load_cores]
    return own.isdisjoint(core for group in others for core in group) and (
        _own_share(raw, engine, length_s) < OWN_SHARE_FULL
    )


def _own_share(raw: RawTrial, engine: int, length_s: float) -> float:
    used_s = sum(use.cpu_s for use in raw.cpu if use.engine == engine and use.role in _ROLES)
    return used_s / (length_s * max(1, len(set(raw.spec.engine_cores[engine]))))


def _intrusion(raw: RawTrial, stranger: Stranger, length_s: float) -> str:
    share = stranger.cpu_s / length_s
    # More than all of a core can only have come from several.
    where = f"{share * 100:.0f} % of core {stranger.core}" if share <= 1.02 else f"{share:.1f} cores"
    among = "" if share <= 1.02 else f", core {stranger.core} among them"
    engines = [engine for engine, cores in enumerate(raw.spec.engine_cores) if stranger.core in cores]
    holders = [f"engine {engine}" for engine in engines]
    holders += ["the load generators"] if stranger.core in raw.spec.load_cores else []
    text = f"PID {stranger.pid} ({stranger.name}) used {where}{among}"
    match holders:
        case []:
            pass
        case ["the load generators"]:
            text += ", which the load generators have to themselves"
        case [one]:
            text += f", which {one} has to itself"
        case _:
            text += f", which {' and '.join([', '.join(holders[:-1]), holders[-1]])} share"
    if wait := longest_wait(raw, engines):
        whose = "its" if len(holders) == 1 else f"engine {wait.engine}'s"
        text += f"; {whose} {wait.who} waited {wait.share * 100:.0f} % of the window"
    return text


def unevenness(raw: RawTrial) -> str | None:
    """One sentence when the slowest of the trial's cores needs at least 1.25 times the time of the fastest."""
    if not raw.core_speeds:
        return None
    slow, fast = max(raw.core_speeds, key=_seconds), min(raw.core_speeds, key=_seconds)
    if fast.seconds <= 0 or slow.seconds < UNEVEN_RATIO * fast.seconds:
        return None
    return (
        f"Core {slow.core} took {slow.seconds / fast.seconds:.2f} times as long as core {fast.core} for the same work "
        f"({slow.seconds * 1000:.1f} and {fast.seconds * 1000:.1f} ms): who gets which core decides part of the result."
    )


def _seconds(speed: CoreSpeed) -> float:
    return speed.seconds


class HostSpeed(NamedTuple):
    """CPU seconds of the fixed work at a core's full speed, and the share of probes that took half as long again."""

    core_s: float
    slowed: float


def host_speed(raws: Sequence[RawTrial]) -> HostSpeed | None:
    """How fast the engines' cores are, over all trials; None where none recorded it.

    On shared hosts a core takes either this long or up to twice that, and changes within seconds. So its full speed is
    the lower quartile of all probes; on one host it was 18.2 to 19.4 ms within an hour. Less is faster; only to be
    compared between runs of the same version of this program and of Python.
    """
    seconds = sorted(
        speed.seconds
        for raw in raws
        for speed in raw.core_speeds
        if any(speed.core in cores for cores in raw.spec.engine_cores)
    )
    if not seconds:
        return None
    full = seconds[len(seconds) // 4]
    return HostSpeed(full, sum(one >= SLOWED_RATIO * full for one in seconds) / len(seconds))
