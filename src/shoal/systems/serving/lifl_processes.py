"""LIFL on real processes: what shared memory spares, and what becomes of killed aggregators.

Updates of 44 MiB go from one aggregator's process to another's over each of four ways, and a pool
of aggregators sums a wave of them, once in peace and once under SIGKILL. Then coordinator, gateway,
aggregators and clients run as processes that speak through encrypted sockets, and an aggregator
drawn by key is killed every 1 to 3 seconds.

Qi et al. 2024 (MLSys, arXiv 2405.10968), sections on shared-memory processing and failures.
"""

from __future__ import annotations

from shoal.lab.card import Arm, Budget, Claim, Source, System, at_least, at_most
from shoal.lab.chart import Chart
from shoal.systems.serving import _lifl_charts as charts
from shoal.systems.serving import _lifl_kills as measured

_RUN = {
    "nodes": 1, "aggregators": 3, "pace_s": 0.3, "patience_s": 1.0, "collect_s": 10.0,
    "attempts": 5, "lr": 0.05,
}  # fmt: skip
_UPDATE = {"megabytes": 44.0, "updates": 8, "waves": 5}

SYSTEM = System(
    name="lifl-processes",
    kind="program",
    title="Sums in shared memory on real processes, of which some are killed",
    source=Source(
        "Qi et al. 2024",
        "LIFL: A Lightweight, Event-driven Serverless Platform for Federated Learning",
        arxiv="2405.10968",
        venue="MLSys",
    ),
    scenario="serving.one_machine",
    uses={"topology": None, "exchange": None},
    arms={
        "shared": Arm(system="lifl-machine", set={**_UPDATE, "transport": "shared"}),
        "bytes": Arm(system="lifl-machine", set={**_UPDATE, "transport": "bytes"}),
        "socket": Arm(system="lifl-machine", set={**_UPDATE, "transport": "socket"}),
        "broker": Arm(system="lifl-machine", set={**_UPDATE, "transport": "broker"}),
        "tree": Arm(system="lifl-machine", set={**_UPDATE, "transport": "tree"}),
        "tree killed": Arm(
            system="lifl-machine", set={**_UPDATE, "transport": "killed", "kills": 3}
        ),
        "calm": Arm(system="lifl", set={**_RUN, "pace_s": 0.0}),
        "killed": Arm(
            system="lifl", set=_RUN, prepare=measured.kill_list, engine="processes"
        ),
    },
    claims=(
        Claim(
            "time-socket", "An update of 44 MiB is in the next sum in at most half of the time "
            "that it takes over a socket",
            at_most(0.5), measure=measured.time_over_socket, at="evaluation",
        ),
        Claim(
            "time-broker", "and in a third of that by way of a broker",
            at_most(0.33), measure=measured.time_over_broker, at="evaluation",
        ),
        Claim(
            "cpu-socket", "All processes together take at most 0.6 of the socket's processor time",
            at_most(0.6), measure=measured.cpu_over_socket, at="evaluation",
        ),
        Claim(
            "time-bytes", "No more time than a socket takes that carries bare bytes into a buffer "
            "that is there already",
            at_most(1.0), measure=measured.time_over_bytes,
        ),
        Claim(
            "cpu-bytes", "and 0.6 of its processor time",
            at_most(0.6), measure=measured.cpu_over_bytes,
        ),
        Claim(
            "exact", "Sums are the flat weighted sums within 1e-6, over all ways and under kills",
            at_most(0.0), measure=measured.wrong_sums, statistic="max",
        ),
        Claim(
            "none-lost", "A tree whose aggregators are killed leaves no update out",
            at_most(0.0), measure=measured.updates_lost, statistic="max",
        ),
        Claim(
            "nothing-left", "and no shared memory is left, nor a slot of a gateway's",
            at_most(0.0), measure=measured.memory_left, statistic="max",
        ),
        Claim(
            "killed", "While peers learn, so many of their aggregators are killed",
            at_least(4.0), measure=measured.killed, statistic="min", scale="full",
        ),
        Claim(
            "once", "and every round has every client's update exactly once",
            at_most(0.0), measure=measured.missed, statistic="max",
        ),
        Claim(
            "accuracy", "The last model is within 2 points of an undisturbed run's",
            at_most(0.02), measure=measured.accuracy_apart,
        ),
    ),
    charts=(
        Chart(
            "An update of 44 MiB from one sum to the next", "bars", charts.machine, "",
            "milliseconds",
        ),
    ),
    deviations=(
        "a socket with serialisation is Python's pickle over local TCP, a broker a third process "
        "that takes the whole message before it hands it on; bare bytes are read into the "
        "receiver's buffer as they come, which no serving framework does: their two copies are "
        "made in two processes at once, so half of their time was measured on some runs only "
        "(0.39 to 0.65), and what is spared is processor time",
        "the sender's copy into shared memory is counted, although an aggregator's sum is made "
        "there in the first place",
        "each sends one update at a time and waits until it is in the sum; a pipeline would hide "
        "part of a socket's time where cores are idle",
        "eBPF redirection in the kernel is replaced by keys over Unix sockets (and over the peers' "
        "encrypted connections)",
        "the undisturbed run is in virtual time; both begin and train with the same draws",
        "gateway and coordinator are not killed here; fault exploration crashes them, too",
    ),
    small=Budget(seeds=1, scenario={"rounds": 40}),
    full=Budget(seeds=2),
)  # fmt: skip
